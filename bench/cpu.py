"""What kvtools gains on a CPU, as ratios from one run: python -m bench.cpu --json OUT.

Rivals are timed round by round, so that what else the machine does disturbs all alike; ratios are
medians over the rounds. JSON is written after every part; parts that --only leaves out are kept if
they are of the same commit.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from bench import bench_attention, bench_sampling
from bench.bench_end_to_end import CONFIGS, OURS, RIVALS, SAMPLING, prompt_of
from bench.cpu_report import caption, table, targets
from bench.timing import against_floor, attempt, interleave, keep, name_of, summary
from kvtools import CacheConfig, KVCache, Rollouts, models
from kvtools.cli import demo
from kvtools.ops import Op
from kvtools.ops.quant import FORMATS
from kvtools.quality import Journal, elements, head_size

DTYPES = (torch.float32, torch.bfloat16)
LIMIT = 6 * 2**30  # bytes that a plain cache may take in the sweep
Load = Callable[[torch.dtype], tuple[Any, list[int]]]  # a model, and tokens of a text


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    copied: int = 2**28  # bytes
    product: int = 2048  # rows and columns
    shared: Any = bench_attention.SHAPES[0]
    alone: Any = bench_attention.SHAPES[1]
    long: Any = bench_attention.Shape(32, 0, 4096, 3, 3, 64)
    logits: Any = bench_sampling.SHAPES[-1]
    rounds: int = 15
    rows: int = 32
    prompt: int = 1024
    new: int = 128
    own: int = 4096  # tokens of each row, of which none is shared
    own_rounds: int = 5
    few: tuple[int, int] = (4, 8)  # rows and new tokens of the slow rivals
    sweep_rows: tuple[int, ...] = (1, 4, 16, 64, 256)
    sweep_prompts: tuple[int, ...] = (128, 1024, 4096)
    sweep_rounds: int = 3


def floor(scale: Scale, cells: dict, load: Load) -> dict:
    """What this machine does at best: a copy, bytes read and written, and matrix products."""
    source = torch.rand(scale.copied // 4)
    copied = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: copied.copy_(source)}
    for dtype in DTYPES:
        a, b = torch.randn(2, scale.product, scale.product).to(dtype)
        runs[name_of(dtype)] = partial(torch.mm, a, b)
    rows = summary(interleave(runs, scale.rounds))
    found = {"copy GB/s": 2 * scale.copied / rows.pop("copy")["ms"] / 1e6}
    for name, row in rows.items():
        found[f"{name} GFLOP/s"] = 2 * scale.product**3 / row["ms"] / 1e6
    return found


def rates(cells: dict) -> tuple[float, float]:
    """GB/s of a copy, TFLOP/s of a float32 product."""
    return cells["floor"]["copy GB/s"], cells["floor"]["float32 GFLOP/s"] / 1e3


@torch.inference_mode()
def attention(scale: Scale, cells: dict, load: Load) -> dict:
    """A decode step's attention of one layer. Each run follows others that read hundreds of MB, so
    caches are cold."""
    formats = {
        "cpu" if format == "none" else f"cpu {format}": partial(bench_attention.tree, format=format)
        for format in FORMATS
    }
    found: dict[str, dict] = {}
    for name, rivals in (("shared", bench_attention.RIVALS), ("alone", bench_attention.RIVALS),
                         ("long", {})):  # fmt: skip
        shape = getattr(scale, name)
        found[name] = {}
        for dtype in DTYPES:
            args = bench_attention.inputs(shape, dtype, "cpu")
            runs = formats | {x: run for x, run in rivals.items() if x not in formats}
            stored = {x: run.keywords["format"] for x, run in formats.items()}
            for x, run in runs.items():
                bench_attention.check(args, run(args), stored.get(x, "none"))
            rows = summary(interleave({x: partial(run, args) for x, run in runs.items()},
                                      scale.rounds))  # fmt: skip
            for x, row in rows.items():
                nbytes = bench_attention.nbytes(shape, dtype, stored.get(x, "none"))
                against_floor(row, *rates(cells), nbytes, bench_attention.flops(shape))
            found[name][name_of(dtype)] = rows
    return found


@torch.inference_mode()
def sample(scale: Scale, cells: dict, load: Load) -> dict:
    """One token per row from float32 logits."""
    args = bench_sampling.inputs(scale.logits, torch.float32, "cpu")
    found = {}
    for name, filters in bench_sampling.FILTERS.items():
        runs = {x: partial(bench_sampling.RIVALS[x], *args, **filters)
                for x in ("cpu", "transformers", "reference")}  # fmt: skip
        found[name] = summary(interleave(runs, scale.rounds))
        for row in found[name].values():
            nbytes = bench_sampling.nbytes(scale.logits, torch.float32)
            against_floor(row, *rates(cells), nbytes)
    return found


def generate(scale: Scale, cells: dict, load: Load) -> dict:
    """`model.generate` with our caches and without, once each, the prompt's prefill included; and
    on fewer rows and tokens those that are slow."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        model, ids = load(dtype)
        once(model, ids[:16], None, scale.rows, 2)  # the first pass is slow, whoever makes it
        found[name_of(dtype)] = {
            name: once(model, ids[: scale.prompt], config, scale.rows, scale.new)
            for name, config in (CONFIGS | {"plain": None}).items()
        }
    model, ids = load(torch.float32)
    rows = {
        name: once(model, ids[: scale.prompt], config, *scale.few)
        for name, config in (CONFIGS | {"plain": None}).items()
    }
    for backend in ("quanto", "hqq"):
        options = {"cache_implementation": "quantized",
                   "cache_config": {"backend": backend, "nbits": 4}}  # fmt: skip

        def quantized(options: dict = options) -> dict:
            once(model, ids[:16], None, 2, 2, **options)  # quanto compiles its kernels at first
            row = once(model, ids[: scale.prompt], None, *scale.few, **options)
            del row["memory"]  # counts what is not quantised alone
            return row

        rows[f"{backend} int4"] = attempt(quantized)
    rows["generate_batch"] = attempt(lambda: batched(model, ids[: scale.prompt], *scale.few))
    found["few"] = rows
    return found


def once(
    model: Any, ids: list[int], config: CacheConfig | None, n: int, new: int, **options: Any
) -> dict:
    """One `generate`: tokens per second in all, a decode step, bytes of the cache at its end."""
    prompt = torch.tensor([ids], device=model.device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    torch.manual_seed(0)
    _, row = models.measure(
        model, inputs, config, do_sample=True, top_p=1.0, **SAMPLING, max_new_tokens=new,
        num_return_sequences=n, pad_token_id=0, **options,
    )  # fmt: skip
    seconds = row["prefill_s"] + n * (new - 1) / row["tokens_per_s"]
    return {
        "rows": n, "new": new, "prefill_s": row["prefill_s"], "ms": 1e3 * n / row["tokens_per_s"],
        "tokens_per_s": n * new / seconds, "memory": row["memory"]["total"],
    }  # fmt: skip


def batched(model: Any, ids: list[int], n: int, new: int) -> dict:
    """transformers' continuous batching, its start included."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, **SAMPLING, max_new_tokens=new, num_return_sequences=n, eos_token_id=-1,
        pad_token_id=0,
    )  # fmt: skip
    begin = time.perf_counter()
    out = model.generate_batch([ids], generation_config=config)
    seconds = time.perf_counter() - begin
    tokens = sum(len(row.generated_tokens) for row in out.values())
    if tokens != n * new:
        raise RuntimeError(f"{tokens} tokens came, not {n * new}")
    return {"rows": n, "new": new, "tokens_per_s": tokens / seconds}


def step(scale: Scale, cells: dict, load: Load, steps: int = 4) -> dict:
    """A step of `Rollouts.generate` beside the model's own forward of as many tokens without
    context; and what of the difference operators do not explain."""
    found = {}
    for dtype in DTYPES:
        model, ids = load(dtype)
        rollouts = Rollouts(model, eos_token_id=(), **SAMPLING)
        rollouts.prefill([ids[: scale.prompt]], scale.rows)
        rollouts.generate(16)
        tokens = torch.tensor(ids[: scale.rows])[:, None]
        spent = []

        def forward(model: Any = model, tokens: torch.Tensor = tokens) -> None:
            with torch.no_grad():
                for _ in range(steps):
                    model(input_ids=tokens, use_cache=False)

        def decode(rollouts: Rollouts = rollouts, spent: list = spent) -> None:
            with clocked() as seconds:
                rollouts.generate(steps)
            spent.append(seconds)

        times = interleave({"forward": forward, "step": decode}, scale.rounds)
        ops = {name: np.array([x[name] for x in spent[1:]]) for name in spent[-1]}
        rows = summary(times, steps) | {
            name: {"ms": float(np.median(x)) * 1e3 / steps} for name, x in ops.items()
        }
        host = times["step"] - times["forward"] - sum(ops.values())
        found[name_of(dtype)] = rows | {"host": float(np.median(host / times["forward"]))}
    return found


def own(scale: Scale, cells: dict, load: Load, steps: int = 2) -> dict:
    """Steps of `Rollouts.generate` where rows have long continuations, of which no model has seen
    anything: random keys and values are written to where theirs would lie."""
    found = {}
    for dtype in DTYPES:
        model, ids = load(dtype)
        runs = {}
        for name in (OURS, "kvtools balanced"):
            rollouts = Rollouts(model, CONFIGS[name], eos_token_id=(), **SAMPLING)
            rollouts.prefill([ids[:16]], scale.rows)
            rollouts.append([[ids[0]] * (scale.own + 1)] * scale.rows)  # the last is not seen yet
            write(model, rollouts.kv, scale.own)
            runs[name] = partial(rollouts.generate, steps)
        rows = summary(interleave(runs, scale.own_rounds), steps)
        for row in rows.values():
            row["tokens_per_s"] = 1e3 * scale.rows / row["ms"]
        found[name_of(dtype)] = rows
    return found


@torch.inference_mode()
def write(model: Any, kv: KVCache, count: int) -> None:
    """Give each row `count` tokens of random keys and values, whose attention nobody asks for."""
    config = model.config
    d, tokens = head_size(config), kv.rows * count
    q = torch.zeros(1, config.num_attention_heads, d, dtype=model.dtype)
    k = torch.randn(tokens, config.num_key_value_heads, d).to(q.dtype)
    with mock.patch("kvtools.cache.tree_attention", lambda q, *args, **options: (q, None)):
        kv.extend(np.full(kv.rows, count))
        for layer in range(config.num_hidden_layers):
            kv.attend(layer, q.expand(tokens, -1, -1), k, k)


@contextmanager
def clocked() -> Iterator[Counter]:
    """Seconds that operators take, by name."""
    seconds: Counter = Counter()
    call = Op.__call__

    def timed(op: Op, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(op, *args)
        finally:
            seconds[op.name] += time.perf_counter() - begin

    with mock.patch.object(Op, "__call__", timed):
        yield seconds


def sweep(scale: Scale, cells: dict, load: Load) -> dict:
    """Decoding tokens per second by rows and prompt, float32; and one row against `generate`."""
    model, ids = load(torch.float32)
    found: dict[str, Any] = {"rows": list(scale.sweep_rows), "prompts": {}, "one row": {}}
    per_token = elements(model) * 4
    for length in scale.sweep_prompts:
        prompt = ids[:length]
        made = {name: make(model, prompt) for name, make in RIVALS.items()}
        cells_n = found["prompts"][str(length)] = {}
        for n in scale.sweep_rows:
            steps, size = max(1, 16 // n), n * length * per_token
            skipped = {"plain"} if size > LIMIT else set()
            runs = {
                name: partial(rival.rows(n), steps)
                for name, rival in made.items() if name not in skipped
            }  # fmt: skip
            rows = summary(interleave(runs, scale.sweep_rounds), steps)
            for row in rows.values():
                row["tokens_per_s"] = 1e3 * n / row["ms"]
            for name in skipped:
                rows[name] = {"skipped": f"its cache would take {size / 2**30:.1f} GiB"}
            cells_n[str(n)] = rows
        if length <= scale.prompt:
            rounds = [
                [once(model, prompt, config, 1, 24)["ms"] for config in (CONFIGS[OURS], None)]
                for _ in range(scale.sweep_rounds)
            ]
            ours, plain = np.array(rounds).T
            found["one row"][str(length)] = {
                "ms": float(np.median(ours)), "generate_ms": float(np.median(plain)),
                "ratio": float(np.median(plain / ours)),
            }  # fmt: skip
    return found


PARTS = {
    "floor": floor, "attention": attention, "sample": sample, "generate": generate, "step": step,
    "own": own, "sweep": sweep,
}  # fmt: skip


@cache
def load(dtype: torch.dtype) -> tuple[Any, list[int]]:
    """SmolLM2 that never ends a row, and a text."""
    model, tokenizer = models.load("smollm2", dtype)
    model.generation_config.eos_token_id = None
    return model, prompt_of(tokenizer, max(Scale.sweep_prompts))


def run(parts: list[str], scale: Scale, load: Load, journal: Journal, console: Console) -> None:
    """Measure, print and keep these parts; the floor if there is none yet."""
    for name, part in PARTS.items():
        if name in parts or (name == "floor" and name not in journal.cells):
            keep(journal, name, partial(part, scale, journal.cells, load), console)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", required=True, help="results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite the table in this file"
    )
    args = parser.parse_args(argv)
    console = Console()
    where = demo.where("cpu") | demo.commit()  # before results are written, which is a change too
    journal = Journal(args.json, {"commit": where["commit"]}, stale=["commit"])
    run(args.only, Scale(), load, journal, console)
    reached = targets(journal.cells)
    journal.save(where=where, targets=reached)
    reached.show(console)
    if args.readme:
        result = json.loads(args.json.read_text())
        demo.rewrite(args.readme, "cpu", table(result["cells"]), caption(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
