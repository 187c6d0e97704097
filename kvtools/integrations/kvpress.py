"""kvpress: prompts compressed by the scores of one of its presses.

with kvtools.integrations.kvpress.pressed(model, SnapKVPress(0.5)) as config:
    model.generate(**inputs, custom_generate=kvtools.generate, kv_config=config)
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig
from ..hf import check_model
from ..hf.door import inner
from ..policy import Candidates, Policy

OWN = {
    "policy": "the press is the policy",
    "prompt_budget": "it is 1 - compression_ratio of the press",
    "budget": "a press says nothing of tokens that are sampled",
    "layer_budget": "a press compresses all layers alike",
}
ELSEWHERE = "docs/ecosystem.md says what to write instead"


@contextmanager
def pressed(model: Any, press: Any, **options: Any) -> Iterator[CacheConfig]:
    """What a press of kvpress would keep of a prompt, as a configuration that counts inside.

    Each KV head of each layer keeps the `1 - compression_ratio` of a prompt's tokens that
    `press.score` values most, rounded to the nearest number where kvpress rounds down, and at least
    `sinks + recent + 1`. The press sees what it sees in kvpress: the attention module, its input,
    the prompt's keys and values and their rotary embeddings, prompts one by one.

    Args:
        model: as for `kvtools.generate`, with layers as kvpress knows them: `model.model.layers`,
            their `self_attn`.
        press: a `ScorerPress` that compresses by its scores alone.
        options: of `CacheConfig`, by which what stays is kept. `sinks`, which stay whatever the
            press says, is 0 unless it is given, and `recent` 1.

    Yields:
        A `CacheConfig` for `generate`, `patch` or `Rollouts` of this model.

    Raises:
        TypeError: `press` has no scores.
        ValueError: it compresses in another way or needs attention matrices; an option is one that
            the press decides; layers have a sliding window, lie on several ranks or are not known.
            From a prefill: the press cannot score that prompt.

    The model is as it was on exit, also after an error.
    """
    check_press(press)
    for name in OWN.keys() & options.keys():
        raise ValueError(f"{name}={options[name]!r}: {OWN[name]}, leave it out")
    door = check_model(model)
    layers, rotary = parts(inner(model))
    if door.ranks is not None:
        raise ValueError(
            "presses do not know that each rank of a tensor parallel model has some of the heads: "
            "pass a CacheConfig with a policy instead"
        )
    if any(door.cached):
        raise ValueError(
            f"{type(model).__name__} has layers with a sliding window, which presses leave whole "
            "or score as if they had none: pass a CacheConfig with a policy instead"
        )
    scorer = _Scorer(press)
    config = CacheConfig(
        **dict(sinks=0, recent=1) | options,
        policy=Policy(scorer, protect=False),
        prompt_budget=1.0 - press.compression_ratio,
    )
    if hasattr(press, "post_init_from_model"):
        press.post_init_from_model(model)
    hooks, named = [], []
    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(scorer.see, with_kwargs=True))
            hooks.append(layer.register_forward_hook(scorer.forget, always_call=True))
            if not hasattr(layer, "rotary_emb"):  # kvpress puts it there; not as a part of it
                vars(layer)["rotary_emb"] = rotary
                named.append(layer)
        yield config
    finally:
        for hook in hooks:
            hook.remove()
        for layer in named:
            del vars(layer)["rotary_emb"]


def check_press(press: Any) -> None:
    """Raise, naming the reason, if scores of `press` are not all that it compresses by."""
    name = type(press).__name__
    base = next((x for x in type(press).__mro__ if x.__name__ == "ScorerPress"), None)
    if base is None:
        raise TypeError(f"press is a {name}, which is no ScorerPress of kvpress: {ELSEWHERE}")
    if name == "ObservedAttentionPress":
        raise ValueError(
            "ObservedAttentionPress needs whole attention matrices, which nothing here makes: pass "
            "CacheConfig(policy='h2o', prompt_budget=...)"
        )
    for method in ("compress", "forward_hook", "__call__"):
        if getattr(type(press), method) is not getattr(base, method):
            raise ValueError(f"{name} has a {method} of its own besides scores: {ELSEWHERE}")
    if hasattr(press, "press"):
        check_press(press.press)


def parts(model: Any) -> tuple[list[torch.nn.Module], Any]:
    """Attention modules and rotary embedding, where kvpress looks for them."""
    body = getattr(model, "model", None)
    body = getattr(body, "language_model", body)
    try:
        layers, rotary = [x.self_attn for x in body.layers], body.rotary_emb
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no model.layers with self_attn and no model.rotary_emb, "
            "which presses look at: pass a CacheConfig with a policy instead"
        ) from error
    return layers, rotary


class _Scorer:
    """A press as a policy: what its attention module got is seen before the module's keys come."""

    def __init__(self, press: Any) -> None:
        self.press, self._here = press, threading.local()

    def see(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._here.seen = module, args, kwargs

    def forget(self, *_: Any) -> None:
        self._here.seen = None

    def __call__(self, c: Candidates) -> Tensor:
        name, length = type(self.press).__name__, c.k_nhld.shape[2]
        seen = getattr(self._here, "seen", None)
        if seen is None:
            raise ValueError(
                f"{name} has not seen layer {c.layer}: use the configuration inside "
                "pressed(model, press), and with that model"
            )
        module, args, kwargs = seen
        # Prompts of a forward end together. Their rotary embeddings may be one for all.
        own = lambda x: x[min(c.part, len(x) - 1)][None, -length:]  # noqa: E731
        hidden = own(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        given = dict(kwargs, hidden_states=hidden, attention_mask=None)
        given["position_embeddings"] = tuple(map(own, kwargs["position_embeddings"]))
        given["position_ids"] = given["cache_position"] = torch.arange(length, device=hidden.device)
        try:
            score = self.press.score(module, hidden, c.k_nhld, c.v_nhld, None, given)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{name} cannot score a prompt of {length} tokens: {error}") from error
        if score.shape != c.k_nhld.shape[:3]:
            raise ValueError(
                f"{name} scores {list(score.shape)}, expected one for each token of each KV head, "
                f"{list(c.k_nhld.shape[:3])}"
            )
        return score[:, :, -c.position_nhs.shape[2] :].float()
