"""Every causal model type of transformers through kvtools, beside plain generate.

python -m bench.sweep [--types REGEX] [--modes exact,batch] [--json OUT] [--merge RESULTS]
                      [--readme README.md] [--page docs/models.md]

A type's tiny model is run in a process of its own. Outcome of each mode:
    equal           what plain `generate` gives, logits included
    refused         a ValueError or TypeError with a reason, before any token
    wrong           something else than plain gives, and no error
    unclear         any other error, or one in the middle
    not comparable  plain `generate` fails, or its tokens do not vary
The exit status is 1 if anything is wrong or unclear.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria

import kvtools
from bench import tiny
from bench.tiny import NEW, Lively, NotComparable, Run, distance, generated, ids, spread
from kvtools.cli import demo
from kvtools.hf import door

OUTCOMES = ("wrong", "unclear", "refused", "equal", "not comparable")  # worst first
SHOWN = ("equal", "refused", "wrong", "unclear", "not comparable")
IMPLEMENTATIONS = ("sdpa", "eager")
TIE = 1e-4  # standard deviations of the logits: closer tokens may change places


class Different(Exception):
    """Where ours leaves plain."""


class Count(StoppingCriteria):
    """Counts tokens as they come, so that an error tells whether it came before them."""

    tokens = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Refused(Exception):
    pass


class Unclear(Exception):
    pass


@contextmanager
def ours(tokens: Callable[[], int] = lambda: 0):
    """Sorts errors of our side: refused at the door, or unclear."""
    try:
        yield
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        inside = any(name.endswith("torch/nn/modules/module.py") for name in frames)
        door = str(Path(kvtools.__file__).parent) in frames[-1]
        if not isinstance(error, (ValueError, TypeError)) or not str(error).strip():
            raise Unclear(text) from error
        if tokens():
            raise Unclear(f"after {tokens()} tokens: {text}") from error
        if inside or not door:
            where = (
                f"{Path(frames[-1]).name}:{traceback.extract_tb(error.__traceback__)[-1].lineno}"
            )
            raise Unclear(f"inside the model's forward ({where}): {text}") from error
        raise Refused(" ".join(str(error).split())) from error


def through_us(model: Any, ids_bl: Tensor, new: int = NEW, **options: Any) -> Run:
    count = Count()
    with ours(lambda: count.tokens):
        run = partial(generated, custom_generate=kvtools.generate, stopping_criteria=[count])
        return run(model, ids_bl, new, **options)


def same(expected: Run, actual: Run, allowed: float, what: str = "") -> None:
    """Raise `Different` at the first token whose logits differ by more than `allowed`, in standard
    deviations, or which is another and no tie."""
    for i in range(expected.tokens_bt.shape[1]):
        p_bv, o_bv = expected.logits_btv[:, i], actual.logits_btv[:, i]
        error = distance(p_bv, o_bv)
        if not error <= allowed:
            raise Different(f"{what}logits of new token {i} differ by {error:.2g} std")
        rows = torch.arange(len(p_bv))
        mine, other = expected.tokens_bt[:, i], actual.tokens_bt[:, i]
        gap = (p_bv[rows, mine] - p_bv[rows, other]).abs() / spread(p_bv)
        if (gap > TIE).any():
            raise Different(f"{what}new token {i} is another")
        if (mine != other).any():
            return  # a tie; texts part


def exact(model: Lively, lengths: Iterable[int] = (40,)) -> None:
    """One prompt, greedy."""
    for length in lengths:
        prompt = ids(length)
        actual = through_us(model.model, prompt)
        same(model.plain(prompt), actual, model.allowed, f"prompt of {length}: ")


def batch(model: Lively, lengths: Iterable[int] = (33, 20, 40)) -> None:
    """Left-padded rows of different lengths, each compared with itself alone."""
    lengths = list(lengths)
    rows, width = [ids(length) for length in lengths], max(lengths)
    padded = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    actual = through_us(model.model, padded, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = Run(actual.tokens_bt[i, None], actual.logits_btv[i, None])
        what = f"row of {lengths[i]} among {lengths}: "
        same(model.plain(row), alone, model.allowed, what)


def samples(model: Lively) -> None:
    """Sampled continuations of one prompt, against plain logits on their texts."""
    prompt, n = ids(33), 4
    options = dict(do_sample=True, temperature=0.9, top_k=0, num_return_sequences=n)
    torch.manual_seed(1)
    actual = through_us(model.model, prompt, **options)
    if len(torch.unique(actual.tokens_bt, dim=0)) < n:
        raise Different("samples are equal")
    text = torch.cat([prompt.expand(n, -1), actual.tokens_bt], 1)
    expected = Run(actual.tokens_bt, model.on(text, prompt.shape[1]))
    same(expected, actual, model.allowed, "samples: ")


def ragged(model: Lively, lengths: tuple[int, int] = (33, 20)) -> None:
    """Rollouts forked and rewound to different lengths, against plain on each text."""
    prompts, made = [ids(length, seed=5)[0] for length in lengths], [0]
    with torch.no_grad():
        model.model(ids(1))  # as in `generated`
    with ours(lambda: made[0]):
        rollouts = kvtools.Rollouts(model.model, temperature=1.0, eos_token_id=(), seed=1)
        rollouts.prefill(prompts, n=2)
        rollouts.step()
        made[0] = 1
        rollouts.generate(5)
        rollouts.gather([3, 0, 0, 2, 1])
        rollouts.generate([3, 0, 5, 1, 2])
        present = [len(tokens) for tokens in rollouts.tokens]
    back = [2, 0, 7, present[3] - lengths[1], 1]  # row 3 to its prompt
    with ours():  # what can be forked and not rewound may say so here
        rollouts.crop([length - n for length, n in zip(present, back, strict=True)])
    with ours(lambda: made[0]):
        rollouts.generate([10, 7, 8, 7, 0])
    for row, tokens in enumerate(rollouts.tokens):
        start, text = int(rollouts.prompt_lengths[row]), torch.tensor(tokens)[None]
        logits_tv = model.on(text, start)[0]
        expected = logits_tv.log_softmax(-1).gather(1, text[0, start:, None])[:, 0]
        error = (expected - torch.tensor(rollouts.logprobs[row])).abs() / spread(logits_tv)
        for i in (~(error <= model.allowed)).nonzero()[:1, 0].tolist():
            raise Different(
                f"row {row} of a fork: log-probability of new token {i} of {len(error)} differs by "
                f"{float(error[i]):.2g} std"
            )


MODES: dict[str, Callable[[Lively], None]] = {
    "exact": exact, "batch": batch, "samples": samples, "ragged": ragged,
}  # fmt: skip
ROPE_TYPES = [
    "llama", "qwen2", "qwen3", "mistral", "gpt_neox", "stablelm", "phi", "olmo2", "granite",
    "gemma3_text", "phi3", "phimoe", "phi4_multimodal",
]  # fmt: skip


def inside_across_beyond(model: Lively) -> None:
    """Prompts that end before the switch, reach it while they grow, and start beyond it."""
    exact(model, (20, 40, 70))
    batch(model, (70, 20, 40, 60))
    ragged(model, (33, 46))


def outcome(run: Callable[[], None]) -> dict[str, str]:
    try:
        run()
    except NotComparable as error:
        return {"outcome": "not comparable", "reason": str(error)}
    except Different as error:
        return {"outcome": "wrong", "reason": str(error)}
    except Refused as error:
        return {"outcome": "refused", "reason": str(error)}
    except Unclear as error:
        return {"outcome": "unclear", "reason": str(error)}
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return {"outcome": "not comparable", "reason": f"plain: {text}"}
    return {"outcome": "equal", "reason": ""}


def without_checks() -> None:
    """Leave the decision to what the door tries out: the probe, and asking how inputs are prepared.

    Layers of any kind are let through, and windows are those that attention is told by keyword.
    """

    class Everything:
        def __contains__(self, x: Any) -> bool:
            return True

    def window(self: door.Door, layer: int, forward: Any, mask: Any, keyword: int | None) -> int:
        return self.windows.setdefault(layer, keyword or 0)

    door.KEPT, door.Door.window = Everything(), window
    door.Door.mask_window = lambda self, wanted: 0


def check(kind: str, modes: list[str], unchecked: bool = False) -> dict[str, dict[str, str]]:
    """Outcomes of one type: {"mode implementation" or "rope kind": {"outcome":, "reason":}}."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if unchecked:
        without_checks()
    found = {}
    for implementation in IMPLEMENTATIONS:
        runs = {f"{mode} {implementation}": MODES[mode] for mode in modes if mode in MODES}
        found |= outcomes(partial(tiny.tiny_config, kind), implementation, runs)
    for rope in tiny.ROPES if "rope" in modes and kind in ROPE_TYPES else ():
        config = partial(tiny.rope_config, kind, rope)
        found |= outcomes(config, "sdpa", {f"rope {rope}": inside_across_beyond})
    return found


def outcomes(
    config: Callable[[], Any], implementation: str, runs: dict[str, Callable]
) -> dict[str, dict[str, str]]:
    """What each of `runs` comes to on the lively model of a config."""
    made: list[Lively] = []

    def opened() -> None:
        """What is refused needs no lively model."""
        model = tiny.build(config(), implementation, tiny.SCALES[0])
        generated(model, ids(8), 2)
        through_us(model, ids(8), 2)

    first = outcome(opened)
    if first["outcome"] not in ("refused", "not comparable"):
        first = outcome(lambda: made.append(tiny.lively(config(), implementation)))
    if not made:
        return dict.fromkeys(runs, first)
    return {name: outcome(partial(run, *made)) for name, run in runs.items()}


def _child(pipe: Any, run: Callable[[], Any]) -> None:
    pipe.send(run())


def in_child(run: Callable[[], dict], limit: float) -> dict[str, dict[str, str]]:
    """`run()` in a process of its own, which may die or hang: "unclear" after `limit` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.tiny", "kvtools.hf"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, run), daemon=True)
    child.start()
    there.close()
    try:
        if here.poll(limit):
            return here.recv()
        reason = f"no end after {limit:g} s"
    except EOFError:
        child.join()
        reason = f"the process died with exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return {"all": {"outcome": "unclear", "reason": reason}}


def summed(modes: dict[str, dict[str, str]]) -> dict[str, str]:
    """The outcome of a type: its worst mode's; what cannot be compared counts if nothing can."""
    for name in OUTCOMES:
        cases = {mode: x["reason"] for mode, x in modes.items() if x["outcome"] == name}
        if cases:
            mode, reason = next(iter(cases.items()))
            rest = {x["outcome"] for x in modes.values()} - {name, "not comparable"}
            part = f"{mode}: " if rest and name != "equal" else ""
            return {"outcome": name, "reason": part + reason}
    return {"outcome": "not comparable", "reason": "no mode"}


def sweep(
    kinds: list[str], modes: list[str], *, jobs: int, limit: float, unchecked: bool
) -> dict[str, dict]:
    found = {}

    def one(kind: str) -> None:
        begin = time.perf_counter()
        of_modes = in_child(partial(check, kind, modes, unchecked), limit)
        found[kind] = summed(of_modes) | {"modes": of_modes}
        seconds, x = time.perf_counter() - begin, found[kind]
        line = f"{kind}: {x['outcome']} {x['reason'][:150]} ({seconds:.1f} s)"
        print(f"[{len(found)}/{len(kinds)}] {line}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, kinds))
    return dict(sorted(found.items()))


def counts(found: dict[str, dict]) -> str:
    count = Counter(x["outcome"] for x in found.values())
    return ", ".join(f"{count[name]} {name}" for name in SHOWN)


def table(found: dict[str, dict]) -> list[list[str]]:
    """Rows of outcome, how many types, which; by reason but for those that are equal."""
    rows = [["", "types", "which"]]
    for name in SHOWN:
        groups: dict[str, list[str]] = {}
        for kind, x in found.items():
            if x["outcome"] == name:
                reason = re.sub(rf"\b{re.escape(kind)}\w*", "it", x["reason"])
                groups.setdefault(reason, []).append(kind)
        for reason, kinds in sorted(groups.items(), key=lambda item: -len(item[1])):
            head = f"{name}: {reason}" if reason else name
            rows.append([head.replace("|", "\\|"), str(len(kinds)), ", ".join(kinds)])
    return rows


def brief(found: dict[str, dict]) -> list[list[str]]:
    """Rows of outcome, how many types, which."""
    rows = [["", "types", "which"]]
    for name in SHOWN:
        kinds = [kind for kind, x in found.items() if x["outcome"] == name]
        rows += [[name, str(len(kinds)), ", ".join(kinds)]] * bool(kinds)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--types", default=".*", metavar="REGEX", help="only these; default all")
    parser.add_argument(
        "--modes", default="exact,batch,samples,ragged,rope",
        help="comma-separated; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="results")
    parser.add_argument("--merge", type=Path, metavar="RESULTS",
                        help="of an earlier run, for the types that are left out")  # fmt: skip
    parser.add_argument("--readme", type=Path, metavar="PATH", help="rewrite its short table")
    parser.add_argument("--page", type=Path, metavar="PATH", help="rewrite its table with reasons")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default %(default)s")
    parser.add_argument("--limit", type=float, default=240, help="seconds per type")
    parser.add_argument("--without-checks", action="store_true",
                        help="the door's probe alone must refuse what is wrong")  # fmt: skip
    args = parser.parse_args(argv)
    modes = args.modes.split(",")
    for mode in modes:
        if mode not in (*MODES, "rope"):
            parser.error(f"--modes holds {mode!r}; there are {', '.join(MODES)}, rope")
    kinds = [kind for kind in tiny.types() if re.fullmatch(args.types, kind)]
    if not kinds:
        parser.error(
            f"--types {args.types!r} is no type of transformers {transformers.__version__}"
        )
    where = {"torch": torch.__version__, "transformers": transformers.__version__}
    earlier = json.loads(args.merge.read_text()) if args.merge else None
    if earlier and (
        any(earlier["where"][x] != where[x] for x in where) or earlier["modes"] != modes
    ):
        parser.error(f"--merge {args.merge} has other versions or modes: {earlier['where']}")
    found = sweep(kinds, modes, jobs=args.jobs, limit=args.limit, unchecked=args.without_checks)
    where |= {"kvtools": kvtools.__version__, **demo.commit()}
    result = {"where": where, "modes": modes, "types": found}
    if earlier:  # a type that was not run again says where it was
        old = {kind: {"where": earlier["where"]} | x for kind, x in earlier["types"].items()}
        result["types"] = found = dict(sorted((old | found).items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    for head, count, names in table(found)[1:]:
        print(f"{count:>4} {head}\n     {names}")
    summary = f"{len(found)} causal model types of transformers {where['transformers']}: "
    print(summary + counts(found))
    for path, rows in ((args.readme, brief), (args.page, table)):
        if path:
            demo.rewrite(path, "sweep", rows(found), summary + counts(found) + ".")
    return int(any(x["outcome"] in ("wrong", "unclear") for x in found.values()))


if __name__ == "__main__":
    sys.exit(main())
