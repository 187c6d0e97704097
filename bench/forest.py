"""Prompts that begin alike, thousands of samples, given completions: python -m bench.forest.

What each saves is counted and timed beside what does without it, in one run; all rivals must agree
before their figures count.
"""

import argparse
import copy
import ctypes
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import kvtools
from bench.targets import Targets
from bench.timing import print_rows
from kvtools import cli, models, results, tasks
from kvtools.cli import demo
from kvtools.hf import session

MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    prompts: int = 64
    preamble: int = 1200
    own: tuple[int, int] = (40, 80)
    batch: int = 1  # prompts that plain `generate` gets at a time; with padding it is slower
    new: int = 4  # tokens that are compared
    samples: int = 4000
    prompt: int = 200
    most: int = 24  # tokens of a sample
    completions: int = 8
    length: int = 256
    before: int = 1024
    judged: int = 1  # completions whose log-probabilities are also computed in float64
    rounds: int = 1  # in which completions are timed; memory is measured in the first


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(args[0].numel())
    )
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def setting(**values: Any) -> Iterator[None]:
    """Constants of `kvtools.hf.session`."""
    before = {name: getattr(session, name) for name in values}
    vars(session).update(values)
    try:
        yield
    finally:
        vars(session).update(before)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = run()
    return time.perf_counter() - begin, out


def step(name: str, run: Callable[[], Any]) -> Any:
    """`run()`, and a line that says what it took."""
    seconds, out = timed(run)
    print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return out


def peak(run: Callable[[], Any]) -> tuple[float | None, Any]:
    """Bytes that a call takes beyond what was there, at most; None where the system does not
    tell."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:  # what is free, and would be taken again unseen
        give_back(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")
        out = run()
        return held("VmHWM") - before, out
    except OSError:
        return None, run()


def held(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def prose(tokenizer: Any) -> list[int]:
    return tokenizer("\n\n".join(tasks.texts("held").values()))["input_ids"]


def few_shot(model: PreTrainedModel, tokenizer: Any, scale: Scale) -> dict:
    """One preamble before many prompts."""
    draw = random.Random(0)
    text = prose(tokenizer)
    stem, prompts = text[: scale.preamble], []
    for _ in range(scale.prompts):
        size, begin = draw.randint(*scale.own), draw.randrange(scale.preamble, len(text) - 100)
        prompts.append(stem + text[begin : begin + size])
    ids = [torch.tensor(x) for x in prompts]

    def ours() -> tuple[float, list, int]:
        rows = kvtools.Rollouts(model, temperature=0.0, eos_token_id=())
        with counted(model) as seen:
            seconds, _ = timed(lambda: rows.prefill(prompts))
        return seconds, rows.generate(scale.new), sum(seen)

    def apart() -> tuple[float, list, int]:
        with setting(STRETCH=10**9):
            return ours()

    def plain() -> tuple[float, list, int]:
        seconds, new, tokens = 0.0, [], 0
        for i in range(0, len(ids), scale.batch):
            some = ids[i : i + scale.batch]
            width = max(map(len, some))
            batch = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in some])
            mask = torch.arange(width) >= width - torch.tensor([[len(x)] for x in some])
            how = dict(attention_mask=mask.long(), do_sample=False, eos_token_id=None,
                       max_new_tokens=scale.new)  # fmt: skip
            with counted(model) as seen:
                first = Stopwatch()
                out = model.generate(batch, logits_processor=[first], **how)
            seconds, tokens = seconds + first.seconds, tokens + seen[0]
            new += out[:, width:].tolist()
        return seconds, new, tokens

    kvtools.hf.check_model(model)
    stems = {tuple(x[:n]) for x in prompts for n in range(1, len(x) + 1)}
    rows, want = {"distinct tokens": len(stems)}, None
    for name, run in (("kvtools", ours), ("apart", apart), ("generate", plain)):
        seconds, new, tokens = step(f"few-shot prompts, {name}", run)
        want = new if want is None else want
        same = float(np.mean([a == b for a, b in zip(new, want, strict=True)]))
        rows[name] = {"prefill_s": seconds, "tokens": tokens, "same": same}
    return rows


class Stopwatch:
    """A logits processor that tells when the first logits came."""

    def __init__(self) -> None:
        self.begin, self.seconds = time.perf_counter(), 0.0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seconds = self.seconds or time.perf_counter() - self.begin
        return scores


def small() -> PreTrainedModel:
    """A random Llama of 4 layers and width 64, whose samples end where they happen to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=[7, 90, 130, 200],
        max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float().eval()


def many(scale: Scale) -> dict:
    """Samples of one prompt, by rows in flight."""
    model, prompt = small(), [random.Random(1).randrange(3, 250) for _ in range(scale.prompt)]
    rows: dict[str, Any] = {}
    want = None

    def draw(flying: int) -> tuple[dict[int, list[int]], int]:
        runs, peak, drawn = kvtools.Rollouts(model, seed=1), 0, {}
        for x in runs.sample([prompt], scale.samples, rows=flying, max_new_tokens=scale.most):
            drawn[x.number] = x.tokens
            peak = max(peak, runs.kv.memory()["total"])
        return drawn, peak

    for flying in (64, 16, 256):
        title = f"{scale.samples:,} samples, {flying} rows"
        seconds, (drawn, peak) = step(title, lambda flying=flying: timed(lambda: draw(flying)))
        want = drawn if want is None else want
        rows[f"{flying} rows"] = {
            "tokens/s": sum(map(len, drawn.values())) / seconds, "peak_bytes": peak,
            "samples": len(drawn), "same": sum(drawn[i] == x for i, x in want.items()) / len(want),
        }  # fmt: skip
    rates = []
    for seed in range(12):
        runs = kvtools.Rollouts(model, seed=seed)
        begin = time.perf_counter()
        runs.prefill([prompt], 64)
        new = runs.generate(scale.most)
        rates.append(sum(map(len, new)) / (time.perf_counter() - begin))
    full = kvtools.Rollouts(model, eos_token_id=())
    full.prefill([prompt], 64)
    full.generate(scale.most)
    need = full.kv.memory()["total"]
    rows["a batch of 64"] = {"tokens/s": float(np.median(rates)), "peak_bytes": need}
    return rows


def given(model: PreTrainedModel, tokenizer: Any, scale: Scale) -> dict:
    """Log-probabilities of completions of one prompt."""
    text = prose(tokenizer)
    prompt = text[: scale.before]
    draw = random.Random(2)
    starts = [draw.randrange(len(text) - scale.length) for _ in range(scale.completions)]
    new = [text[i : i + scale.length] for i in starts]

    def ours(model: PreTrainedModel, new: list[list[int]]) -> torch.Tensor:
        found = kvtools.logprobs(model, [prompt], [new])
        return torch.stack([*found.logprobs[0], *found.entropies[0]])

    @torch.no_grad()
    def padded(model: PreTrainedModel, new: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor([prompt + x for x in new])
        logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        own = logp.gather(2, ids[:, 1:, None])[..., 0][:, len(prompt) - 1 :]
        entropy = [-(x.exp() * x).sum(-1) for x in logp[:, len(prompt) - 1 :]]
        return torch.stack([*own, *entropy])

    runs = {"kvtools": ours, "padded, full logits": padded}
    for run in runs.values():  # weights that are read for the first time belong to neither
        run(model, [new[0][:2]])
    rows: dict[str, Any] = {name: {"seconds": [], "peak_bytes": None} for name in runs}
    found = {}
    for i in range(scale.rounds):
        for name, run in runs.items():
            title = f"completions, {name}, {i + 1} of {scale.rounds}"
            most, (seconds, found[name]) = peak(
                lambda title=title, run=run: step(title, lambda: timed(lambda: run(model, new)))
            )
            rows[name]["seconds"].append(seconds)
            if i == 0:  # later, memory that was given back is there again
                rows[name]["peak_bytes"] = most
    # Sums in another order differ: the truth tells by how much they may.
    n, double = scale.judged, copy.deepcopy(model).double()
    truth = step("completions, padded, float64", lambda: padded(double, new[:n]))
    for name, out in found.items():
        error = torch.cat([out[:n], out[len(new) :][:n]]) - truth
        rows[name] |= {
            "seconds": float(np.median(rows[name]["seconds"])),
            "error": float(error.abs().max()),
            "rms_error": float(error.square().mean().sqrt()),
        }
    error = step("completions, kvtools, float64", lambda: ours(double, new[:n])) - truth
    rows["kvtools"]["float64_error"] = float(error.abs().max())
    return rows


def targets(cells: dict[str, dict]) -> Targets:
    found = Targets()
    if shots := cells.get("few-shot prompts"):
        ours = shots["kvtools"]
        found.add(
            "few-shot: tokens over distinct ones", ours["tokens"] / shots["distinct tokens"], 1.05
        )
        for rival in ("apart", "generate"):
            ratio = shots[rival]["prefill_s"] / ours["prefill_s"]
            found.add(f"few-shot: times as fast as {rival}", ratio, 6, least=True)
        found.add("few-shot: same tokens as generate", shots["generate"]["same"], 1, least=True)
    if rows := cells.get("samples"):
        for name in ("16 rows", "256 rows"):
            found.add(f"samples: the same with {name}", rows[name]["same"], 1, least=True)
        ours, batch = rows["64 rows"], rows["a batch of 64"]
        found.add("samples: KV over that of a batch", ours["peak_bytes"] / batch["peak_bytes"], 1.1)
        rate = ours["tokens/s"] / batch["tokens/s"]
        found.add("samples: tokens/s over a batch's", rate, 0.9, least=True)
    if rows := cells.get("given completions"):
        ours, rival = rows["kvtools"], rows["padded, full logits"]
        found.add(
            "completions: times as fast as padded",
            rival["seconds"] / ours["seconds"],
            4,
            least=True,
        )
        known = ours["peak_bytes"] is not None and rival["peak_bytes"]
        share = ours["peak_bytes"] / rival["peak_bytes"] if known else None
        found.add("completions: memory over padded", share, 0.1)
        ratio = ours["rms_error"] / rival["rms_error"]
        found.add("completions: error over padded's, against float64", ratio, 1.05)
        found.add("completions: error of a float64 model", ours["float64_error"], 1e-5)
    return found


def table(cells: dict[str, dict]) -> list[list[str]]:
    """A line for each rival; the heads first."""
    lines = [["", "tokens run", "s", "MiB at most", "samples' tokens/s"]]
    shots, rows = cells["few-shot prompts"], cells["samples"]
    for name, title in (
        ("kvtools", "few-shot prompts: kvtools"), ("apart", "prompts apart"),
        ("generate", "plain generate"),
    ):  # fmt: skip
        row = shots[name]
        lines.append([title, f"{row['tokens']:,}", f"{row['prefill_s']:.1f}", "", ""])
    for name in ("a batch of 64", "16 rows", "64 rows", "256 rows"):
        row = rows[name]
        title = name if "samples" not in row else f"{row['samples']:,} samples, {name}"
        size = f"{row['peak_bytes'] / 2**20:.2f}"
        lines.append([title, "", "", size, f"{row['tokens/s']:,.0f}"])
    for name, row in cells["given completions"].items():
        size = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append([f"completions: {name}", "", f"{row['seconds']:.1f}", size, ""])
    return lines


def caption(result: dict[str, Any]) -> str:
    where, scale = result["where"], Scale()
    return (
        f"{scale.prompts} prompts of {scale.preamble} common tokens and {scale.own[0]} to "
        f"{scale.own[1]} of their own, time to the first token, MiB not taken; samples of a small "
        f"random Llama, of up to {scale.most} tokens after {scale.prompt}, MiB of the cache; "
        f"{scale.completions} completions of {scale.length} tokens after {scale.before}, MiB of "
        f"the process. {result['model']}, float32, {where['device']}, {where['threads']} threads, "
        f"torch {where['torch']}, transformers {where['transformers']}, commit {where['commit']}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.forest", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", required=True, help="results")
    parser.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite the table in this file"
    )
    args = parser.parse_args(argv)
    console = Console()
    results.claim(args.json, {"model": MODEL}, ["cells", "targets"])
    where = demo.where("cpu") | demo.commit()
    model, tokenizer = models.load("smollm2", torch.float32, "cpu")
    scale, cells = Scale(), {}
    parts = {
        "samples": lambda: many(scale),
        "given completions": lambda: given(model, tokenizer, scale),
        "few-shot prompts": lambda: few_shot(model, tokenizer, scale),
    }
    with cli.progress() as bar:
        line = bar.add_task("forest", total=len(parts))
        for name, measure in parts.items():
            begin = time.perf_counter()
            cells[name] = measure()
            console.rule(f"{name}: {time.perf_counter() - begin:.0f} s")
            print_rows(console, name, cells[name])
            found = {"model": MODEL, "where": where, "cells": cells, "targets": targets(cells)}
            results.write(args.json, json.dumps(found, indent=1) + "\n")
            bar.advance(line)
    targets(cells).show(console)
    if args.readme:
        demo.rewrite(args.readme, "forest", table(cells), caption(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
