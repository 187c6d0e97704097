"""The door to transformers: the only file that knows it.

A model is run with our attention function for the length of one forward. During a prompt's prefill
that function calls the model's own attention and then stores keys and values; afterwards it is
`KVCache.attend`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import KVCache
from .config import CacheConfig
from .ops.sampling import sample

NAME = "kvtools"
# What a cache is called in arguments and outputs: "past_key_values" before transformers 5.24.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
LAYER_TYPES = {"full_attention", "sliding_attention"}
# These hand keys and values from layer to layer, or change them after the cache has seen them.
REFUSED = ("gemma3n", "gemma4", "mistral_large4", "diffllama", "doge", "inkling", "mllama")


@dataclass
class _Plug:
    """What our attention function stands in for, and whether a forward needs masks."""

    stock: str
    masks: bool = True


_plugs: dict[int, _Plug] = {}  # by id of the config


class _Handle:
    """What the cache returns for keys and values: the attention function takes it from there."""

    __slots__ = ("cache", "layer", "k", "v")

    def __init__(self, cache: "PagedCache", layer: int, k: Tensor, v: Tensor) -> None:
        self.cache, self.layer, self.k, self.v = cache, layer, k, v

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the model touches keys after caching them ({name!r}): kvtools does not support it"
        )


class _Layer(CacheLayerMixin):
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, cache: "PagedCache", index: int) -> None:
        super().__init__()
        self.cache, self.index, self.is_initialized = cache, index, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        handle = _Handle(self.cache, self.index, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int:
        if self.cache.filling:
            return 0
        return int(self.cache.kv.lengths.max()) if self.cache.kv.rows else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Masks are made for prefill only, and then over the prompt alone.
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # transformers before 5.20

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.index == 0:
            self.cache.kv.gather(beam_idx)


class PagedCache(Cache):
    """A transformers cache over a `KVCache`, for the models that `session` has checked.

    Attributes:
        kv: the store.
        timing: seconds of prefill and decoding, decode steps, and tokens fed in them.
    """

    def __init__(self, kv: KVCache) -> None:
        super().__init__(layers=[_Layer(self, i) for i in range(kv.layers)])
        self.kv, self.filling = kv, False
        self.timing = {"prefill_s": 0.0, "decode_s": 0.0, "steps": 0, "tokens": 0}

    def memory(self) -> dict[str, int]:
        """Bytes held; see `KVCache.memory`."""
        return self.kv.memory()

    def gather(self, index: Any) -> None:
        """See `KVCache.gather`."""
        self.kv.gather(index)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | _Handle,
    value: Tensor | _Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # Stock sdpa has no soft cap: 5.17 drops it in silence (so do we), 5.23 raises at prefill.
    cap = 0.0 if softcap is None or _plugs[id(module.config)].stock == "sdpa" else softcap
    options = dict(scale=scaling, softcap=cap, sliding=sliding_window or 0, sink_h=s_aux)
    handle = key if isinstance(key, _Handle) else None
    if handle is None or handle.cache.filling:
        k, v = (key, value) if handle is None else (handle.k, handle.v)
        extra = dict(scaling=scaling, softcap=softcap, sliding_window=sliding_window, s_aux=s_aux)
        extra = {name: x for name, x in extra.items() if x is not None}
        out = _stock_attention(module)(module, query, k, v, attention_mask, **extra, **kwargs)
        if handle is not None:
            handle.cache.kv.fill(handle.layer, query[0], k[0], v[0], **options)
        return out
    if kwargs.get("position_bias") is not None:
        raise ValueError("the model biases scores by position: kvtools does not support it")
    cache = handle.cache
    q, k, v = (x.transpose(1, 2) for x in (query, handle.k, handle.v))  # [rows, tokens, heads, D]
    out_thd = cache.kv.attend(handle.layer, *(x.flatten(0, 1) for x in (q, k, v)), **options)
    return out_thd.view(*q.shape), None


def _stock_attention(module: torch.nn.Module) -> Callable:
    name = _plugs[id(module.config)].stock
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    plug = _plugs.get(id(config), _Plug("eager"))
    if not plug.masks:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[plug.stock](*args, config=config, **kwargs)


@contextmanager
def plugged(model: PreTrainedModel) -> Iterator[_Plug]:
    """Run `model` with our attention function, and put its own back. May be nested: the outermost
    does the work, so that a loop of forwards pays for it once."""
    config = model.config
    stock = config._attn_implementation
    if stock == NAME:
        yield _plugs[id(config)]
        return
    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
    _plugs[id(config)] = plug = _Plug(stock)
    # Not by set_attn_implementation, which walks over all modules, twice per step: the models that
    # `check_model` lets through have one config.
    config._attn_implementation = NAME
    try:
        yield plug
    finally:
        config._attn_implementation = stock
        del _plugs[id(config)]


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the reason, if kvtools cannot run `model`."""
    config = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model; kvtools runs decoder-only models")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{kind} is a composite model; pass its language model to kvtools")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{kind} does not use transformers' attention interface; kvtools cannot run it"
        )
    if getattr(config, "kv_lora_rank", None) or kind.startswith(REFUSED):
        raise ValueError(
            f"{kind} does not cache plain keys and values per layer (latent or shared KV); "
            "kvtools cannot run it"
        )
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        raise ValueError(
            f"{kind} has layers of another kind ({', '.join(others)}); kvtools cannot run it"
        )


class Session:
    """A model over a `PagedCache`: prompts in, next-token logits out; then tokens in, logits out.

    Args:
        model: a decoder-only transformers model.
        config: how keys and values are kept.
        pages: pages per pool, fixed; None lets the pools grow.
        head: False to return final hidden states instead of logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CacheConfig,
        *,
        pages: int | None = None,
        head: bool = True,
    ) -> None:
        check_model(model)
        if not isinstance(config, CacheConfig):
            raise TypeError(f"expected a kvtools.CacheConfig, got {config!r}")
        layers = model.config.num_hidden_layers
        self.model, self.head = model, head
        self.kv = KVCache(config, layers, device=model.device, pages=pages)
        self.cache = PagedCache(self.kv)

    @torch.no_grad()
    def prefill(self, prompt_l: Tensor, copies: int = 1) -> Tensor:
        """Run one prompt through the model and add `copies` rows over it.

        Args:
            prompt_l: token ids, at least one.
            copies: rows to add.

        Returns:
            Logits after its last token [v]; or, without a head, hidden states of all its tokens [l,
            m].

        If anything fails the cache is as it was.
        """
        change, begin = self.kv.transaction(), time.perf_counter()
        self.kv.add_prompt(len(prompt_l), copies)
        try:
            self.cache.filling = True
            position = torch.arange(len(prompt_l), device=prompt_l.device)
            out = self._forward(prompt_l[None], position[None], last=True)[0]
        except BaseException:
            change.undo()
            raise
        finally:
            self.cache.filling = False
        self.cache.timing["prefill_s"] += time.perf_counter() - begin
        return out[-1] if self.head else out

    @torch.no_grad()
    def extend(
        self, tokens: Tensor, counts: np.ndarray | None = None, *, every: bool = False
    ) -> Tensor:
        """Give the rows new tokens.

        Args:
            tokens: [rows] one token each; or, with `counts`, [sum(counts)] row by row.
            counts: [rows] tokens per row, zero for rows that wait.
            every: return what follows every new token, not each row's last alone.

        Returns:
            Logits after the last new token of each row that got any [r, v], or after all new tokens
            [sum(counts), v]; without a head, hidden states of all new tokens [sum(counts), m].

        If anything fails the cache is as it was.
        """
        change, begin = self.kv.transaction(), time.perf_counter()
        counts = np.ones(self.kv.rows, np.int32) if counts is None else counts.astype(np.int32)
        position_t = self.kv.extend(counts)
        live = torch.from_numpy(counts[counts > 0]).to(tokens.device)
        longest = int(counts.max(initial=0))
        if longest == 0:
            raise ValueError("counts gives no row a token")
        # Ragged rows go in as one, without padding: attention alone tells rows apart.
        width = longest if longest * len(live) == len(tokens) else len(tokens)
        ids, positions = tokens.view(-1, width), position_t.view(-1, width)
        try:
            out = self._forward(ids, positions.long(), last=longest == 1).flatten(0, 1)
        except BaseException:
            change.undo()
            raise
        if self.head and not every and longest > 1:
            out = out[live.cumsum(0) - 1]
        timing = self.cache.timing
        timing["decode_s"] += time.perf_counter() - begin
        timing["steps"] += 1
        timing["tokens"] += len(tokens)
        return out

    def _forward(self, ids: Tensor, positions: Tensor, last: bool) -> Tensor:
        options: dict[str, Any] = {CACHE: self.cache, "use_cache": True}
        model = self.model if self.head else self.model.base_model
        if self.head and last:
            options["logits_to_keep"] = 1
        with plugged(self.model) as plug:
            plug.masks = self.cache.filling  # afterwards positions tell who sees whom
            try:
                out = model(input_ids=ids, position_ids=positions, **options)
            finally:
                plug.masks = True
        return out.logits if self.head else out.last_hidden_state


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    kv_config: CacheConfig | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """The decoding loop of `model.generate(custom_generate=kvtools.generate, kv_config=...)`.

    Each distinct prompt of the batch is prefilled and stored once, for all rows that repeat it,
    whether they come from `num_return_sequences` or from the caller. Finished rows leave the batch.
    Sampling is `kvtools.sample`, seeded from torch's global generator: a row's tokens do not depend
    on the batch that it sits in.

    Args:
        kv_config: how keys and values are kept; default `CacheConfig()`, exact.
        The rest is given by `generate`.

    Returns:
        What `generate` would. In `scores` and `logits` a row that has finished holds 0 at the
        padding token and -inf elsewhere. Its cache is a `PagedCache`.

    Raises:
        ValueError: an option of `generate` that is not supported, by name.
    """
    asked = sys._getframe(1).f_locals  # generate drops some arguments before it calls us
    streamer = asked.get("streamer")
    _refuse(model, generation_config, model_kwargs, asked)
    with plugged(model):
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, kv_config,
            streamer, model_kwargs,
        )  # fmt: skip


def _generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    kv_config: CacheConfig | None,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    device, rows = model.device, input_ids.shape[0]
    input_ids = input_ids.to(device)
    prompts, row_prompt = _distinct(input_ids, model_kwargs)
    session = Session(model, CacheConfig() if kv_config is None else kv_config)
    logits_pv = torch.stack(
        [session.prefill(prompt, int((row_prompt == i).sum())) for i, prompt in enumerate(prompts)]
    )
    session.kv.gather(np.argsort(np.argsort(row_prompt, kind="stable")))
    logits = logits_pv[torch.from_numpy(row_prompt).to(device)]

    seed = int(torch.randint(2**62, ()))
    seed_b = seed + torch.arange(rows, device=device)
    length_b = torch.tensor([len(prompts[i]) for i in row_prompt], device=device)
    filters = _fused(logits_processor) if config.do_sample else None
    want_scores = config.return_dict_in_generate and config.output_scores
    want_logits = config.return_dict_in_generate and config.output_logits
    all_scores, all_logits = () if want_scores else None, () if want_logits else None
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
    active = torch.arange(rows, device=device)
    over = torch.zeros(rows, dtype=torch.bool, device=device)  # once stopped, always stopped
    prompt_length = input_ids.shape[1]
    while True:
        position = length_b[active] + (input_ids.shape[1] - prompt_length)
        next_tokens = torch.full((rows,), pad, dtype=input_ids.dtype, device=device)
        if want_logits:
            all_logits += (_spread(logits.to(torch.float32), active, rows, pad),)
        if filters is not None and not want_scores:
            chosen, *_ = sample(
                logits, seed_b[active], position, **filters, impl=session.kv.config.impl
            )
        else:
            raw = logits.to(torch.float32)
            scores = logits_processor(input_ids, _spread(raw, active, rows, pad, copy=True))
            if want_scores:
                all_scores += (_spread(scores[active], active, rows, pad),)
            if config.do_sample:
                chosen = sample(
                    scores[active], seed_b[active], position, impl=session.kv.config.impl
                )[0]
            else:
                chosen = scores[active].argmax(-1)
        next_tokens[active] = chosen.to(input_ids.dtype)
        input_ids = torch.cat([input_ids, next_tokens[:, None]], 1)
        if streamer is not None:
            streamer.put(next_tokens.cpu())
        over |= stopping_criteria(input_ids, all_scores)
        done = over[active]
        if done.all():
            break
        if (
            pads and done.any()
        ):  # without an EOS token, generate lets rows run on until all are done
            stay = (~done).nonzero()[:, 0]
            session.kv.gather(stay)
            active = active[stay]
        logits = session.extend(input_ids[active, -1])
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=all_scores, logits=all_logits, **{CACHE: session.cache}
    )


def _refuse(
    model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Raise for what `generate` offers and this loop does not, by name."""
    check_model(model)
    options = ("assistant_model", "synced_gpus", "negative_prompt_ids")
    given = {name: asked.get(name) for name in options} | (asked.get("kwargs") or {})
    stock = getattr(model.generation_config, "cache_implementation", None)  # a checkpoint's wish
    refused = {
        "num_beams": config.num_beams not in (None, 1),
        "penalty_alpha": config.penalty_alpha is not None and (config.top_k or 0) > 1,
        "dola_layers": config.dola_layers is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "assistant_model": given.get("assistant_model") is not None,
        "constraints": getattr(config, "constraints", None) is not None,
        "force_words_ids": getattr(config, "force_words_ids", None) is not None,
        "num_beam_groups": getattr(config, "num_beam_groups", None) not in (None, 1),
        "use_mtp": bool(getattr(config, "use_mtp", False)),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "negative_prompt_ids": given["negative_prompt_ids"] is not None,
        "use_cache=False": kwargs.get("use_cache") is False,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "compile_config": config.compile_config is not None,
        "cache_implementation": given.get("cache_implementation") is not None
        or config.cache_implementation not in (None, stock),
        "past_key_values (cache)": given.get(CACHE) is not None,
        "inputs_embeds": given.get("inputs_embeds") is not None,
        "synced_gpus": bool(given.get("synced_gpus")),
        "num_return_sequences=0": config.num_return_sequences == 0,
    }
    ours = {"attention_mask", "position_ids", CACHE, "logits_to_keep", "use_cache"}
    refused |= {name: True for name, x in kwargs.items() if name not in ours and x is not None}
    names = [name for name, is_asked in refused.items() if is_asked]
    if names:
        raise ValueError(
            f"kvtools.generate does not support {', '.join(names)}: leave it out, or call generate "
            "without custom_generate"
        )


def _distinct(input_ids: Tensor, kwargs: dict[str, Any]) -> tuple[list[Tensor], np.ndarray]:
    """The distinct prompts without padding, and which one each row has."""
    mask = kwargs.get("attention_mask")
    rows, width = input_ids.shape
    if width == 0:
        raise ValueError("input_ids is empty: a prompt needs at least one token")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    lengths = mask.sum(-1)
    if (mask[:, -1] == 0).any() or (mask.flip(-1).cumprod(-1).sum(-1) != lengths).any():
        raise ValueError(
            "attention_mask must be left padding, zeros and then ones, with at least one token "
            "per row: set padding_side='left' in the tokenizer"
        )
    positions = kwargs.get("position_ids")
    if positions is not None:
        expected = (mask.cumsum(-1) - 1).clamp(min=0)
        if ((positions.to(expected.device).expand_as(expected) != expected) & (mask > 0)).any():
            raise ValueError("position_ids must count a row's tokens from 0: leave them out")
    found: dict[tuple, int] = {}
    row_prompt = np.empty(rows, np.int64)
    for row, (ids, length) in enumerate(zip(input_ids.tolist(), lengths.tolist(), strict=True)):
        row_prompt[row] = found.setdefault(tuple(ids[width - length :]), len(found))
    return [torch.tensor(ids, device=input_ids.device) for ids in found], row_prompt


def _fused(processors: LogitsProcessorList) -> dict[str, float | int] | None:
    """Arguments of `sample` that do what `processors` do, if nothing else is among them."""
    order = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]
    kinds = [type(processor) for processor in processors]
    if kinds != [kind for kind in order if kind in kinds]:
        return None
    if any(getattr(processor, "min_tokens_to_keep", 1) != 1 for processor in processors):
        return None
    names = dict(zip(order, ("temperature", "top_k", "top_p", "min_p"), strict=True))
    return {names[type(p)]: getattr(p, names[type(p)]) for p in processors}


def _spread(x_av: Tensor, active: Tensor, rows: int, pad: int, copy: bool = False) -> Tensor:
    """Values of all rows from those of the active; the others are certain of the padding token."""
    if len(active) == rows:
        return x_av.clone() if copy else x_av
    full = x_av.new_full((rows, x_av.shape[1]), -torch.inf)
    full[:, pad] = 0
    full[active] = x_av
    return full


@contextmanager
def patch(model: PreTrainedModel, config: CacheConfig | None = None) -> Iterator[PreTrainedModel]:
    """Make `model.generate` run through `kvtools.generate`, for code that calls it itself.

    Args:
        model: a decoder-only transformers model; other models are not affected.
        config: how keys and values are kept; default `CacheConfig()`, exact.

    Undone on exit, also after an error. Patches may be nested; the inner one counts.
    """
    check_model(model)
    missing = object()
    before = model.__dict__.get("generate", missing)
    stock = type(model).generate.__get__(model)

    def patched(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            raise ValueError(
                "custom_generate cannot be combined with kvtools.patch: use one of the two"
            )
        if kwargs.get("cache_implementation") == "paged":  # generate would leave before our loop
            raise ValueError("kvtools.generate does not support cache_implementation: leave it out")
        # generate loses the tokenizer on the way to a custom loop, so stop strings are resolved
        # here.
        base = kwargs.get("generation_config") or model.generation_config
        strings = kwargs.pop("stop_strings", None) or getattr(base, "stop_strings", None)
        tokenizer = kwargs.pop("tokenizer", None)
        if strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings needs the model's tokenizer: pass tokenizer=")
            criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
            kwargs["stopping_criteria"] = criteria
            criteria.append(StopStringCriteria(tokenizer, strings))
            if getattr(base, "stop_strings", None) is not None:
                kwargs["generation_config"] = copy(base)
                kwargs["generation_config"].stop_strings = None
        return stock(*args, custom_generate=generate, kv_config=config, **kwargs)

    model.generate = patched
    try:
        yield model
    finally:
        if before is missing:
            del model.generate
        else:
            model.generate = before
