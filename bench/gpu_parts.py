"""The parts of bench.gpu: which cells each has, who runs in a cell, and what is expected of it.

A part is a generator of (cell's name, function that measures it): inputs are made inside of the
function, so that one cell's memory is free before the next. `bench` is a `bench.gpu.Bench`.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import (
    bench_attention,
    bench_evict,
    bench_quant,
    bench_sampling,
    bench_scoring,
    gpu_rivals,
)
from bench.bench_attention import Shape, Tree
from bench.timing import Skip, attempt
from kvtools import ops
from kvtools.ops.attention import tree_attention
from kvtools.ops.quant import FORMATS, append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import step_scores, token_logprobs

IMPL = "triton"  # ours; interpreted in dry runs
IN_CPP = ", CUDA C++"  # ours by impl="cuda"
DTYPE = torch.bfloat16
ROOT = Path(__file__).resolve().parent.parent
ROWS = [f"tests/test_{x}.py" for x in ("quant", "attention", "evict", "sampling", "scoring")]
Cells = Iterator[tuple[str, Callable[[], dict]]]


@dataclass(frozen=True)
class Entry:
    """A contender: `make` prepares and returns what is timed, `check` raises unless its output is
    what it is timed for."""

    make: Callable[[], Callable[[], Any]]
    check: Callable[[Any], None]
    nbytes: int  # the least
    flops: int = 0
    package: str = ""  # whose version is named
    graph: bool = True  # can be captured
    per: int = 1  # steps that a run takes


LLAMA_8B = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    tests: dict[str, list[str]] = field(default_factory=lambda: {
        "triton": [*ROWS, "-k", "triton"],
        "cuda": [*ROWS, "-k", "cuda"],
        "end to end": ["tests/test_gpu.py", "tests/test_attention.py", "-m", "gpu"],
    })  # fmt: skip
    smoked: dict[str, str] = field(default_factory=dict)  # cells by part, if not all
    formats: tuple = tuple(x for x in FORMATS if x != "none")
    copied: int = 2**31  # bytes
    product: int = 8192  # rows and columns
    rounds: int = 25
    # KV heads, query heads of each, head size: Llama-3-8B's and Qwen2.5-7B's.
    heads: tuple = (("llama", (8, 4, 128)), ("qwen", (4, 7, 128)))
    shared: tuple = (
        (64, 8192, 256),
        (1, 8192, 256),
        (4, 8192, 256),
        (16, 8192, 256),
        (64, 2048, 512),
        (64, 32_768, 512),
        (256, 8192, 256),
        (256, 8192, 2048),
    )
    long: tuple = ((64, 4096), (16, 16_384))  # rows and tokens, nothing shared
    short: tuple = ((64, 512), (256, 256), (256, 1024))
    flex: tuple = ("llama 64 x 8192 + 256", "qwen 64 x 8192 + 256", "llama 64 x 4096")
    trees: tuple = (
        "1,10 / 4000,400", "1,256 / 256,32", "1,1024 / 2048,32",
        "1,4,16,512 / 1024,256,128,32", "1,4,16,64,256,1024 / 256,32,256,64,32,256",
        "1,2,4,8,16,32,64,128,1024 / 16,16,16,16,16,16,16,16,16", "256 / 1024", "256 / 4096",
    )  # fmt: skip
    tree_heads: tuple = ((32, 32), (16, 8), (32, 8), (64, 8), (16, 1))  # query heads, KV heads
    tree_d: int = 128
    appended: tuple = (
        bench_quant.Shape(64, 8, 128),
        bench_quant.Shape(256, 8, 128),
        bench_quant.Shape(8192, 8, 128),
    )
    evicted: tuple = (
        bench_evict.Shape(1, 8, 4, 8192, 128, 32, 6144),
        bench_evict.Shape(64, 8, 4, 640, 128, 16, 64),
    )
    logits: tuple = tuple(bench_sampling.Shape(b, 151_936) for b in (1, 16, 64, 256))
    scored: tuple = (bench_scoring.Shape(16, 8192, 256, 4096, 128_256),)
    model: dict = field(default_factory=lambda: LLAMA_8B)
    decoded: tuple = ((16, 2048), (64, 2048), (64, 8192))  # rows and prompt
    generated: tuple = (32, 2048, 64)  # rows, prompt, new tokens


# The heads, the vocabulary and so on of the headlines, so that the same kernels are compiled.
SMALL = Scale(
    heads=Scale().heads[:1], shared=((64, 32, 16),), long=((64, 48),), short=(), flex=(),
    appended=(bench_quant.Shape(64, 8, 128),), logits=(bench_sampling.Shape(4, 151_936),),
    evicted=(bench_evict.Shape(4, 8, 4, 640, 128, 16, 64),),
    scored=(bench_scoring.Shape(4, 64, 16, 4096, 512),), smoked={"attention": "formats"},
)  # fmt: skip
DRY = Scale(
    tests={
        "triton": ["tests/test_layers.py", "-k", "imports_go_up_only"],
        "cuda": ["tests/test_layers.py", "-k", "stream"],
        "end to end": ["tests/test_gpu.py", "-k", "test_session"],
    },
    formats=("int4",), smoked={"attention": "formats", "sampling": ".*top_k"},
    copied=2**16, product=64, rounds=1, heads=(("llama", (1, 4, 16)),), shared=((2, 16, 8),),
    long=((1, 24),), short=((2, 8),), flex=("llama 2 x 16 + 8",),
    trees=("1,2,4 / 16,16,5", "3 / 8"), tree_heads=((2, 1),), tree_d=16,
    appended=(bench_quant.Shape(16, 2, 16),), evicted=(bench_evict.Shape(2, 2, 2, 32, 16, 8, 4),),
    logits=(bench_sampling.Shape(2, 300),), scored=(bench_scoring.Shape(2, 16, 4, 32, 300),),
    model=LLAMA_8B | dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2),
    decoded=((2, 20),), generated=(2, 20, 3),
)  # fmt: skip


def impls(op: str) -> list[tuple[str, str]]:
    """What to add to the names of our contenders, and their implementations of `op`."""
    return [("", IMPL), *[(IN_CPP, "cuda")] * (op in ops.IN_CUDA)]


def cell(name: str, measure: Callable, bench, *args: Any, **options: Any) -> tuple:
    return name, partial(measure, bench, name, *args, **options)


def smoke(bench) -> Cells:
    """Each of our kernels, run and checked; they are compiled as those of the headlines."""
    for part in ("quant", "attention", "evict", "sampling", "scoring"):
        yield cell(part, all_alone, bench, part)


def sanitizers(bench) -> Cells:
    """A case of each kernel under each of NVIDIA's sanitizers; what they find fails the case."""
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for part in ("quant", "attention", "evict", "sampling", "scoring"):
            yield cell(f"{tool} {part}", sanitize, bench, tool, part)


def ours(bench, part: str) -> list[tuple[str, str, str]]:
    """Part, cell and name of our contenders in small cells."""
    from bench.gpu_alone import Names

    small = Names(bench.dry)
    return [
        (part, name, contender)
        for name, measure in PARTS[part](small)
        if re.match(small.scale.smoked.get(part, ""), name)
        for contender in measure()
    ]


def all_alone(bench, name: str, part: str) -> dict:
    return run_alone(bench, ours(bench, part))


def run_alone(bench, cases: list[tuple[str, str, str]], watch: Sequence[str] = ()) -> dict:
    def run(case: tuple[str, str, str]) -> dict:
        if case[2].endswith(IN_CPP) and ops.CUDA != "cuda":
            return {"skipped": "kvtools was built without csrc/cuda"}
        return attempt(partial(bench.alone, case, watch))

    with ThreadPool(min(os.cpu_count(), 12)) as pool:
        rows = pool.map(run, cases, chunksize=1)
    return {
        f"{name}, {contender}": row for (_, name, contender), row in zip(cases, rows, strict=True)
    }


def sanitize(bench, name: str, tool: str, part: str) -> dict:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is missing")
    one = {}  # case of each operator and implementation
    for case in ours(bench, part):
        one[case[1].split()[0], case[2].endswith(IN_CPP)] = case
    return run_alone(bench, list(one.values()), [program, "--tool", tool, "--error-exitcode", "99"])


def tests(bench) -> Cells:
    """The tests of our kernels, on this device."""
    for name, args in bench.scale.tests.items():
        yield cell(name, run_tests, bench, args)


def run_tests(bench, name: str, args: list[str]) -> dict:
    """How many passed, and what failed. Read from pytest's log, which also tells of those before
    it had to be stopped."""
    log = bench.folder / f"tests {name}.log"
    spread = ["-n", str(min(os.cpu_count(), 12))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    begin, late = time.monotonic(), False
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *args, *(spread if bench.device == "cuda" else [])],
            cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"COLUMNS": "300"},
            # In the background of a shell it is ignored, and then pytest could not be stopped.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        while process.poll() is None:
            try:
                process.wait(min(5, max(0.5, bench.left)))
            except subprocess.TimeoutExpired:
                bench.keep()
                if bench.left <= -5:
                    process.kill()
                elif bench.left <= 0 and not late:
                    process.send_signal(signal.SIGINT)  # then it tells what has failed
                    late = True
    text = log.read_text(errors="replace")
    words = "PASSED|FAILED|SKIPPED|ERROR"  # at the ends of lines, or by xdist at their beginnings
    ends = Counter(
        word
        for line in re.findall(
            rf"^\S+::.* ({words})\b|^\[gw\d+\] \[ *\d+%\] ({words}) ", text, re.M
        )
        for word in line
    )
    found = {"passed": ends["PASSED"], "failures": ends["FAILED"] + ends["ERROR"],
             "skipped": ends["SKIPPED"], "seconds": time.monotonic() - begin}  # fmt: skip
    if late:
        found["stopped"] = "before its end: there was no time left"
    elif process.returncode not in (0, 1, 5):  # 5: there were none
        found["failures"] += 1
        found["pytest"] = f"ended with {process.returncode}: {text[-200:]}"
    for test, why in re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", text, re.M)[:20]:
        found[test] = why[:200]
    return found


def rates(bench) -> Cells:
    """What this device does at best: a copy, bytes read and written, and a product."""

    def measure(bench, name: str) -> dict:
        source = torch.rand(bench.scale.copied // 4, device=bench.device)
        copied, size = torch.empty_like(source), bench.scale.product
        a, b = torch.randn(2, size, size, device=bench.device).to(DTYPE)
        rows = bench.times({"copy": lambda: copied.copy_(source), "product": lambda: a @ b})
        return {"copy GB/s": 2 * bench.scale.copied / rows["copy"]["ms"] / 1e6,
                "bfloat16 TFLOP/s": 2 * size**3 / rows["product"]["ms"] / 1e9}  # fmt: skip

    yield cell("rates", measure, bench)


def attention(bench) -> Cells:
    """A decode step's attention of one layer: a prefix shared by all rows, and nothing shared."""
    scale = bench.scale
    for name, heads in scale.heads:
        for n, p, s in scale.shared:
            shape = Shape(n, p, s, *heads)
            yield cell(f"{name} {n} x {p} + {s}", attend, bench, shape, ["int8", "int4"])
        for n, s in scale.long:
            shape, formats = Shape(n, 0, s, *heads), ["int8", "int4", "int2"]
            yield cell(f"{name} {n} x {s}", attend, bench, shape, formats)
        for n, s in scale.short:
            yield cell(f"{name} {n} x {s}", attend, bench, Shape(n, 0, s, *heads), [])
    name, heads = scale.heads[0]
    for n, p, s in (scale.shared[0], (scale.long[0][0], 0, scale.long[0][1])):
        shape = Shape(n, p, s, *heads)
        yield cell(
            f"formats {name} {n} x {p} + {s}", attend, bench, shape, scale.formats, rivals=False
        )


def tree(bench) -> Cells:
    """The trees that PAT and FastTree are measured on."""
    scale = bench.scale
    for hq, h in scale.tree_heads:
        for text in scale.trees:
            nodes, tokens = ([int(x) for x in part.split(",")] for part in text.split(" / "))
            shape = Tree(tuple(zip(nodes, tokens, strict=True)), h, hq // h, scale.tree_d)
            yield cell(f"{hq}/{h} heads, {text}", attend, bench, shape, [])


def attend(
    bench, name: str, shape: Shape | Tree, formats: Sequence[str], rivals: bool = True
) -> dict:
    step = bench_attention.inputs(shape, DTYPE, bench.device)
    flops = bench_attention.flops(shape)

    def ours(format: str, impl: str) -> Callable[[], torch.Tensor]:
        position, pages, plan = step.pages(format)
        q_thd = step.q.squeeze(2)
        return lambda: tree_attention(q_thd, position, pages, plan, impl=impl)[0]

    def entry(make: Callable, format: str = "none", package: str = "") -> Entry:
        check = partial(bench_attention.check, step, format=format)
        return Entry(make, check, bench_attention.nbytes(shape, DTYPE, format), flops, package)

    entries = {
        label(x) + suffix: entry(partial(ours, x, impl), x)
        for suffix, impl in impls("tree_attention")
        for x in ["none", *formats]
    }
    for rival, make in gpu_rivals.ATTENTION.items() if rivals else ():
        if rival == "flex_attention" and name not in bench.scale.flex:
            make = elsewhere
        entries[rival] = entry(partial(make, step), package=gpu_rivals.package(rival))
    return bench.race(name, entries)


def label(format: str) -> str:
    return "kvtools" if format == "none" else f"kvtools {format}"


def elsewhere(step: Any) -> None:
    raise Skip("is compiled for each shape; timed at few")


def quant(bench) -> Cells:
    """New tokens written into pages, all formats; quantised and read back."""
    for shape in bench.scale.appended:
        yield cell(f"append_kv {shape}", append, bench, shape)
        for op in ("quantize_kv", "dequantize_kv"):
            yield cell(f"{op} {shape}", convert, bench, op, shape)


def append(bench, name: str, shape: bench_quant.Shape) -> dict:
    def entry(format: str, run: Callable) -> Entry:
        args = bench_quant.inputs(shape, format, DTYPE, bench.device)
        k_thd, v_thd, slot_t, pages, _ = args

        def check(_: None) -> None:
            where = slot_t // pages.page_size, slice(None), slot_t % pages.page_size
            for x, codes, scale in ((k_thd, pages.k, pages.k_scale),
                                    (v_thd, pages.v, pages.v_scale)):  # fmt: skip
                found = codes[where]
                if format != "none":
                    found = dequantize_kv(found, scale[where], shape.d, impl="reference")
                close(found, x, bench_attention.CLOSE[format])

        return Entry(lambda: partial(run, *args), check, bench_quant.nbytes(shape, format, DTYPE))

    entries = {
        label(format) + suffix: entry(format, partial(append_kv, impl=impl))
        for suffix, impl in impls("append_kv")
        for format in ("none", *bench.scale.formats)
    }
    return bench.race(name, entries | {"index_put": entry("none", bench_quant.index_put)})


def convert(bench, name: str, op: str, shape: bench_quant.Shape) -> dict:
    x_thd, *_ = bench_quant.inputs(shape, "none", DTYPE, bench.device)
    entries = {}
    for format in bench.scale.formats:
        codes = quantize_kv(x_thd, format, impl="reference")
        read = partial(dequantize_kv, d=shape.d, dtype=DTYPE)
        if op == "quantize_kv":
            run = partial(quantize_kv, x_thd, format)
            value = partial(read, impl="reference")
        else:
            run = partial(read, *codes)
            value = first

        def check(out: Any, format: str = format, value: Callable = value) -> None:
            parts = out if isinstance(out, tuple) else (out,)
            close(value(*parts), x_thd, bench_attention.CLOSE[format])

        size = sum(x.nbytes for x in (x_thd, *codes))
        for suffix, impl in impls(op):
            make = partial(partial, run, impl=impl)
            entries[label(format) + suffix] = Entry(make, check, size)
    return bench.race(name, entries)


def evict(bench) -> Cells:
    """Importance from a window of queries, who goes, and closing the gaps."""
    for shape in bench.scale.evicted:
        for op in bench_evict.OPS:
            yield cell(f"{op} {shape}", drop, bench, op, shape)


def drop(bench, name: str, op: str, shape: bench_evict.Shape) -> dict:
    ours, rival = bench_evict.OPS[op]
    size = bench_evict.nbytes(op, shape, DTYPE)
    scores = op == "key_scores"
    flops = 2 * shape.n * shape.h * shape.g * shape.w * shape.s * shape.d if scores else 0

    def entry(run: Callable) -> Entry:
        args = bench_evict.inputs(op, shape, DTYPE, bench.device)
        if op == "compact_kv":
            source_nh, target_nh, pages = args
            head = torch.arange(shape.h, device=bench.device)

            def at(slot_nh: torch.Tensor) -> torch.Tensor:
                return pages.k[slot_nh // pages.page_size, head, slot_nh % pages.page_size]

            pages.k.random_(0, 256)
            expected = at(source_nh)

            def check(_: None) -> None:
                assert torch.equal(at(target_nh), expected), "moved something else"

            return Entry(lambda: partial(run, *args), check, size)
        expected = first(ours(*args, impl="reference"))

        def check(out: Any) -> None:
            if scores:
                close(first(out), expected, 0.02)
            else:
                assert torch.equal(*(x.long().sort(-1).values for x in (first(out), expected)))

        return Entry(lambda: partial(run, *args), check, size, flops)

    entries = {"kvtools" + x: entry(partial(ours, impl=impl)) for x, impl in impls(op)}
    return bench.race(name, entries | {rival.__name__: entry(rival)})


def sampling(bench) -> Cells:
    """One token per row from float32 logits."""
    for shape in bench.scale.logits:
        for name, filters in bench_sampling.FILTERS.items():
            yield cell(f"{shape} {name}", draw, bench, shape, filters)


def draw(bench, name: str, shape: bench_sampling.Shape, filters: dict) -> dict:
    args = bench_sampling.inputs(shape, torch.float32, bench.device)
    exact = sample(*args, **filters, impl="reference")[0]

    def same(out: Any) -> None:
        assert torch.equal(out[0], exact), "draws other tokens than the reference"

    def kept(token_b: torch.Tensor) -> None:
        """Others' noise is their own, but what they draw must have passed the filters."""
        x_bv, token_b1 = args[0], token_b.view(-1, 1).long()
        if filters["temperature"] == 0:
            assert torch.equal(token_b1[:, 0], exact), "is not greedy"
            return
        z_bv = x_bv / filters["temperature"]
        above_bv = z_bv > z_bv.gather(1, token_b1)
        top_k = filters.get("top_k", shape.v)
        assert (above_bv.sum(1) < top_k).all(), "drew beyond top_k"
        least_b1 = z_bv.topk(min(top_k, shape.v), 1).values[:, -1:]
        p_bv = z_bv.masked_fill(z_bv < least_b1, -torch.inf).softmax(1)
        assert ((p_bv * above_bv).sum(1) < filters.get("top_p", 1) + 1e-3).all(), "beyond top_p"

    size = bench_sampling.nbytes(shape, torch.float32)
    ours = partial(partial, sample, *args, **filters)
    entries = {
        "kvtools" + x: Entry(partial(ours, impl=impl), same, size) for x, impl in impls("sample")
    }
    for rival, make in gpu_rivals.SAMPLING.items():
        package = gpu_rivals.package(rival)
        entries[rival] = Entry(partial(make, args, filters), kept, size, package=package)
    return bench.race(name, entries)


def scoring(bench) -> Cells:
    """A reward head at step ends; log-probabilities of given tokens."""
    for shape in bench.scale.scored:
        for op in ("step_scores", "token_logprobs"):
            yield cell(f"{op} {shape}", score, bench, op, shape)


def score(bench, name: str, op: str, shape: bench_scoring.Shape) -> dict:
    args = bench_scoring.inputs(shape, DTYPE, bench.device)
    hidden_tm, weight_vm, step_s, cu_steps, target_t = args
    hidden_tm *= shape.m**-0.5  # logits of a usual size
    steps = op == "step_scores"
    if steps:
        head_km = weight_vm[[10, 12]]
        run = partial(step_scores, hidden_tm, step_s, cu_steps, head_km)
        flops, place = 4 * shape.s * shape.m, 2
        rivals = {x: getattr(bench_scoring, x) for x in ("full_logits", "gather_matmul")}
    else:
        run = partial(token_logprobs, hidden_tm, weight_vm, target_t)
        flops, place = 2 * shape.t * shape.m * shape.v, 0
        rivals = {"log_softmax": bench_scoring.log_softmax, "chunked": gpu_rivals.chunked_logprobs,
                  "cut-cross-entropy": gpu_rivals.cut_cross_entropy}  # fmt: skip
    exact = run(impl="reference")[place]

    def check(out: Any) -> None:
        close((out[place] if isinstance(out, tuple) else out).flatten(), exact, 0.02)

    size = bench_scoring.nbytes(op, shape, DTYPE)
    entries = {
        "kvtools" + x: Entry(partial(partial, run, impl=impl), check, size, flops)
        for x, impl in impls(op)
    }
    for rival, compute in rivals.items():
        package = gpu_rivals.package(rival)
        entries[rival] = Entry(partial(partial, compute, *args), check, size, flops, package)
    return bench.race(name, entries)


def end_to_end(bench) -> Cells:
    """Steps of a model with random weights, all layers and the sampler; and whole `generate`s."""
    from bench.bench_end_to_end import RIVALS
    from bench.cpu import CONFIGS

    for n, prompt in bench.scale.decoded:
        yield cell(f"decode {n} x {prompt}", decode, bench, n, prompt)
    n, prompt, new = bench.scale.generated
    for name in RIVALS:
        yield cell(f"generate {n} x {prompt}, {new} new, {name}", generate, bench,
                   CONFIGS.get(name), n, prompt, new)  # fmt: skip


@cache
def llm(device: str, sizes: tuple) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**dict(sizes)), dtype=DTYPE)
    model.generation_config.eos_token_id = None
    return model.eval()


def decode(bench, name: str, n: int, prompt: int) -> dict:
    from bench.bench_end_to_end import RIVALS, STEPS
    from bench.cpu import OURS
    from kvtools.quality import elements

    model = llm(bench.device, tuple(bench.scale.model.items()))
    weights = sum(x.numel() for x in model.parameters())
    per_token = elements(model) * DTYPE.itemsize
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    plain, made = RIVALS["plain"](model, ids), {}
    expected = plain.next(ids[0])

    def make(contender: str) -> Callable[[], Any]:
        rival = plain
        if contender != "plain":
            rival = RIVALS[contender](model, ids)
            close(rival.next(ids[0]), expected, 0.05 if contender == OURS else 0.5)
        elif n * prompt * per_token > gpu_rivals.LIMIT:
            raise Skip(f"its cache would take {n * prompt * per_token / 2**30:.0f} GiB")
        made[contender] = partial(rival.rows(n), STEPS)
        return made[contender]

    entries = {}
    for contender in sorted(RIVALS, key=lambda x: x != OURS):
        entries[contender] = Entry(
            partial(make, contender), lambda out: None,
            weights * DTYPE.itemsize + (prompt + n * STEPS) * per_token, 2 * weights * n,
            package="transformers" if contender == "plain" else "", graph=False, per=STEPS,
        )  # fmt: skip
    rows = bench.race(name, entries)
    for contender, row in rows.items():
        if "ms" in row:
            row["tokens/s"] = 1e3 * n / row["ms"]
            row |= profiled(made[contender], STEPS)
    return rows


def profiled(run: Callable[[], Any], steps: int) -> dict:
    """Of a step: milliseconds of the host without its waits for the device, and with those of the
    profiler; of all kernels; and how many were launched."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
    kernels, launches, waits = 0.0, 0, 0.0
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            kernels += event.device_time_total
            launches += 1
        elif event.name.startswith("cuda") and event.name.endswith("Synchronize"):
            waits += event.cpu_time_total
    return {"host ms": (1e3 * seconds - waits / 1e3) / steps, "kernel ms": kernels / 1e3 / steps,
            "launches": launches / steps}  # fmt: skip


def tune(bench) -> Cells:
    """Tile sizes of our attention kernel, the first those that it takes; nothing shared."""
    (name, heads), (n, s) = bench.scale.heads[0], bench.scale.long[0]
    for format in ("none", "int4"):
        shape = Shape(n, 0, s, *heads)
        yield cell(f"{name} {n} x {s} {format}", try_sizes, bench, shape, format)


def try_sizes(bench, name: str, shape: Shape, format: str) -> dict:
    from bench.tune import FEW, KINDS
    from kvtools.kernels import attention

    step = bench_attention.inputs(shape, DTYPE, bench.device)
    kind = next(kind for kind, found in KINDS.items() if found == (DTYPE, format))
    key = f"sm_{attention.capability()} {kind} {attention.block_d(shape.d)}"

    def make(sizes: dict[str, int] | None) -> Callable[[], torch.Tensor]:
        position, pages, plan = step.pages(format)
        q_thd = step.q.squeeze(2)

        def run() -> torch.Tensor:
            attention.TUNED.pop(key, None)
            if sizes:
                attention.TUNED[key] = sizes
            return tree_attention(q_thd, position, pages, plan, impl=IMPL)[0]

        return run

    size, flops = bench_attention.nbytes(shape, DTYPE, format), bench_attention.flops(shape)
    check = partial(bench_attention.check, step, format=format)
    tried = {"as it is": None} | {",".join(map(str, x.values())): x for x in FEW}
    entries = {name: Entry(partial(make, x), check, size, flops) for name, x in tried.items()}
    rows = bench.race(name, entries)
    attention.TUNED.pop(key, None)
    return rows


def generate(bench, name: str, config: Any, n: int, prompt: int, new: int) -> dict:
    from bench.cpu import once

    model = llm(bench.device, tuple(bench.scale.model.items()))
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    once(model, ids[:16], config, n, 2)  # the first pass is slow, whoever makes it
    return once(model, ids, config, n, new)


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def close(out: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    """Raise unless `out` is within that share of the norm."""
    error = (out.float() - exact.float()).norm() / exact.float().norm()
    assert error < most, f"differs by {error:.3f} of the norm"


PARTS = {
    "smoke": smoke, "tests": tests, "rates": rates, "attention": attention, "tree": tree,
    "quant": quant, "evict": evict, "sampling": sampling, "scoring": scoring,
    "end_to_end": end_to_end, "tune": tune, "sanitizers": sanitizers,
}  # fmt: skip
