"""Trying again from where a solution is: iterative deepening, and revision over turns."""

from collections.abc import Callable, Sequence
from typing import Any

from ..rollouts import Rollouts
from .result import Result, Rows, growing, reduction
from .run import Prompt, Run, Steps, whole, within


def deepen(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 4,
    trigger: Prompt = "Wait, that may be wrong. Again:",
    depths: Sequence[int] = (1, 2, 4),
    enough: float = 1.0,
    reduce: str = "last",
    seed: int = 0,
) -> Result:
    """Iterative deepening: solutions are taken back, doubted, tried again; the better stays.

    At each depth, a copy of every row is taken back by so many steps, given the trigger as the
    beginning of its next step, and grown to its end. Policy and scorer both see the trigger.

    Args:
        n: rows, of each question.
        trigger: a self-correction; "" only tries again.
        depths: steps to go back, ascending. A row with fewer begins anew; one that the trigger
            leaves no room for a token is not tried.
        enough: rows that score at least this are left alone.
        reduce: what solutions are compared by, see `Candidate.score`.

    Returns:
        `n` candidates of each question.
    """
    if isinstance(depths, str) or not isinstance(depths, Sequence):
        raise TypeError(f"depths={depths!r}: a list of numbers is needed")
    depths = list(depths)
    for depth in depths:
        whole("depths", depth, 1)
    if depths != sorted(set(depths)):
        raise ValueError(f"depths={depths}: ascending numbers are needed")
    _compared(enough, reduce)
    _prompts(trigger=trigger)

    with Run(rollouts, questions, scorer, steps, n, seed, keep=True) as run:
        rows = _finish(run, run.start())
        for depth in depths:

            def again(copies: Rows, every: Rows, depth: int = depth) -> None:
                for c in (c for some in copies for c in some):
                    run.cut(c, max(0, len(c.steps) - depth))
                run.rewind(every)
                run.give(copies, "trigger", trigger)

            rows = _retry(run, rows, again, enough, reduce, f"{depth} steps back")
        return run.result(rows)


def revise(
    rollouts: Rollouts,
    questions: Sequence[str],
    scorer: Any,
    steps: Steps,
    *,
    n: int = 4,
    critique: Prompt = "\n\nWhat is wrong with this solution?\n",
    revision: Prompt = "\n\nThe whole solution once more, corrected:\n",
    rounds: int = 1,
    critique_tokens: int = 128,
    enough: float = 1.0,
    reduce: str = "last",
    seed: int = 0,
) -> Result:
    """Draft, critique, revise, as turns of a row; the better of draft and revision stays.

    The scorer sees drafts and revisions as solutions of their own, and no critique.

    Args:
        n: drafts, of each question.
        critique, revision: what the policy is told after a draft and after its own critique of it:
            a text, or a function (question, draft or critique) -> text or token ids, as a chat
            template needs it.
        rounds: revisions of each row, one after the other.
        critique_tokens: most tokens of a critique; an EOS token ends it before.
        enough: rows that score at least this are left alone.
        reduce: what solutions are compared by, see `Candidate.score`.

    Returns:
        `n` candidates of each question. `tokens` holds the turns before too, `text` and `steps`
        the solution alone.
    """
    whole("rounds", rounds, 1)
    whole("critique_tokens", critique_tokens, 1)
    _compared(enough, reduce)
    _prompts(critique=critique, revision=revision)
    with Run(rollouts, questions, scorer, steps, n, seed, keep=True) as run:

        def again(copies: Rows, every: Rows) -> None:
            run.give(copies, "critique", critique)
            said = run.say(copies, critique_tokens)
            run.give(copies, "revision", revision, said)
            for c in (c for some in copies for c in some):
                run.begin(c)
            run.rewind(every)

        rows = _finish(run, run.start())
        for i in range(rounds):
            rows = _retry(run, rows, again, enough, reduce, f"revision {i + 1}")
        return run.result(rows)


def _finish(run: Run, rows: Rows) -> Rows:
    while growing(rows):
        run.grow(rows)
    return rows


def _retry(
    run: Run,
    rows: Rows,
    again: Callable[[Rows, Rows], None],
    enough: float,
    reduce: str,
    why: str,
) -> Rows:
    """Copies of the rows that do not score enough, changed by again(copies, all rows) and grown to
    their ends; returns the better of each row and its copy, of equals the row."""
    values = [[c.score(reduce) for c in some] for some in rows]
    doubted = [[x < enough for x in some] for some in values]
    if not any(map(any, doubted)):
        return rows
    kept = [[i for i, again in enumerate(some) for _ in range(1 + again)] for some in doubted]
    said = [f"{why}: {sum(some)} again" * any(some) for some in doubted]
    rows = run.select(rows, kept, values, said)
    is_copy = [[i in index[:j] for j, i in enumerate(index)] for index in kept]
    again([[c for c, new in zip(some, flags, strict=True) if new]
           for some, flags in zip(rows, is_copy, strict=True)], rows)  # fmt: skip
    told = [[len(c.tokens) for c in some] for some in rows]
    _finish(run, rows)
    values = [[c.score(reduce) for c in some] for some in rows]
    better = []
    for question, (some, flags) in enumerate(zip(values, is_copy, strict=True)):
        index: list[int] = []
        for j, new in enumerate(flags):
            # Without room to say anything, it is what it was told, and no solution.
            spoke = len(rows[question][j].tokens) > told[question][j]
            if not new:
                index.append(j)
            elif spoke and some[j] > some[j - 1]:
                index[-1] = j
        better.append(index)
    said = [f"{why}: the better of each" * any(some) for some in doubted]
    return run.select(rows, better, values, said)


def _compared(enough: float, reduce: str) -> None:
    within("enough", enough, 0, 1)
    reduction(reduce)


def _prompts(**given: Any) -> None:
    for name, prompt in given.items():
        if not isinstance(prompt, str) and not callable(prompt):
            raise TypeError(f"{name}={prompt!r}: a text or a function is needed")
