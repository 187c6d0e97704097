"""`sample`: filters per row, counter-based noise, log-probabilities of the chosen token."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..reference import sampling as reference
from . import Impl, Op, check

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MOST = 2**31 - 1
RANGES = {
    "temperature": ("0 <= temperature < inf", lambda x: (x >= 0) & (x < torch.inf)),
    "top_k": ("top_k >= 0, where 0 is off", lambda x: x >= 0),
    "top_p": ("0 < top_p <= 1, where 1 is off", lambda x: (x > 0) & (x <= 1)),
    "min_p": ("0 <= min_p <= 1, where 0 is off", lambda x: (x >= 0) & (x <= 1)),
}
WHOLE = int, np.integer, torch.SymInt
NUMBERS = *WHOLE, float, np.floating, torch.SymFloat


def _fake_sample(logits_bv: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = logits_bv.shape[0]
    return tuple(
        logits_bv.new_empty(b, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32)
    )


_sample = Op(
    "sample",
    "(Tensor logits_bv, Tensor seed_b, Tensor position_b, Tensor temperature_b, Tensor top_k_b, "
    "Tensor top_p_b, Tensor min_p_b) -> (Tensor, Tensor, Tensor)",
    _fake_sample,
    reference=reference.sample,
)


def sample(
    logits_bv: Tensor,
    seed_b: Tensor,
    position_b: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row from its filtered distribution, with noise that is the row's own.

    Equivalent to, with the filters in the order of transformers and equal logits never split:

        z = logits / temperature
        kept = z >= the top_k-th largest z
        kept = those of kept whose strictly greater ones have less than top_p of kept's mass
        kept = those of kept with softmax(z) >= min_p * max(softmax(z))
        word = philox4x32((token // 4, position, 0, 0), (seed mod 2^32, seed >> 32))[token % 4]
        u = (word + 0.5) * 2^-32;  g = -log(-log1p(-u))
        token = argmax of z + g over kept, the lowest id on ties

    Args:
        logits_bv: fp32, fp16 or bf16, any strides; -inf is never drawn.
        seed_b: one Philox key per rollout. int64, all 64 bits count.
        position_b: absolute position of the token being drawn, modulo 2^32. int32 or int64.
        temperature: >= 0; 0 takes the greatest logit, the lowest id on ties. This and the three
            below: a number for all rows, or a tensor `[b]`, whose range is checked on a CPU only.
        top_k: an integer >= 0; 0 and whatever is not below V keep all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++; whether and where it beats Triton is not measured yet.

    Returns:
        token_b in int64; logprob_b in fp32, log softmax(z) of the token before any filter (at
        temperature 1 where greedy); filtered_logprob_b in fp32, the same over kept (0 where
        greedy). A row whose greatest z is not finite (a NaN, an infinity, all -inf) gives token -1
        and NaN twice, because raising would have to wait for the device.

    Numerics: z is fp32, z + g is fp64. The noise is a pure function of (seed, position, token id),
        so a row's token depends on neither its batch, its place in it, nor who finished. top-p sums
        integers, 2^40 exp(z - max z) rounded, from a polynomial that the reference fixes bit by
        bit: no order of summation, and no implementation, keeps other tokens.

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    if logits_bv.ndim != 2 or logits_bv.shape[1] == 0:
        raise ValueError(
            f"logits_bv: expected [b, v], v > 0, got {list(logits_bv.shape)}; pass one position "
            "a row"
        )
    if logits_bv.dtype not in FLOATS:
        raise ValueError(f"logits_bv: {logits_bv.dtype} is not fp32, fp16 or bf16; cast it")
    _check_rows("seed_b", seed_b, logits_bv, (torch.int64,))
    _check_rows("position_b", position_b, logits_bv, INTEGERS)
    filters = (
        _per_row("temperature", temperature, logits_bv, FLOATS),
        _per_row("top_k", top_k, logits_bv, INTEGERS),
        _per_row("top_p", top_p, logits_bv, FLOATS),
        _per_row("min_p", min_p, logits_bv, FLOATS),
    )
    return _sample(impl, logits_bv, seed_b, position_b, *filters)


def row_seeds(seed: int, count: int, first: int = 0) -> np.ndarray:
    """Seeds of rows `first` to `first + count - 1` of a run, for `sample`.

    Equivalent to:

        words = philox4x64(counter row + 1, key seed);  seed of the row = words[0] >> 2

    Args:
        seed: of the run; any integer, modulo 2^128.
        count: how many rows.
        first: number of the first of them.

    Returns:
        [count] int64 in [0, 2^62), as good as random: two runs with other seeds share none, unless
        they have some 10^9 rows.
    """
    draws = np.random.Philox(key=seed % 2**128, counter=first).random_raw(4 * count)
    return (draws[::4] >> np.uint64(2)).astype(np.int64)


def drawn(
    token_b: Tensor | Sequence[int],
    step: int | Tensor | Sequence[int],
    row_b: Tensor | Sequence[int] | None = None,
) -> list[int]:
    """The tokens that `sample` returned, or an error where it could draw none: what a loop over
    steps passes them through before it uses them.

    Args:
        token_b: tokens on the host, a list or a CPU tensor.
        step: which step of the loop drew them, counted from 0; one for all, or one per token.
        row_b: numbers of the rows, as the caller counts them; default 0, 1, ...

    Returns:
        The tokens as a list of ints.

    Raises:
        ValueError: a token is -1. The message names each such row and its step.
    """
    tokens = _on_host("token_b", token_b)
    if -1 not in tokens:
        return tokens
    rows = range(len(tokens)) if row_b is None else _on_host("row_b", row_b)
    steps = [step] * len(tokens) if isinstance(step, Integral) else _on_host("step", step)
    failed = [
        f"row {row} at step {at}"
        for token, row, at in zip(tokens, rows, steps, strict=True)
        if token == -1
    ]
    more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
    raise ValueError(
        f"no token can be drawn for {', '.join(failed[:8])}{more}: the logits hold NaN or +inf, or "
        "are all -inf; look at the model's output and at the logits processors"
    )


def check_filters(**filters: float | Tensor) -> None:
    """Raise as `sample` would for `temperature`, `top_k`, `top_p` and `min_p` that are numbers, by
    name; tensors it looks at itself."""
    for name, value in filters.items():
        if not isinstance(value, Tensor):
            _check_number(name, value)


def _check_number(name: str, value: float) -> None:
    # Not `check`: a graph can format no symbolic float, so the message waits for the failure.
    expected, holds = RANGES[name]
    if not isinstance(value, WHOLE if name == "top_k" else NUMBERS):
        raise ValueError(f"{name}={value!r}: expected {expected}")
    if not holds(value):
        raise ValueError(f"{name}={value}: expected {expected}")


def _on_host(name: str, values: Tensor | Sequence[int]) -> list[int]:
    if not isinstance(values, Tensor):
        return [int(x) for x in values]
    check(
        values.device.type == "cpu",
        lambda: f"{name}: on {values.device}; read it back first, this function does not wait",
    )
    return values.tolist()


def _check_rows(
    name: str, rows_b: Tensor, logits_bv: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    # Not `check`: no message is made here unless it is needed. The operator looks at devices.
    b = logits_bv.shape[0]
    if rows_b.shape != (b,):
        raise ValueError(
            f"{name}: expected [{b}], one entry per row of logits_bv, got {list(rows_b.shape)}"
        )
    if rows_b.dtype not in dtypes:
        raise ValueError(f"{name}: {rows_b.dtype} is not one of {dtypes}; cast it")


def _per_row(
    name: str, value: float | Tensor, logits_bv: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """`value` as a tensor `[b]`; its range is checked on a CPU, outside of a graph."""
    expected, holds = RANGES[name]
    dtype = torch.int32 if dtypes is INTEGERS else torch.float32
    if not isinstance(value, Tensor):
        _check_number(name, value)
        value = min(value, MOST) if dtype == torch.int32 else value
        return torch.full((logits_bv.shape[0],), value, dtype=dtype, device=logits_bv.device)
    _check_rows(name, value, logits_bv, dtypes)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        check(bool(holds(value).all()), lambda: f"{name}: expected {expected} in every row")
    return (value.clamp(max=MOST) if value.dtype == torch.int64 else value).to(dtype)
