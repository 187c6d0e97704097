"""kvtools' attention inside vLLM against vLLM's own, on a CPU: python -m bench.engines.

Runs where vLLM is installed (`make bench-engines`), each part in a process of one thread. The
attention of a decode step is one layer's, of both over the same tokens in turns; they must agree,
and beside them kvtools' over packed caches. A whole engine is timed beside it. Seconds are the
processor's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.targets import Targets
from bench.timing import against_floor, interleave, name_of, print_rows, summary
from kvtools import results
from kvtools.cli import demo
from kvtools.ops.attention import tree_attention
from kvtools.ops.quant import append_kv, width
from kvtools.serve.steps import step_from_block_table

HEADS, KV_HEADS, D, BLOCK = 9, 3, 64, 32  # SmolLM2-135M's
OWN = 32  # tokens that each sample has
CASES = {
    "32 over 1,000": (32, 1000), "32 over 4,000": (32, 4000), "128 over 1,000": (128, 1000),
    "128 over 4,000": (128, 4000), "nothing shared": (32, 0),
}  # fmt: skip
ALONE = 1000  # tokens of a row that shares nothing
DTYPES = (torch.float32, torch.bfloat16)
PACKED = ("int8", "int4")  # caches of a bfloat16 model
COPIED, PRODUCT = 2**28, 1024  # bytes; rows and columns
SAMPLES, PROMPT, NEW = 32, 1000, 24  # of a whole engine
# How many times as fast as vLLM's own; and how much slower at most.
WANTED = {"32 over 1,000": {torch.float32: 1.5, torch.bfloat16: 1.3}} | {
    "128 over 4,000": dict.fromkeys(DTYPES, 4.0)
}
SLOWER, HOST_MS, REQUESTS = 1.1, 0.5, 256
BARE = "vllm without the plugin"
UNASKED = 0.9  # of the tokens/s that vLLM has without the plugin


def cpu_clock(run: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of the processor, so that what else runs on the machine takes none."""
    begin = time.process_time()
    run()
    seconds = time.process_time() - begin
    return lambda: seconds


def tables(rows: int, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block table and lengths as vLLM makes them: full blocks of a prompt are shared."""
    length = (shared or ALONE) + OWN
    width = -(-length // BLOCK)
    table = torch.arange(rows * width, dtype=torch.int32).view(rows, width)
    table[:, : shared // BLOCK] = table[0, : shared // BLOCK].clone()
    return table, torch.full((rows,), length, dtype=torch.int32)


def content(dtype: torch.dtype, format: str = "") -> int:
    """Bytes that a token's key and value take in each head."""
    return 2 * width(format, D) + 4 if format else 2 * D * dtype.itemsize


def layer(rows: int, shared: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """One layer's attention of a decode step, by either."""
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from kvtools.serve.vllm import pages_of

    torch.manual_seed(0)
    table, lens = tables(rows, shared)
    start = torch.arange(rows + 1, dtype=torch.int32)
    isa = _get_attn_isa(dtype, BLOCK, D, "auto")
    slots = torch.arange(int(table.max() + 1) * BLOCK)
    k, v = torch.randn(2, len(slots), KV_HEADS, D, dtype=dtype)
    query = torch.randn(rows, HEADS, D, dtype=dtype)
    shape = len(slots) // BLOCK, KV_HEADS, BLOCK, 2 * D
    step = step_from_block_table(table, lens, start, BLOCK)
    key_cache, value_cache = (
        torch.empty(shape, dtype=dtype).view(*shape[:2], 2 * BLOCK, D).chunk(2, dim=2)
    )
    scales = dict(k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa, **scales)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=rows, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=D, seq_lens=lens,
        dtype=dtype, query_start_loc=start, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip

    def own() -> torch.Tensor:
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=output,
            query_start_loc=start, seq_lens=lens, scale=D**-0.5, causal=True, alibi_slopes=None,
            sliding_window=-1, block_table=table, softcap=0, scheduler_metadata=metadata,
            s_aux=None, dynamic_causal=None, **scales,
        )  # fmt: skip
        return output

    def ours(format: str = "") -> Callable[[], torch.Tensor]:
        cache = torch.empty(*shape[:-1], content(dtype, format), dtype=torch.uint8)
        pages = pages_of(cache if format else cache.view(dtype), format or "none", D)
        append_kv(k, v, slots, pages)

        def run() -> torch.Tensor:
            output = torch.empty_like(query)
            output[:], _ = tree_attention(query, step.position_t, pages, step.plan)
            return output

        return run

    packed = PACKED if dtype == torch.bfloat16 else ()
    return {"kvtools": ours(), "vllm": own} | {f"kvtools {x}": ours(x) for x in packed}


def attention(rounds: int) -> dict:
    cells: dict[str, dict] = {}
    source = torch.randn(COPIED // 4)
    copied = torch.empty_like(source)
    factors = {x: torch.randn(2, PRODUCT, PRODUCT).to(x) for x in DTYPES}
    for name, (rows, shared) in CASES.items():
        for dtype in DTYPES:
            runs = layer(rows, shared, dtype)
            a, b = (run().float() for run in list(runs.values())[:2])
            least = 1e-4 if dtype == torch.float32 else 2e-2
            if not (a - b).abs().max() < least:
                raise RuntimeError(f"{name}, {name_of(dtype)}: the two do not agree")
            # No attention is faster than these; in the same rounds, as a processor's pace changes.
            runs["copy"] = lambda: copied.copy_(source)
            runs["product"] = lambda: torch.mm(*factors[dtype])  # noqa: B023
            found = summary(interleave(runs, rounds, cpu_clock))
            copy = 2 * COPIED / found.pop("copy")["ms"] / 1e6
            product = 2 * PRODUCT**3 / found.pop("product")["ms"] / 1e9
            # What is shared is read once; what an engine shares is whole blocks.
            together = shared // BLOCK * BLOCK
            length = (shared or ALONE) + OWN
            tokens = together + rows * (length - together)
            for kind, row in found.items():
                size = content(dtype, kind.partition(" ")[2])
                flops = 4 * rows * HEADS * D * length
                against_floor(row, copy, product, tokens * KV_HEADS * size, flops)
            cells[f"{name}, {name_of(dtype)}"] = found
    return cells


def host(rounds: int) -> dict:
    """What a step costs before its first layer: the plan and positions of so many requests."""
    cells = {}
    start = torch.arange(REQUESTS + 1, dtype=torch.int32)
    for name, shared in (("1,000 shared", 1000), ("4,000 shared", 4000), ("nothing shared", 0)):
        table, lens = tables(REQUESTS, shared)
        blocks = int(table.max() + 1)
        runs = {"step": lambda: step_from_block_table(table, lens, start, BLOCK, blocks=blocks)}  # noqa: B023
        cells[name] = summary(interleave(runs, 20 * rounds, cpu_clock))["step"]
    return cells


def engine(rounds: int) -> dict:
    """Tokens a second of a whole engine, by the environment's attention: samples of one prompt that
    it has seen, so that hardly anything but decoding is timed. Its process does all the work."""
    from vllm import LLM, SamplingParams

    from kvtools import models

    llm = LLM(
        str(models.smollm2()), dtype=os.environ["BENCH_DTYPE"], enforce_eager=True, seed=0,
        kv_cache_dtype=os.environ["BENCH_CACHE"], skip_tokenizer_init=True, max_model_len=2048,
        block_size=BLOCK, max_num_seqs=SAMPLES,
    )  # fmt: skip
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    names = {type(x.impl).__module__.split(".")[0] for x in layers}
    prompt = [{"prompt_token_ids": torch.randint(3, 40000, (PROMPT,)).tolist()}]

    def run() -> int:
        params = SamplingParams(n=SAMPLES, max_tokens=NEW, ignore_eos=True, detokenize=False)
        (out,) = llm.generate(prompt, params, use_tqdm=False)
        return sum(len(x.token_ids) for x in out.outputs)

    run()
    rates = []
    for _ in range(rounds):
        begin = time.process_time()
        tokens = run()
        rates.append(tokens / (time.process_time() - begin))
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return {"rates": rates, "attention": names.pop(), "blocks": blocks}


PARTS = {"attention": attention, "host": host, "engine": engine}


def apart(part: str, rounds: int, **env: str) -> dict:
    """A part in a process of its own, of one thread."""
    env = {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    } | env  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.engines", "--part", part, "--rounds", str(rounds)],
        env={k: v for k, v in os.environ.items() if k != "KVTOOLS_VLLM"} | env,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"bench.engines: {part} failed\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def engines(rounds: int) -> dict:
    """Each twice, in turns, since a machine's pace changes in minutes."""
    cells: dict[str, dict] = {}
    for dtype in DTYPES:
        names = ["kvtools", "vllm"]
        names += [f"kvtools {x}" for x in PACKED] if dtype == torch.bfloat16 else [BARE]
        rates: dict[str, list[float]] = {x: [] for x in names}
        blocks = {}
        for name in (*names, *reversed(names)):
            who, _, cache = name.partition(" ")
            env = {"VLLM_PLUGINS": ""} if name == BARE else {}
            env |= {"KVTOOLS_VLLM": str(+(who == "kvtools")), "BENCH_DTYPE": name_of(dtype)}
            env["BENCH_CACHE"] = f"{cache}_per_token_head" if cache in PACKED else "auto"
            row = apart("engine", rounds, **env)
            if row["attention"] != who:
                raise RuntimeError(f"the engine of {name} ran the attention of {row['attention']}")
            rates[name] += row["rates"]
            blocks[name] = row["blocks"]
        cells[name_of(dtype)] = {
            x: {"tokens/s": sorted(y)[len(y) // 2], "blocks": blocks[x]} for x, y in rates.items()
        }
    return cells


def targets(cells: dict[str, dict]) -> Targets:
    found = Targets()
    rows = cells.get("attention", {})
    for name in CASES:
        for dtype in DTYPES:
            row = rows.get(title := f"{name}, {name_of(dtype)}")
            ratio = None if row is None else row["vllm"]["ratio"]
            if name in WANTED:
                found.add(f"{title}: times as fast", ratio, WANTED[name][dtype], least=True)
            elif name == "nothing shared":
                found.add(f"{title}: time over vLLM's", ratio and 1 / ratio, SLOWER)
    slowest = max((x["ms"] for x in cells.get("host", {}).values()), default=None)
    found.add(f"host: ms a step of {REQUESTS} requests", slowest, HOST_MS)
    whole = cells.get("tokens/s", {}).get("float32")
    share = whole and whole["vllm"]["tokens/s"] / whole[BARE]["tokens/s"]
    found.add("not asked for: tokens/s over those without the plugin", share, UNASKED, least=True)
    return found


def table(cells: dict[str, dict]) -> list[list[str]]:
    """A line for each case; the heads first."""
    kinds = ("kvtools", "vLLM", "times")
    heads = [f"{name_of(x)}: {y}" for x in DTYPES for y in kinds]
    lines = [["", *heads, *(f"{x}: kvtools" for x in PACKED)]]
    packed = [f"kvtools {x}" for x in PACKED]
    for name in CASES:
        line = [name]
        for dtype in DTYPES:
            row = cells["attention"][f"{name}, {name_of(dtype)}"]
            ms = {x: f"{y['ms']:.2f} ms ({y['of_floor']:.0%})" for x, y in row.items()}
            line += [ms["kvtools"], ms["vllm"], f"{row['vllm']['ratio']:.2f}"]
        lines.append([*line, *(ms[x] for x in packed)])
    whole = [cells["tokens/s"][name_of(x)] for x in DTYPES]
    for name, key, unit in (("whole engine", "tokens/s", " tokens/s"), ("blocks", "blocks", "")):
        line = [name]
        for row in whole:
            ours, own = (row[x][key] for x in ("kvtools", "vllm"))
            line += [f"{ours:,.0f}{unit}", f"{own:,.0f}{unit}", f"{ours / own:.2f}"]
        lines.append([*line, *(f"{whole[1][x][key]:,.0f}{unit}" for x in packed)])
    return lines


def caption(result: dict[str, Any]) -> str:
    where, cells = result["where"], result["cells"]
    host = max(x["ms"] for x in cells["host"].values())
    whole = cells["tokens/s"]["float32"]
    most = [
        f"{row['vllm']['ratio'] / row['kvtools']['of_floor']:.2f} ({title})"
        for title, row in cells["attention"].items() if title.partition(", ")[0] in WANTED
    ]  # fmt: skip
    return (
        f"Attention of one layer of {result['model']} in a decode step: samples over shared tokens "
        f"and {OWN} of their own; nothing shared: 32 rows of {ALONE + OWN:,}. Blocks of {BLOCK}. "
        "In brackets, how much of its time the floor would take: its operations at the rate of a "
        "matrix product of that dtype, or its bytes at that of a copy; at the floor it would "
        f"be so many times as fast as vLLM: {', '.join(most)}. "
        "int8 and int4: packed caches of the bfloat16 model, "
        f"{' and '.join(str(content(DTYPES[1], x)) for x in PACKED)} bytes a token and head "
        f"instead of {content(DTYPES[1])}. A whole engine: {SAMPLES} samples of {NEW} tokens over "
        f"{PROMPT:,}; with kvtools installed and not asked for, vLLM "
        f"has {whole['vllm']['tokens/s'] / whole[BARE]['tokens/s']:.0%} of the tokens/s that it "
        "has without. Blocks: what vLLM makes of 1 GiB. Processor seconds of one thread. Plan and "
        f"positions of {REQUESTS} requests: {host:.2f} ms a step. {where['device']}, vLLM "
        f"{where['vllm']}, torch {where['torch']}, commit {where['commit']}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.engines", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="results")
    parser.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite the table in this file"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each case")
    parser.add_argument("--part", choices=PARTS, help="run one part here and print it")
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(PARTS[args.part](args.rounds)))
        return 0
    if not args.json:
        parser.error("--json PATH is needed")
    names = packages_distributions().get("vllm")
    if not names:
        parser.error("vLLM is not installed here: run make bench-engines")
    console = Console()
    results.claim(args.json, {"model": "SmolLM2-135M-Instruct"}, ["cells", "targets"])
    where = demo.where("cpu") | {"threads": 1, "vllm": version(names[0])} | demo.commit()
    cells: dict[str, dict] = {}
    parts = {
        "attention": lambda: apart("attention", args.rounds),
        "host": lambda: apart("host", args.rounds),
        "tokens/s": lambda: engines(max(1, args.rounds // 3)),
    }
    for name, measure in parts.items():
        begin = time.perf_counter()
        cells[name] = measure()
        console.rule(f"{name}: {time.perf_counter() - begin:.0f} s")
        print_rows(console, name, cells[name])
        found: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "where": where}
        found |= {"cells": cells, "targets": targets(cells)}
        results.write(args.json, json.dumps(found, indent=1) + "\n")
    targets(cells).show(console)
    if args.readme:
        demo.rewrite(args.readme, "engines", table(cells), caption(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
