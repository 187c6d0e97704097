"""What scoring steps costs while rollouts grow: python -m bench.prm --json OUT.

SmolLM2 stands in for a process reward model: "+" against "-" behind every step. All rivals score
the same steps of the same rollouts and must agree before their figures count.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.targets import Targets
from kvtools import CacheConfig, cli, models, prm, results, step_scores
from kvtools.cli import demo
from kvtools.prm.layouts import Encoded, Pieces

QUESTION = "Tom adds up the coins of two jars every day. How many are in the last jar?"
RESULT = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rollouts: int = 16
    steps: int = 20
    rounds: int = 2  # but for "re-encoded", which is measured once


@dataclass
class StandIn(Pieces):
    """A reward model of any causal model; its tag is the line break."""

    def head(self, model: Any, reference: Any = None) -> Any:
        return self.rows_of(model, "+", "-")


class Case:
    """The rollouts, and the model that scores them."""

    def __init__(self, model: Any, tokenizer: Any, scale: Scale) -> None:
        self.model, self.prm = model, prm.load(model, tokenizer, StandIn)
        self.columns = self.prm.head.rows
        draw = random.Random(0)

        def step() -> str:
            a, b = draw.randrange(2, 60), draw.randrange(2, 60)
            return f"{a} + {b} = {a + b}" + draw.choice(["", ".", " coins."])

        self.solutions = [[step() for _ in range(scale.steps)] for _ in range(scale.rollouts)]

    def encoded(self, steps: int) -> list[Encoded]:
        """The first `steps` steps of every rollout, question included."""
        return self.prm.family.encode(QUESTION, [x[:steps] for x in self.solutions])


def padded(encoded: list[Encoded], device: torch.device) -> Tensor:
    """Token ids [rollouts, longest]; what is read does not see the padding behind it."""
    width = max(len(x.ids) for x in encoded)
    return torch.tensor([x.ids + [0] * (width - len(x.ids)) for x in encoded], device=device)


def positions(encoded: list[Encoded]) -> Tensor:
    return torch.tensor([[begin for begin, _ in x.reads] for x in encoded])


def tokens(encoded: list[Encoded]) -> int:
    return sum(len(x.ids) for x in encoded)


def full_logits(case: Case, encoded: list[Encoded]) -> Tensor:
    """Probabilities [rollouts, steps], as readers on top of a causal model make them."""
    logits = case.model(padded(encoded, case.prm.device), use_cache=False).logits
    prob = logits[:, :, case.columns].float().softmax(-1)[:, :, 0].cpu()
    return prob.gather(1, positions(encoded))


def re_encoded(case: Case, progress: Callable[[], Any]) -> tuple[Tensor, int]:
    """Full logits of all that was written so far, at every step."""
    newest, seen = [], 0
    for k in range(1, len(case.solutions[0]) + 1):
        encoded = case.encoded(k)
        newest.append(full_logits(case, encoded)[:, -1])
        seen += tokens(encoded)
        progress()
    return torch.stack(newest, 1), seen


def full_logits_once(case: Case, progress: Callable[[], Any]) -> tuple[Tensor, int]:
    encoded = case.encoded(len(case.solutions[0]))
    return full_logits(case, encoded), tokens(encoded)


def gather_matmul_once(case: Case, progress: Callable[[], Any]) -> tuple[Tensor, int]:
    """Hidden states at the tags, times two rows of the head."""
    encoded = case.encoded(len(case.solutions[0]))
    ids = padded(encoded, case.prm.device)
    hidden = case.model.base_model(ids, use_cache=False).last_hidden_state
    at = hidden[torch.arange(len(ids))[:, None], positions(encoded)]
    weight = case.model.get_output_embeddings().weight[case.columns]
    return (at @ weight.T).float().softmax(-1)[..., 0].cpu(), tokens(encoded)


def session(
    case: Case, progress: Callable[[], Any], config: CacheConfig | None = None
) -> tuple[Tensor, int]:
    """Step by step, in one session."""
    grown = case.prm.session(QUESTION, len(case.solutions), config)
    for k in range(len(case.solutions[0])):
        grown.append([steps[k] for steps in case.solutions])
        progress()
    return torch.tensor(grown.probs), grown.tokens


RIVALS: dict[str, Callable[..., tuple[Tensor, int]]] = {
    "re-encoded": re_encoded,
    "full logits once": full_logits_once,
    "gather, matmul once": gather_matmul_once,
    "session": session,
    "session, balanced": partial(session, config=CacheConfig.preset("balanced")),
}


@contextmanager
def peak(device: torch.device) -> Iterator[list[int]]:
    """Bytes that were in use at most, beyond those in use before; empty where that is unknown."""
    found: list[int] = []
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
    elif reset.exists():
        reset.write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
        yield found
        found.append(resident("VmHWM") - before)
    else:
        yield found


@torch.no_grad()
def measure(case: Case, scale: Scale, progress: Callable[[], Any]) -> Iterator[tuple[str, RESULT]]:
    """Tokens, median seconds and peak memory of each rival."""
    full_logits(case, case.encoded(1))  # the first pass is slow, whoever makes it
    truth = None
    for name, rival in RIVALS.items():
        seconds = []
        for _ in range(1 if name == "re-encoded" else scale.rounds):
            begin = models.now(case.prm.device)
            with peak(case.prm.device) as memory:
                prob, seen = rival(case, progress)
                seconds.append(models.now(case.prm.device) - begin)
        truth = prob if truth is None else truth
        error = (prob - truth).abs().max().item()
        if "balanced" not in name and error > (1e-4 if case.model.dtype == torch.float32 else 0.1):
            raise AssertionError(f"{name} differs from {next(iter(RIVALS))} by {error:.2g}")
        yield name, {
            "tokens": seen, "seconds": float(np.median(seconds)), "error": error,
            "peak_bytes": memory[0] if memory else None,
        }  # fmt: skip


@torch.no_grad()
def allocated(case: Case) -> RESULT:
    """Bytes that `step_scores` asks for, all counted, beside those of the rows that it gathers."""
    encoded = case.encoded(len(case.solutions[0]))
    read_s = positions(encoded).flatten().to(case.prm.device)
    hidden_tm = torch.randn(
        tokens(encoded), case.model.config.hidden_size, device=case.prm.device
    ).to(case.model.dtype)
    weight = case.model.get_output_embeddings().weight[case.columns]
    cu_steps = torch.tensor([0, len(read_s)], device=case.prm.device)
    activities = [ProfilerActivity.CPU]
    if case.prm.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as run:
        step_scores(hidden_tm, read_s, cu_steps, weight)
    name = f"self_{'device' if case.prm.device.type == 'cuda' else 'cpu'}_memory_usage"
    asked = sum(max(0, getattr(event, name)) for event in run.events())
    return {"allocated": asked, "gathered": len(read_s) * hidden_tm[0].nbytes}


def targets(result: RESULT) -> Targets:
    """The figures the project set itself."""
    found, rows = Targets(), result["rows"]
    if "session" in rows:
        for what, least in (("tokens", 6), ("seconds", 4)):
            ratio = rows["re-encoded"][what] / rows["session"][what]
            found.add(f"{what} of re-encoding over the session's", ratio, least, least=True)
    spent = result["step_scores"]
    share = spent["allocated"] / spent["gathered"]
    found.add("bytes of step_scores over the rows gathered", share, 1)
    return found


TITLES = {
    "re-encoded": "full logits of all so far, at every step",
    "full logits once": "full logits, once at the end",
    "gather, matmul once": "rows gathered before the head, once at the end",
    "session": "one session, a score after each step",
}


def table(result: RESULT) -> list[list[str]]:
    """A line for each rival; the heads first."""
    lines = [["", "tokens encoded", "s", "MiB held at most", "probabilities differ by"]]
    for name, row in ((name, result["rows"][name]) for name in TITLES):
        held = row["peak_bytes"]
        lines.append([
            TITLES[name], f"{row['tokens']:,}", f"{row['seconds']:.1f}",
            "" if held is None else f"{held / 2**20:.1f}", f"{row['error']:.1g}",
        ])  # fmt: skip
    return lines


def caption(result: RESULT) -> str:
    where, spent = result["where"], result["step_scores"]
    return (
        f"{result['rollouts']} rollouts of {result['steps']} steps, {result['model']} standing in "
        f"for a reward model, {result['dtype']}. step_scores asked for "
        f"{spent['allocated'] / spent['gathered']:.3f} of the bytes of the rows that it reads. "
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {where['commit']}."
    )


def run(
    model: Any,
    tokenizer: Any,
    scale: Scale,
    console: Console,
    save: Callable[[RESULT], Any] = lambda result: None,
) -> RESULT:
    """Measure, print and save one rival after the other."""
    case, rows = Case(model, tokenizer, scale), {}
    result = {
        "rollouts": scale.rollouts, "steps": scale.steps,
        "dtype": str(model.dtype).removeprefix("torch."), "rows": rows,
        "step_scores": allocated(case),
    }  # fmt: skip
    with cli.progress() as bar:
        line = bar.add_task("scoring", total=scale.steps * (1 + 2 * scale.rounds))
        for name, row in measure(case, scale, lambda: bar.advance(line)):
            rows[name], held = row, row["peak_bytes"]
            console.print(
                f"{name:20} {row['tokens']:6} tokens  {row['seconds']:7.2f} s  "
                + ("" if held is None else f"{held / 2**20:5.0f} MiB at most  ")
                + f"differs by {row['error']:.1e}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            save(result)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.prm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", required=True, help="results")
    parser.add_argument(
        "--readme", type=Path, metavar="PATH", help="rewrite the table in this file"
    )
    parser.add_argument("--dtype", default="float32", help="of the model (default float32)")
    parser.add_argument("--device", default=cli.default_device(), help="default: cuda, else cpu")
    args = parser.parse_args(argv)
    console = Console()
    results.claim(args.json, {"model": "SmolLM2-135M-Instruct"}, ["rows", "step_scores"])
    where = demo.where(args.device) | demo.commit()  # before results are written, a change too
    model, tokenizer = models.load("smollm2", getattr(torch, args.dtype), args.device)

    def save(result: RESULT) -> None:
        more = {"where": where, "targets": targets(result)}
        text = json.dumps({"model": "SmolLM2-135M-Instruct"} | result | more, indent=1)
        results.write(args.json, text + "\n")

    targets(run(model, tokenizer, Scale(), console, save)).show(console)
    if args.readme:
        result = json.loads(args.json.read_text())
        demo.rewrite(args.readme, "prm", table(result), caption(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
