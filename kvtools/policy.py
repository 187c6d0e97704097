"""Who is evicted: Scissorhands and its baselines behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """What a policy may look at: the tokens of n rows (or of one prompt) that could be evicted from
    a layer.

    Attributes:
        position_nhs: true positions, int32; `EMPTY` where a slot holds no token.
        mass_nhs: attention received, averaged over the query heads of a KV head, fp32. Summed over
            the time that `Policy.mass` says; for a prompt over the queries that `Policy.observe`
            says.
        low_nhs: in how many of the last `window` steps the token got less than the mean, int32.
        idle_nhs: for how many steps, at most `window`, it has not got the mean; for a prompt as
            `low_nhs`.
        now_n: position of the token about to be written, int32.
        layer: index of the layer.
        prompt: a prompt is compressed: tokens are in order.
        k_nhld, v_nhld: of a prompt, keys after RoPE and values of all its tokens, of which the last
            s are the candidates; None for rows.
        part: of a prompt, which of those that share a forward it is.
    """

    position_nhs: Tensor
    mass_nhs: Tensor
    low_nhs: Tensor
    idle_nhs: Tensor
    now_n: Tensor
    layer: int
    prompt: bool
    k_nhld: Tensor | None = None
    v_nhld: Tensor | None = None
    part: int = 0


Score = Callable[[Candidates], Tensor | tuple[Tensor, Tensor]]
Judge = Callable[["Policy", Candidates], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Policy:
    """A way to score tokens, and what has to be recorded for it.

    Attributes:
        score: worth of each candidate [n, h, s], lowest evicted first; or (worth, tie-breaker).
            Equal ones go oldest first.
        mass: "life" sums attention since a token was written, "selection" since the last selection,
            "step" keeps the last step's only, "" records none.
        history: record low steps.
        observe: queries of a prompt that count: "window" (the last w), "all", "last", "" for none.
        across: the score looks at a layer's heads together, or at which they are: where they lie on
            several ranks it is shown all of them.
        protect: its first and newest tokens stay, whatever a prompt's other tokens are worth. False
            to leave only sinks out of it.
    """

    score: Score
    mass: str = ""
    history: bool = False
    observe: str = ""
    across: bool = False
    protect: bool = True

    def rank(self, candidates: Candidates) -> tuple[Tensor, Tensor | None]:
        """Worth and tie-breaker, which may be None."""
        worth = self.score(candidates)
        return worth if isinstance(worth, tuple) else (worth, None)


SPAN = 13  # tokens of a prompt that are worth what the best of them is


def scissorhands(c: Candidates) -> Tensor | tuple[Tensor, Tensor]:
    """Most often below the mean lately goes first; then least attention (arXiv:2305.17118).

    A prompt has no steps to count. There the spans around what its last queries attended to stay:
    what they attend to is often next to what will be asked for.
    """
    if c.prompt:
        return torch.nn.functional.max_pool1d(
            c.mass_nhs, kernel_size=SPAN, stride=1, padding=SPAN // 2
        )
    return -c.low_nhs, c.mass_nhs


def h2o(c: Candidates) -> Tensor:
    """Least accumulated attention goes first (arXiv:2306.14048)."""
    return c.mass_nhs


def snapkv(c: Candidates) -> Tensor:
    """Least attention from recent queries goes first, smoothed in a prompt (arXiv:2404.14469)."""
    if not c.prompt:
        return c.mass_nhs
    return torch.nn.functional.avg_pool1d(
        c.mass_nhs, kernel_size=5, stride=1, padding=2, count_include_pad=False
    )


def tova(c: Candidates) -> Tensor:
    """Least attention from the last query, over all heads of the layer (arXiv:2401.06104)."""
    mean = c.mass_nhs.mean(1, keepdim=True)
    # Heads may hold different tokens; only where they agree is there one mean for all.
    same = (c.position_nhs == c.position_nhs[:, :1]).all(1, keepdim=True)
    return torch.where(same, mean, c.mass_nhs)


def streaming(c: Candidates) -> Tensor:
    """Oldest goes first (arXiv:2309.17453)."""
    return c.position_nhs


def lru(c: Candidates) -> Tensor:
    """Longest without the mean attention goes first."""
    return -c.idle_nhs


def random(c: Candidates) -> Tensor:
    """A hash of position, head, layer and step: the same in any batch."""
    head = torch.arange(c.position_nhs.shape[1], device=c.position_nhs.device)[:, None]
    x = c.position_nhs.long() * 0x9E3779B1 + head * 0x85EBCA77 + c.layer * 0xC2B2AE3D
    x = x + c.now_n.long()[:, None, None] * 0x27D4EB2F
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


POLICIES = {
    "scissorhands": Policy(scissorhands, mass="life", history=True, observe="window"),
    "h2o": Policy(h2o, mass="life", observe="all"),
    "snapkv": Policy(snapkv, mass="selection", observe="window"),
    "tova": Policy(tova, mass="step", observe="last", across=True),
    "streaming": Policy(streaming),
    "lru": Policy(lru, history=True, observe="window"),
    "random": Policy(random, across=True),
}


def policy_of(policy: str | Policy | Score) -> Policy:
    """The policy of that name; a callable gets everything recorded."""
    if isinstance(policy, Policy):
        return policy
    if callable(policy):
        return Policy(policy, mass="life", history=True, observe="window", across=True)
    if policy not in POLICIES:
        raise ValueError(
            f"policy={policy!r} does not exist; expected one of {', '.join(POLICIES)}, or a "
            "callable"
        )
    return POLICIES[policy]


def unroll(history: Tensor, window: int, now_n: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of low steps and of idle steps [n, h, s] from rings of bits [n, h, s, words]."""
    bits = (history[..., None] >> torch.arange(32, dtype=torch.int32, device=history.device)) & 1
    bits = bits.flatten(-2)[..., :window]
    age = torch.arange(1, window + 1, device=history.device)
    latest_first = (now_n[:, None] - age) % window
    ordered = bits.gather(-1, latest_first[:, None, None].expand_as(bits))
    return bits.sum(-1, dtype=torch.int32), ordered.cumprod(-1).sum(-1, dtype=torch.int32)
