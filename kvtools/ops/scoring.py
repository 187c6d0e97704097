"""`step_scores`: a reward head at step ends. `token_logprobs`: given tokens without logits."""

import torch
from torch import Tensor

from ..reference import scoring as reference
from . import Impl, Op, check

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
LINKS = ("sigmoid", "difference", "tanh", "identity")
REDUCES = ("last", "min", "max", "mean", "sum", "prod", "gmean", "sum_logit", "softmin")


def _fake_step_scores(hidden_tm, step_s, cu_steps, *_):
    sizes = step_s.shape[0], step_s.shape[0], cu_steps.shape[0] - 1
    return tuple(hidden_tm.new_empty(size, dtype=torch.float32) for size in sizes)


def _fake_token_logprobs(
    hidden_tm, weight_vm, target_t, bias_v, softcap, cu_seqlens, *reference_and_entropies
):
    t, segments = target_t.shape[0], 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    told = t if reference_and_entropies[-1] else 0
    sizes = ((t, torch.float32), (segments, torch.float32), (told, torch.float32))
    return tuple(hidden_tm.new_empty(n, dtype=x) for n, x in (*sizes, (told, torch.bool)))


_step_scores = Op(
    "step_scores",
    "(Tensor hidden_tm, Tensor step_s, Tensor cu_steps, Tensor weight_km, Tensor? bias_k, "
    "str link, str reduce, float temperature) -> (Tensor, Tensor, Tensor)",
    _fake_step_scores,
    reference=reference.step_scores,
)
_token_logprobs = Op(
    "token_logprobs",
    "(Tensor hidden_tm, Tensor weight_vm, Tensor target_t, Tensor? bias_v, float softcap, "
    "Tensor? cu_seqlens, Tensor? ref_hidden_tm, Tensor? ref_weight_vm, Tensor? ref_bias_v, "
    "bool entropies) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_token_logprobs,
    reference=reference.token_logprobs,
)


def step_scores(
    hidden_tm: Tensor,
    step_s: Tensor,
    cu_steps: Tensor,
    weight_km: Tensor,
    bias_k: Tensor | None = None,
    *,
    link: str = "sigmoid",
    reduce: str = "last",
    temperature: float = 0.1,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Score reasoning steps with the few head rows that a process reward model needs.

    Equivalent to, per step s and rollout r with the steps cu_steps[r] to cu_steps[r + 1] - 1:

        logits = hidden[step[s]] @ weight.T + bias
        margin = logits[0]                                      # k = 1: value head
                 logits[0] - logits[1]                          # k = 2: positive, negative
                 logaddexp(logits[1], logits[2]) - logits[0]    # k = 3: negative, neutral, positive
        prob   = link(margin);  score[r] = reduce(prob[s] of r)

    Args:
        hidden_tm: final hidden states of all tokens, packed. fp32, fp16 or bf16, any strides.
        step_s: row of `hidden_tm` that decides step s, already shifted by a family whose tag is
            read one token before it; grouped by rollout. int32 or int64. One outside is an error on
            a CPU and gives NaN on a GPU, where it is not read before.
        cu_steps: `[r + 1]`, where each rollout's steps begin; 0 first, S last. int32 or int64.
        weight_km: one, two or three head rows, in the order above. Any of the dtypes.
        bias_k: bias of the head rows, or None.
        link: "sigmoid" (p, the softmax where k is 2 or 3), "difference" (p - (1 - p), which is
            tanh(margin / 2)), "tanh" or "identity".
        reduce: "last", "min", "max", "mean", "sum", "prod", "gmean" (geometric mean), "sum_logit"
            (sum of margins, whatever the link) or "softmin" (sum of softmax(-prob / temperature) *
            prob). "prod" and "gmean" need link="sigmoid".
        temperature: of "softmin". > 0.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++; whether and where it beats Triton is not measured yet.

    Returns:
        margin_s, prob_s and score_r, all fp32. A rollout without steps has the score NaN.

    Numerics: accumulates in fp32 whatever the inputs; "prod" and "gmean" sum log(sigmoid(margin)).
        To rank, prefer margins: beyond a margin of 17 every fp32 probability is 1.

    Reference: softmin is that of PURE, arXiv:2504.15275.
    """
    k = _check_head("hidden_tm", hidden_tm, "weight_km", weight_km, "bias_k", bias_k)
    check(
        1 <= k <= 3,
        lambda: f"weight_km: expected 1, 2 or 3 rows, got {k}; pick the rows of the labels",
    )
    check(link in LINKS, lambda: f"link={link!r}: expected one of {', '.join(LINKS)}")
    check(reduce in REDUCES, lambda: f"reduce={reduce!r}: expected one of {', '.join(REDUCES)}")
    check(
        link == "sigmoid" or reduce not in ("prod", "gmean"),
        lambda: (
            f"reduce={reduce!r} is undefined for link={link!r}, which is no probability; "
            'use link="sigmoid"'
        ),
    )
    # Not `check`: a graph can format no symbolic float, so the message must wait for the failure.
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected temperature > 0")
    _check_index("step_s", step_s, hidden_tm)
    if _readable(step_s) and len(step_s):
        check(
            int(step_s.min()) >= 0 and int(step_s.max()) < hidden_tm.shape[0],
            lambda: (
                f"step_s: expected rows of hidden_tm, 0 to {hidden_tm.shape[0] - 1}, got "
                f"{int(step_s.min())} to {int(step_s.max())}; was it shifted twice?"
            ),
        )
    _check_offsets("cu_steps", cu_steps, step_s.shape[0], hidden_tm)
    return _step_scores(
        impl, hidden_tm, step_s, cu_steps, weight_km, bias_k, link, reduce, float(temperature)
    )


def token_logprobs(
    hidden_tm: Tensor,
    weight_vm: Tensor,
    target_t: Tensor,
    bias_v: Tensor | None = None,
    *,
    softcap: float = 0.0,
    cu_seqlens: Tensor | None = None,
    ref_hidden_tm: Tensor | None = None,
    ref_weight_vm: Tensor | None = None,
    ref_bias_v: Tensor | None = None,
    entropies: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """Log-probabilities of given tokens without ever holding their logits.

    Equivalent to:

        logits = hidden @ weight.T + bias;  logits = softcap * tanh(logits / softcap) if softcap > 0
        logprob = log_softmax(logits)[target] - the same of the reference model, if given
        sum[x] = sum of logprob[cu_seqlens[x] : cu_seqlens[x + 1]]

    Args:
        hidden_tm: hidden state that predicts each target. fp32, fp16 or bf16, any strides.
        weight_vm: LM head. Any of the dtypes.
        target_t: token ids; -100 is ignored and counts 0. int32 or int64.
        bias_v: bias of the LM head, or None.
        softcap: >= 0; 0 is off. Also of the reference model.
        cu_seqlens: `[x + 1]`, where each segment begins; 0 first, T last. int32 or int64. Or None.
        ref_hidden_tm: hidden states of a reference model, of any width, for the same targets.
        ref_weight_vm: its LM head; given if and only if `ref_hidden_tm` is.
        ref_bias_v: bias of its LM head, or None.
        entropies: tell of the model's distributions, too, how uncertain they are.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. Triton has no entropies: with them "auto" is the reference there.

    Returns:
        logprob_t and sum_x, fp32; sum_x is empty without `cu_seqlens`, and 0 for an empty segment.
        With `entropies` also entropy_t, fp32, in nats, and greedy_t, bool: whether the target has
        the highest logit, and no id before it has the same. They are 0 and False of ignored ones.

    Numerics: logits and their log-sum-exp are fp32, in tiles of at most 1,024 tokens by 8,192 ids.
        In the kernels a row's bits depend on neither its batch nor the number of threads.

    Reference: Cut Cross-Entropy, arXiv:2411.09009.
    """
    v = _check_head("hidden_tm", hidden_tm, "weight_vm", weight_vm, "bias_v", bias_v)
    check(v > 0, "weight_vm: expected at least one row")
    if not softcap >= 0:
        raise ValueError(f"softcap={softcap}: expected softcap >= 0, where 0 is off")
    t = hidden_tm.shape[0]
    _check_index("target_t", target_t, hidden_tm)
    check(
        target_t.shape[0] == t,
        lambda: f"target_t: expected [{t}], one per row of hidden_tm, got {list(target_t.shape)}",
    )
    check(
        (ref_hidden_tm is None) == (ref_weight_vm is None),
        "ref_hidden_tm and ref_weight_vm: give both or neither",
    )
    check(
        ref_bias_v is None or ref_hidden_tm is not None,
        "ref_bias_v: give ref_hidden_tm and ref_weight_vm too",
    )
    if ref_hidden_tm is not None:
        names = "ref_hidden_tm", "ref_weight_vm", "ref_bias_v"
        ref_v = _check_head(names[0], ref_hidden_tm, names[1], ref_weight_vm, names[2], ref_bias_v)
        check(
            ref_hidden_tm.shape[0] == t,
            lambda: f"ref_hidden_tm: expected {t} rows as hidden_tm, got {ref_hidden_tm.shape[0]}",
        )
        v = min(v, ref_v)
    if _readable(target_t):
        check(
            bool(((target_t == -100) | ((target_t >= 0) & (target_t < v))).all()),
            lambda: f"target_t: expected ids from 0 to {v - 1}, or -100 to ignore a row",
        )
    if cu_seqlens is not None:
        _check_offsets("cu_seqlens", cu_seqlens, t, hidden_tm)
    if entropies and impl == "auto" and hidden_tm.is_cuda:
        impl = "reference"
    logprob_t, sum_x, *told = _token_logprobs(
        impl,
        hidden_tm,
        weight_vm,
        target_t,
        bias_v,
        float(softcap),
        cu_seqlens,
        ref_hidden_tm,
        ref_weight_vm,
        ref_bias_v,
        bool(entropies),
    )
    return (logprob_t, sum_x, *told) if entropies else (logprob_t, sum_x)


def _check_head(
    hidden_name: str, hidden_tm: Tensor, weight_name: str, weight_km: Tensor, bias_name: str, bias_k
) -> int:
    """Check hidden states and the head that reads them; the number of head rows."""
    check(
        hidden_tm.ndim == 2, lambda: f"{hidden_name}: expected [t, m], got {list(hidden_tm.shape)}"
    )
    m = hidden_tm.shape[1]
    check(
        weight_km.ndim == 2 and weight_km.shape[1] == m,
        lambda: (
            f"{weight_name}: expected [rows, {m}] as {hidden_name}, got {list(weight_km.shape)}"
        ),
    )
    k = weight_km.shape[0]
    named = [(hidden_name, hidden_tm), (weight_name, weight_km)]
    if bias_k is not None:
        check(
            bias_k.shape == (k,), lambda: f"{bias_name}: expected [{k}], got {list(bias_k.shape)}"
        )
        named.append((bias_name, bias_k))
    for name, x in named:
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: {x.dtype} is not fp32, fp16 or bf16; cast it")
        if x.device != hidden_tm.device:
            raise ValueError(
                f"{name}: on {x.device} but {hidden_name} on {hidden_tm.device}; move it there"
            )
    return k


def _check_index(name: str, index: Tensor, hidden_tm: Tensor) -> None:
    check(index.ndim == 1, lambda: f"{name}: expected one axis, got {list(index.shape)}")
    check(index.dtype in INTEGERS, lambda: f"{name}: {index.dtype} is not int32 or int64; cast it")
    check(
        index.device == hidden_tm.device,
        lambda: f"{name}: on {index.device} but hidden_tm on {hidden_tm.device}; move it there",
    )


def _check_offsets(name: str, offsets: Tensor, total: int, hidden_tm: Tensor) -> None:
    _check_index(name, offsets, hidden_tm)
    check(offsets.shape[0] > 0, lambda: f"{name}: expected at least one entry, a 0")
    if _readable(offsets):
        check(
            int(offsets[0]) == 0
            and int(offsets[-1]) == total
            and bool((offsets.diff() >= 0).all()),
            lambda: f"{name}: expected offsets rising from 0 to {total}",
        )


def _readable(x: Tensor) -> bool:
    """Whether reading values neither waits for a GPU nor cuts a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
