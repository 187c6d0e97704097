"""Every causal model type of transformers through kvtools, beside plain generate.

python -m bench.sweep [--types REGEX] [--modes exact,batch] [--json OUT] [--readme README.md]

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import kvtools
import kvtools.hf
from bench import tiny
from bench.tiny import NotComparable
from kvtools import demo

NEW = 24
OUTCOMES = ("wrong", "unclear", "refused", "equal", "not comparable")
IMPLEMENTATIONS = ("sdpa", "eager")
TIE = 1e-4  # standard deviations of the logits: closer tokens may change places
CALM = 3e-4  # what a rounding of the weights may do to logits, in the same unit


class Different(Exception):
    """Where ours leaves plain."""


class Forced(LogitsProcessor):
    """Makes plain `generate` write a given text."""

    def __init__(self, text_bl: Tensor) -> None:
        self.text_bl = text_bl

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.text_bl[:, input_ids.shape[1], None], 0)


class Count(StoppingCriteria):
    """Counts tokens as they come, so that an error tells whether it came before them."""

    tokens = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class Run:
    """What `generate` gave: tokens [b, t] and the model's own logits [b, t, v]."""

    tokens_bt: Tensor
    logits_btv: Tensor


def generated(model: Any, ids_bl: Tensor, new: int = NEW, **options: Any) -> Run:
    options = {"do_sample": False, "max_new_tokens": new} | options
    with torch.no_grad():
        model(ids(1))  # a dynamic rope keeps the frequencies of the longest text until a short one
    out = model.generate(ids_bl, output_logits=True, return_dict_in_generate=True, **options)
    return Run(out.sequences[:, ids_bl.shape[1] :], torch.stack(out.logits, 1).float())


def plain(model: Any, ids_bl: Tensor, new: int = NEW, **options: Any) -> Run:
    return generated(model, ids_bl, new, **options)


def plain_on(model: Any, text_bl: Tensor, start: int) -> Tensor:
    """Logits [b, t, v] that plain `generate` has before each token of the text from `start` on."""
    new = text_bl.shape[1] - start
    forced = [Forced(text_bl)]
    return plain(model, text_bl[:, :start], new, logits_processor=forced).logits_btv


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


def spread(logits: Tensor) -> float:
    return float(logits[logits.isfinite()].std()) or 1.0


def distance(expected: Tensor, actual: Tensor) -> float:
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("inf")
    return float((expected - actual)[finite].abs().max()) / spread(expected)


def ids(length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (1, length), generator=generator)


def exact(model: Any, allowed: float, lengths: Iterable[int] = (40,)) -> None:
    """One prompt, greedy."""
    for length in lengths:
        prompt = ids(length)
        same(plain(model, prompt), through_us(model, prompt), allowed, f"prompt of {length}: ")


def batch(model: Any, allowed: float, lengths: Iterable[int] = (33, 20, 40)) -> None:
    """Left-padded rows of different lengths, each compared with itself alone."""
    lengths = list(lengths)
    rows = [ids(length, seed) for seed, length in enumerate(lengths, 2)]
    width = max(lengths)
    padded = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    actual = through_us(model, padded, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = Run(actual.tokens_bt[i, None], actual.logits_btv[i, None])
        same(plain(model, row), alone, allowed, f"row of {lengths[i]} among {lengths}: ")


def samples(model: Any, allowed: float) -> None:
    """Sampled continuations of one prompt, against plain logits on their texts."""
    prompt, n = ids(33), 4
    options = dict(do_sample=True, temperature=0.9, top_k=0, num_return_sequences=n)
    torch.manual_seed(1)
    actual = through_us(model, prompt, **options)
    if len(torch.unique(actual.tokens_bt, dim=0)) < n:
        raise Different("samples are equal")
    text = torch.cat([prompt.expand(n, -1), actual.tokens_bt], 1)
    expected = Run(actual.tokens_bt, plain_on(model, text, prompt.shape[1]))
    same(expected, actual, allowed, "samples: ")


def ragged(model: Any, allowed: float) -> None:
    """Rollouts forked and rewound to different lengths, against plain on each text."""
    prompts, made = [ids(33, 5)[0], ids(20, 6)[0]], [0]
    with ours(lambda: made[0]), torch.no_grad():
        model(ids(1))
        rollouts = kvtools.Rollouts(model, temperature=1.0, eos_token_id=(), seed=1)
        rollouts.prefill(prompts, n=2)
        rollouts.step()
        made[0] = 1
        rollouts.generate(5)
        rollouts.gather([3, 0, 0, 2, 1])
        rollouts.generate([3, 0, 5, 1, 2])
        lengths = [len(tokens) for tokens in rollouts.tokens]
        back = [2, 0, 7, lengths[3] - 20, 1]  # row 3 to its prompt
        rollouts.crop([length - n for length, n in zip(lengths, back, strict=True)])
        rollouts.generate([12, 9, 12, 7, 0])
    for row, tokens in enumerate(rollouts.tokens):
        start, text = int(rollouts.prompt_lengths[row]), torch.tensor(tokens)[None]
        logits_tv = plain_on(model, text, start)[0]
        expected = logits_tv.log_softmax(-1).gather(1, text[0, start:, None])[:, 0]
        error = (expected - torch.tensor(rollouts.logprobs[row])).abs() / spread(logits_tv)
        if not (error <= allowed).all():
            first = int((~(error <= allowed)).nonzero()[0, 0])
            raise Different(f"row {row}: log-probability of new token {first} differs by "
                            f"{float(error[first]):.2g} std")  # fmt: skip


MODES: dict[str, Callable[[Any, float], None]] = {
    "exact": exact, "batch": batch, "samples": samples, "ragged": ragged,
}  # fmt: skip
SWITCH = 48  # positions that a scaled rope was made for
ROPES = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=SWITCH),
    "longrope": dict(factor=4.0, original_max_position_embeddings=SWITCH),
    "llama3": dict(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=SWITCH,
    ),
    "proportional": dict(factor=4.0),
}  # fmt: skip
ROPE_TYPES = (
    "llama qwen2 qwen3 mistral gpt_neox stablelm phi olmo2 granite gemma3_text phi3 phimoe "
    "phi4_multimodal"
).split()


def inside_across_beyond(model: Any, allowed: float) -> None:
    """Prompts that end before the switch, reach it while they grow, and start beyond it."""
    exact(model, allowed, (20, 40, 70))
    batch(model, allowed, (70, 20, 40, 60))


def rope_config(kind: str, rope: str) -> Any:
    """The tiny config with this rope; it is scaled from position SWITCH on."""
    changes: dict[str, Any] = {"max_position_embeddings": 4 * SWITCH}
    if rope == "dynamic":
        changes["max_position_embeddings"] = SWITCH
    own = tiny.tiny_config(kind)
    if hasattr(own, "original_max_position_embeddings"):
        changes["original_max_position_embeddings"] = SWITCH
    whole = own.rope_parameters
    kept = whole.get("full_attention", whole)
    width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    half = int(width * kept.get("partial_rotary_factor", 1.0)) // 2
    scaled = kept | ROPES[rope] | {"rope_type": rope}
    if rope == "longrope":
        scaled["short_factor"] = [1 + 0.1 * i for i in range(half)]
        scaled["long_factor"] = [2 + 0.7 * i for i in range(half)]
        if kind == "phimoe":
            scaled |= {"short_mscale": 1.0, "long_mscale": 1.2}
    changes["rope_parameters"] = whole | {"full_attention": scaled} if kept is not whole else scaled
    return tiny.tiny_config(kind, **changes)


def lively(config: Any, implementation: str) -> tuple[Any, float]:
    """A model whose greedy tokens vary, and what rounding may do to its logits."""
    prompt, why = ids(40), "no scale of the weights was tried"
    other = prompt.clone()
    other[0, -3] = 251
    for scale in tiny.SCALES:
        model = tiny.build(config, implementation, scale)
        run = plain(model, prompt)
        if not run.logits_btv.isfinite().any(-1).all() or run.logits_btv.isnan().any():
            why = "plain logits are not finite"
            continue
        different = len(set(run.tokens_bt[0].tolist()))
        if different < 6:
            why = f"plain greedy gives {different} different tokens"
            continue
        if torch.equal(run.tokens_bt, plain(model, other).tokens_bt):
            why = "plain tokens do not depend on the prompt"
            continue
        text = torch.cat([prompt, run.tokens_bt], 1)
        if distance(run.logits_btv, plain_on(model, text, 40)) > 1e-6:
            raise NotComparable("plain generate gives other logits each time")
        weights = [w for w in model.parameters() if w.dim() > 1]
        kept = [w.data.clone() for w in weights]
        for w in weights:
            w.data *= 1 + 1e-7 * torch.randn_like(w)
        noise = distance(run.logits_btv, plain_on(model, text, 40))
        for w, data in zip(weights, kept, strict=True):
            w.data.copy_(data)
        if noise <= CALM:
            return model, max(1e-3, 30 * noise)
        why = f"a rounding of the weights changes plain logits by {noise:.2g} std"
    raise NotComparable(why)


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
    """Leave the decision to the door's probe alone."""
    kvtools.hf.check_model = lambda model: None


def check(kind: str, modes: list[str], unchecked: bool) -> dict[str, dict[str, str]]:
    """Outcomes of one type by mode and implementation."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if unchecked:
        without_checks()
    found = {}
    cases = [(f"{mode} {name}", partial(tiny.tiny_config, kind), name, MODES[mode])
             for name in IMPLEMENTATIONS for mode in modes if mode in MODES]  # fmt: skip
    if "rope" in modes and kind in ROPE_TYPES:
        cases += [(f"rope {rope}", partial(rope_config, kind, rope), "sdpa", inside_across_beyond)
                  for rope in ROPES]  # fmt: skip
    models: dict[str, Any] = {}
    for name, config, implementation, run in cases:
        key = name if name.startswith("rope") else implementation

        def case(key=key, config=config, implementation=implementation, run=run) -> None:
            if key not in models:
                try:
                    models[key] = lively(config(), implementation)
                except Exception as error:
                    models[key] = error
            if isinstance(models[key], Exception):
                raise models[key]
            run(*models[key])

        found[name] = outcome(case)
    return found


def _child(pipe: Any, *args: Any) -> None:
    pipe.send(check(*args))


def in_child(kind: str, modes: list[str], unchecked: bool, limit: float) -> dict:
    """`check` in a process that may die or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.tiny", "kvtools.hf"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, kind, modes, unchecked), daemon=True)
    child.start()
    there.close()
    try:
        if here.poll(limit):
            return here.recv()
        reason = f"no end after {limit:.0f} s"
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
        outcomes = in_child(kind, modes, unchecked, limit)
        found[kind] = summed(outcomes) | {"modes": outcomes}
        seconds = time.perf_counter() - begin
        print(f"[{len(found)}/{len(kinds)}] {kind}: {found[kind]['outcome']} "
              f"{found[kind]['reason'][:150]} ({seconds:.1f} s)", file=sys.stderr, flush=True)  # fmt: skip

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, kinds))
    return dict(sorted(found.items()))


def grouped(found: dict[str, dict], name: str) -> dict[str, list[str]]:
    """Types of an outcome by reason, most types first."""
    groups: dict[str, list[str]] = {}
    for kind, x in found.items():
        if x["outcome"] == name:
            reason = re.sub(rf"\b{re.escape(kind)}\b", "it", x["reason"])
            groups.setdefault(reason, []).append(kind)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def counts(found: dict[str, dict]) -> str:
    count = Counter(x["outcome"] for x in found.values())
    return ", ".join(f"{count[name]} {name}" for name in
                     ("equal", "refused", "wrong", "unclear", "not comparable"))  # fmt: skip


def table(found: dict[str, dict]) -> list[list[str]]:
    """Rows for the README: outcome, how many, which."""
    rows = [["", "types", "which"]]
    for name in ("equal", "refused", "wrong", "unclear", "not comparable"):
        groups = {"": []} if name == "equal" else grouped(found, name)
        if name == "equal":
            groups = {"": [kind for kind, x in found.items() if x["outcome"] == name]}
        for reason, kinds in groups.items():
            head = f"{name}: {reason}" if reason else name
            rows.append([head.replace("|", "\\|"), str(len(kinds)), ", ".join(kinds)])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--types", default=".*", metavar="REGEX", help="only these; default all")
    parser.add_argument(
        "--modes", default="exact,batch,samples,ragged,rope",
        help="comma-separated; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="results")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="rewrite its table")
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
    found = sweep(kinds, modes, jobs=args.jobs, limit=args.limit, unchecked=args.without_checks)
    where = {"torch": torch.__version__, "transformers": transformers.__version__}
    where |= {"kvtools": kvtools.__version__, **demo.commit()}
    if args.json:
        result = {"where": where, "modes": modes, "types": found}
        args.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    for head, count, names in table(found)[1:]:
        print(f"{count:>4} {head}\n     {names}")
    summary = f"{len(found)} causal model types of transformers {where['transformers']}: "
    print(summary + counts(found))
    if args.readme:
        demo.rewrite(args.readme, "sweep", table(found), summary + counts(found) + ".")
    return int(any(x["outcome"] in ("wrong", "unclear") for x in found.values()))


if __name__ == "__main__":
    sys.exit(main())
