"""The parts of bench.gpu that time kernels: who runs in a cell, and what is expected of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import (
    bench_attention,
    bench_evict,
    bench_quant,
    bench_sampling,
    bench_scoring,
    gpu_rivals,
)
from bench.bench_attention import Shape, Tree
from bench.timing import Skip
from kvtools import ops
from kvtools.ops.attention import tree_attention
from kvtools.ops.quant import append_kv, dequantize_kv, quantize_kv
from kvtools.ops.sampling import sample
from kvtools.ops.scoring import step_scores, token_logprobs

IMPL = "triton"  # ours; interpreted in dry runs
IN_CPP = ", CUDA C++"  # ours by impl="cuda"
DTYPE = torch.bfloat16
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


def impls(op: str) -> list[tuple[str, str]]:
    """What to add to the names of our contenders, and their implementations of `op`."""
    return [("", IMPL), *[(IN_CPP, "cuda")] * (op in ops.IN_CUDA)]


def cell(name: str, measure: Callable, bench, *args: Any, **options: Any) -> tuple:
    return name, partial(measure, bench, name, *args, **options)


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
    key = f"{attention.architecture()} {kind} {attention.block_d(shape.d)}"

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


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def close(out: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    """Raise unless `out` is within that share of the norm."""
    error = (out.float() - exact.float()).norm() / exact.float().norm()
    assert error < most, f"differs by {error:.3f} of the norm"
