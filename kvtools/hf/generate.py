"""The decoding loop of `generate`, and `patch`, which gives it to a model."""

import copyreg
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..config import CacheConfig, is_int
from ..ops.sampling import drawn, row_seeds
from .decode import Decoder, Graph, check_graph, usable
from .door import device_of, door_of
from .plug import CACHE, PagedCache, plugged
from .session import Session, check_model, config_of


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    kv_config: CacheConfig | None = None,
    streamer: Any = None,
    probe: bool = True,
    graph: Graph = "auto",
    rows: int | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """The decoding loop of `model.generate(custom_generate=kvtools.generate, kv_config=...)`.

    Each distinct prompt of the batch is prefilled and stored once, for all rows that repeat it,
    whether they come from `num_return_sequences` or from the caller; so are tokens with which
    several begin, see `Session.prefill`. Those of similar lengths share a forward. Finished rows
    leave the batch.
    Sampling is `kvtools.sample`, seeded from torch's global generator: a row's tokens do not depend
    on the batch that it sits in, not where rotary frequencies depend on the length (dynamic,
    longrope) either.

    With `compile_config`, or of a model whose forward is compiled, steps after the prompt are one
    compiled graph (docs/models.md).

    With `return_dict_in_generate` the cache that is returned keeps all rows, and another call goes
    on from it, given as `past_key_values` (`cache` in transformers 5.24): more samples of its
    prompts, or prompts that begin with texts that it holds, prompt and answer, of which only the
    rest is run. It then holds the new rows instead; after a call that fails half-way, or without
    `return_dict_in_generate`, none that can be gone on from. `save_cache` and `load_cache` keep one
    in a file.

    Args:
        kv_config: how keys and values are kept; default `CacheConfig()`, exact, or that of the
            cache that is given.
        streamer: as for `generate`, which does not hand it to a custom loop: pass
            `custom_generate=functools.partial(kvtools.generate, streamer=streamer)`, or use
            `patch`.
        probe: False to run a model unseen: otherwise its first call compares some tokens with the
            model's own path.
        graph: "auto" lets steps run ahead of the host on a CUDA device, captured in CUDA graphs,
            where temperature, top_k, top_p and min_p are all that stands between logits and tokens,
            lengths and EOS tokens all that ends rows, and nothing but tokens is asked for: the
            host's own processors, criteria and streamers are waited for. A model that cannot be
            captured is named by a warning. False: never. Tokens are the same.
        rows: at most so many rows grow at a time, and then the next as many, so that thousands of
            `num_return_sequences` need the memory of a few; None for all. Tokens are the same.
            Processors and criteria see the whole batch, of which rows that wait look as those that
            have ended do; a streamer gets tokens when all are there; a cache that is to be returned
            holds all rows, however few grow.
        The rest is given by `generate`.

    Returns:
        What `generate` would. In `scores` and `logits` a row that has finished holds 0 at the
        padding token and -inf elsewhere. Its cache is a `PagedCache`.

    Raises:
        ValueError: an option of `generate` that is not supported, or a model that cannot be run, by
            name; logits from which no token can be drawn, by row and step.
    """
    asked = _lost()
    if streamer is None and asked.get("streamer") is not None:
        raise ValueError(
            "generate does not hand streamer to a custom loop: pass custom_generate="
            "functools.partial(kvtools.generate, streamer=streamer), or use kvtools.patch"
        )
    told = asked.get("streamer") is not None  # what prompts there are, by generate
    if told and streamer is not asked["streamer"]:
        raise ValueError(
            "streamer is another one in generate than in kvtools.generate, and tokens go to one: "
            "leave out that of generate"
        )
    door_of(model)
    _refuse(model, generation_config, model_kwargs, asked)
    if rows is not None and (not is_int(rows) or rows < 1):
        raise ValueError(f"rows={rows!r} must be a whole number of at least 1, or None for all")
    check_graph(graph)
    with plugged(check_model(model, probe=probe)):
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, kv_config,
            streamer, told, graph, rows, model_kwargs,
        )  # fmt: skip


def _lost() -> dict[str, Any]:
    """Arguments of the `generate` that called us, some of which it drops on the way.

    There is no public way to see them; they are looked at to be refused, or done already.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "generate" and (
            frame.f_globals.get("__name__") == "transformers.generation.utils"
        ):
            return frame.f_locals | (frame.f_locals.get("kwargs") or {})
        frame = frame.f_back
    return {}


def _generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    kv_config: CacheConfig | None,
    streamer: Any,
    told: bool,
    graph: Graph,
    most: int | None,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    device, rows = device_of(model), input_ids.shape[0]
    most = rows if most is None else min(most, rows)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    if (
        most < rows
        and not pads
        and any(type(x) is not MaxLengthCriteria for x in stopping_criteria)
    ):
        raise ValueError(
            f"rows={most} needs an EOS token, or lengths alone to end rows: without one generate "
            "lets all run on until the last has ended"
        )
    input_ids = input_ids.to(device)
    prompts, row_prompt = _distinct(input_ids, model_kwargs)

    def text(row: int) -> list[int]:
        if row < first:
            return prompts[row].tolist()
        row = row if keeps else int(active[row - first])
        return input_ids[row, prompt_length - int(length_b[row]) :].tolist()

    compiled = None
    if config.compile_config is not None and not config.disable_compile:
        compiled = model.get_compiled_call(config.compile_config)
    cache = model_kwargs.get(CACHE)  # else one that generate has made
    cache = cache if isinstance(cache, PagedCache) else None
    kv_config = config_of(model, cache, kv_config, (CACHE, "kv_config"))
    session = Session(
        model, kv_config, probe=False, texts=text, compiled=compiled, cache=cache, parts=True
    )
    keeps = config.return_dict_in_generate  # rows that have ended
    # Where rows wait that need not be kept, one for each prompt stands before those that grow.
    first = 0 if keeps or most == rows else len(prompts)
    fill = session.prefill if cache is None else session.resume
    if streamer is not None and not told:
        streamer.put(input_ids.cpu())
    copies = np.ones(first, np.int64) if first else np.bincount(row_prompt)
    logits_pv = torch.stack(fill(prompts, copies))
    session.cache.texts = None  # until it holds the new rows, if it is to: no error may hide it
    if not first:
        session.kv.gather(np.argsort(np.argsort(row_prompt, kind="stable")))

    kinds = [type(x).__name__ for x in (*logits_processor, *stopping_criteria)]
    asked = config.do_sample, keeps, config.output_scores, config.output_logits, most
    session.agree("options of generate", kinds, asked)
    seeds = np.zeros(rows, np.int64)
    if config.do_sample:
        seeds = row_seeds(int(session.first(torch.randint(2**62, ()))), rows)
        seed_b = torch.from_numpy(seeds).to(device)
    length_b = torch.tensor([len(prompts[i]) for i in row_prompt], device=device)
    filters = _fused(logits_processor) if config.do_sample else None
    want_scores = config.return_dict_in_generate and config.output_scores
    want_logits = config.return_dict_in_generate and config.output_logits
    all_scores, all_logits = () if want_scores else None, () if want_logits else None
    ahead = None
    if not (want_scores or want_logits or streamer) and usable(session, graph):
        greedy = None if logits_processor else {"temperature": 0.0}
        ahead = _ahead(session, filters if config.do_sample else greedy, stopping_criteria)
    pad = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
    prompt_length, begun, parts = input_ids.shape[1], input_ids, []
    for wave in np.split(np.arange(rows), range(most, rows, most)):
        active, input_ids = torch.from_numpy(wave).to(device), begun
        over = torch.ones(rows, dtype=torch.bool, device=device)  # once stopped, always stopped
        over[active] = False
        if first:
            session.kv.gather([*range(first), *row_prompt[wave]])
        logits = logits_pv[torch.from_numpy(row_prompt[wave]).to(device)]
        while True:
            step = input_ids.shape[1] - prompt_length
            next_tokens = torch.full((rows,), pad, dtype=input_ids.dtype, device=device)
            if filters is None or want_scores or want_logits:
                logits = session.whole(logits)
            if want_logits:
                all_logits = _noted(all_logits, step, logits.to(torch.float32), active, rows, pad)
            if filters is not None and not want_scores:
                position = length_b[active] + step
                chosen = session.sample(logits, seed_b[active], position, **filters)[0]
            else:
                raw = logits.to(torch.float32)
                scores = logits_processor(input_ids, _spread(raw, active, rows, pad, copy=True))
                if want_scores:
                    all_scores = _noted(all_scores, step, scores[active], active, rows, pad)
                if config.do_sample:
                    position = length_b[active] + step
                    chosen = session.sample(scores[active], seed_b[active], position)[0]
                else:
                    best, chosen = scores[active].max(-1)
                    chosen = session.first(torch.where(best.isfinite(), chosen, -1))
            drawn(chosen.cpu(), step, active.cpu())
            next_tokens[active] = chosen.to(input_ids.dtype)
            input_ids = torch.cat([input_ids, next_tokens[:, None]], 1)
            if streamer is not None and most == rows:
                streamer.put(next_tokens.cpu())
            stops = stopping_criteria(input_ids, all_scores and all_scores[: step + 1])
            over |= session.first(stops)
            done = over[active]
            if done.all():
                break
            if pads and done.any():  # else generate lets rows run on until all are done
                stay = (~done).nonzero()[:, 0]
                if not keeps:
                    session.kv.gather([*range(first), *(first + stay).tolist()])
                active = active[stay]
            live = active.cpu().numpy()
            if ahead is not None:
                decoder, longest = ahead
                new = np.full((rows, longest - input_ids.shape[1]), pad)
                batch = np.arange(rows) if keeps else np.append(np.zeros(first, np.int64), live)
                live = live if keeps else first + np.arange(len(live))
                tokens = input_ids[torch.from_numpy(batch).to(device), -1].cpu().numpy()
                width = _finish(decoder, tokens, live, batch, seeds, new)
                new = torch.from_numpy(new[:, :width]).to(input_ids)
                input_ids = torch.cat([input_ids, new], 1)
                break
            counts = np.zeros(session.kv.rows, np.int32)
            counts[live if keeps else slice(first, None)] = 1
            logits = session.extend(input_ids[active, -1], counts)
        parts.append((wave, input_ids))
    if most < rows:
        width = max(ids.shape[1] for _, ids in parts)
        input_ids = torch.nn.functional.pad(begun, (0, width - prompt_length), value=pad)
        for wave, ids in parts:
            input_ids[wave, : ids.shape[1]] = ids[wave]
        for column in input_ids.T[prompt_length:] if streamer is not None else ():
            streamer.put(column.cpu())
    if streamer is not None:
        streamer.end()
    if not keeps:
        return input_ids
    ends = session.kv.lengths.tolist()
    session.cache.texts = [text(row)[: end + 1] for row, end in enumerate(ends)]
    session.cache.prompt_lengths = length_b.tolist()
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=all_scores, logits=all_logits, **{CACHE: session.cache}
    )


def _ahead(
    session: Session, filters: dict[str, float] | None, criteria: StoppingCriteriaList
) -> tuple[Decoder, int] | None:
    """What can run ahead of the host, and the length at which all rows end; None if these filters
    or criteria keep it from that."""
    lengths = [x.max_length for x in criteria if type(x) is MaxLengthCriteria]
    ends = [x.eos_token_id.reshape(-1).tolist() for x in criteria if type(x) is EosTokenCriteria]
    if filters is None or not lengths or len(lengths) + len(ends) != len(criteria):
        return None
    return Decoder(session, filters, [x for each in ends for x in each]), min(lengths)


def _finish(
    decoder: Decoder,
    tokens: np.ndarray,
    live: np.ndarray,
    active: np.ndarray,
    seeds: np.ndarray,
    new: np.ndarray,
) -> int:
    """Let rows grow to their end, ahead of the host.

    Args:
        decoder: over the rows of the cache.
        tokens: that each of them feeds next.
        live: those that grow.
        active: which row of the batch each is.
        seeds: by row of the batch.
        new: [rows, most] where tokens are written to.

    Returns:
        How many columns were.
    """
    decoder.begin()
    kv, flight, done, begun = decoder.session.kv, None, 0, 0
    while True:
        launched, counts = None, np.zeros(kv.rows, np.int32)
        counts[live] = 1
        if len(live) and begun < new.shape[1] and not (flight and kv.selects(counts)):
            launched, begun = decoder.launch(live, tokens[live], seeds[active[live]]), begun + 1
            tokens[:] = -1
        if flight is not None:
            rows, chosen, _ = flight.read()
            new[active[rows], done] = drawn(chosen, done + 1, active[rows])
            stopped = rows[np.isin(chosen, list(flight.stops))]
            live, done = np.setdiff1d(live, stopped), done + 1
            if launched is not None and len(stopped):
                kv.retract(launched.of(stopped))
                launched = launched.without(stopped)
        flight = launched if launched is not None and launched.live.any() else None
        if flight is None and (not len(live) or begun == new.shape[1]):
            return done


def _refuse(
    model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Raise for what `generate` offers and this loop does not, by name."""
    own = model.generation_config  # what it says nobody passed, and generate ignores some of it
    tensor_only = not config.return_dict_in_generate
    refused = {
        "num_beams": config.num_beams not in (None, 1),
        "penalty_alpha": config.penalty_alpha is not None and (config.top_k or 0) > 1,
        "dola_layers": config.dola_layers is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "assistant_model": asked.get("assistant_model") is not None,
        "constraints": getattr(config, "constraints", None) is not None,
        "force_words_ids": getattr(config, "force_words_ids", None) is not None,
        "num_beam_groups": getattr(config, "num_beam_groups", None) not in (None, 1),
        "use_mtp": bool(getattr(config, "use_mtp", False)),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "negative_prompt_ids": asked.get("negative_prompt_ids") is not None,
        "use_cache=False": kwargs.get("use_cache") is False and own.use_cache is not False,
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "cache_implementation": asked.get("cache_implementation") is not None
        or config.cache_implementation not in (None, getattr(own, "cache_implementation", None)),
        "past_key_values (cache) of another kind than kvtools.generate returns": not isinstance(
            asked.get(CACHE), (PagedCache, type(None))
        ),
        "inputs_embeds": asked.get("inputs_embeds") is not None,
        "synced_gpus": bool(asked.get("synced_gpus")),
        "num_return_sequences=0": config.num_return_sequences == 0,
    }
    ours = {"attention_mask", "position_ids", CACHE, "logits_to_keep", "use_cache"}

    def says_nothing(name: str, x: Any) -> bool:  # of inputs beside text
        types = name.endswith("token_type_ids") and not x.any()
        return types or (isinstance(x, dict) and not x)

    for name in ("output_attentions", "output_hidden_states"):
        ours.add(name)
        wanted = getattr(config, name) or kwargs.get(name)
        refused[name] = wanted and not (tensor_only and getattr(own, name))
    for name, x in kwargs.items():
        if name in ours:
            continue
        refused[name] = x is not None and not says_nothing(name, x)
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
    mask = torch.ones_like(input_ids) if mask is None else (mask != 0).to(input_ids)
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


def _noted(
    kept: tuple[Tensor, ...], step: int, x_av: Tensor, active: Tensor, rows: int, pad: int
) -> tuple[Tensor, ...]:
    """With what the active rows have in a step, which others may have been in before."""
    if step == len(kept):
        return (*kept, _spread(x_av, active, rows, pad))
    kept[step][active] = x_av
    return kept


_patching = threading.Lock()


@contextmanager
def patch(
    model: PreTrainedModel,
    config: CacheConfig | None = None,
    *,
    probe: bool = True,
    graph: Graph = "auto",
    rows: int | None = None,
) -> Iterator[PreTrainedModel]:
    """Make `model.generate` run through `kvtools.generate`, for code that calls it itself.

    Args:
        model: a decoder-only transformers model; what torch.compile returned decodes compiled.
            Other models are not affected, and neither are copies of this one.
        config: how keys and values are kept; default `CacheConfig()`, exact.
        probe, graph, rows: see `generate`.

    `generate_batch` is not what runs through kvtools; it warns.

    Counts in all threads, as the model does. Undone on exit, also after an error. Patches may be
    nested and overlap; the newest one counts.
    """
    check_model(model, probe=probe)
    core = getattr(model, "_orig_mod", model)
    entry = (model, config, dict(probe=probe, graph=graph, rows=rows))
    with _patching:
        if not hasattr(type(core), "_kvtools_patches"):
            core.__class__ = _patched(type(core))
        type(core)._kvtools_patches.append(entry)
    try:
        yield model
    finally:
        with _patching:
            patches = type(core)._kvtools_patches
            del patches[next(i for i, x in enumerate(patches) if x is entry)]
            if not patches:
                core.__class__ = type(core).__base__


def _patched(base: type) -> type:
    """A class for one model. The model's own class, not its dictionary, says what `generate` is, so
    that copies and pickles are of `base`, with nothing of ours in them."""

    @property  # before an instance's own attribute
    def generate_(self: Any) -> Any:
        own = self.__dict__.get("generate")
        stock = base.generate.__get__(self) if own is None else own

        def run(*args: Any, **kwargs: Any) -> Any:
            wrapper, *options = type(self)._kvtools_patches[-1]
            return _patched_generate(self, wrapper, stock, *options, args, kwargs)

        return run

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "generate_batch (continuous batching) does not go through kvtools.patch: use generate",
            RuntimeWarning,
            stacklevel=2,
        )
        return base.generate_batch.__get__(self)(*args, **kwargs)

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:
            return (object.__new__, (base,), *reduced[2:])
        return reduced

    body = {"generate": generate_, "__reduce_ex__": __reduce_ex__, "_kvtools_patches": []}
    if hasattr(base, "generate_batch"):
        body["generate_batch"] = generate_batch
    names = ("__module__", "__qualname__", "__doc__")
    return type(base.__name__, (base,), body | {name: getattr(base, name) for name in names})


def _patched_generate(
    model: Any, wrapper: Any, stock: Any, config: CacheConfig | None, options: dict, args: tuple,
    kwargs: dict,
) -> Any:  # fmt: skip
    if kwargs.get("custom_generate") is not None:
        raise ValueError(
            "custom_generate cannot be combined with kvtools.patch: use one of the two"
        )
    if kwargs.get("cache_implementation") == "paged":  # generate would leave before our loop
        raise ValueError("kvtools.generate does not support cache_implementation: leave it out")
    streamer = kwargs.pop("streamer", None)
    # generate loses the tokenizer on the way to a custom loop, so stop strings are resolved here.
    tokenizer = kwargs.pop("tokenizer", None)
    given = kwargs.get("generation_config")
    wishes = [kwargs.pop("stop_strings", None)]
    wishes += [getattr(x, "stop_strings", None) for x in (given, model.generation_config)]
    strings = next((x for x in wishes if x is not None), None)
    target = model
    if strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the model's tokenizer: pass tokenizer=")
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
        kwargs["stopping_criteria"] = criteria
        criteria.append(StopStringCriteria(tokenizer, strings))
        if given is not None:
            kwargs["generation_config"] = _without_strings(given)
        if wishes[-1] is not None:  # generate fills in what is None from the model's own
            target = copy(model)
            target.generation_config = _without_strings(model.generation_config)

    def loop(_: Any, *args: Any, **kwargs: Any) -> Any:
        return generate(wrapper, *args, kv_config=config, streamer=streamer, **options, **kwargs)

    run = stock if target is model else type(target).generate.__get__(target)
    return run(*args, custom_generate=loop, **kwargs)


def _without_strings(config: GenerationConfig) -> GenerationConfig:
    config = copy(config)
    config.stop_strings = None
    return config
