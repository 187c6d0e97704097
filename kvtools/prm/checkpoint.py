"""Checkpoints of process reward models, loaded without running code that came with them."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import cached_file

from .. import models
from .qwen import Headed, Qwen2ForProcessRewardModel

FILES = ("model.safetensors", "pytorch_model.bin")


def read(name: str, dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """The model and the tokenizer of a folder or a name on the hub.

    Raises:
        ValueError: a tensor of the model or its head is missing, or code of its own is needed.
    """
    tokenizer = models.pretrained(AutoTokenizer, name)
    architecture = (models.pretrained(AutoConfig, name).architectures or [""])[0]
    heads = tensors(name, ("v_head.summary.", "score_head."))
    kind: Any = AutoModelForCausalLM
    if architecture == "Qwen2ForProcessRewardModel":
        kind = Qwen2ForProcessRewardModel
    elif architecture.endswith("ForTokenClassification"):
        kind = AutoModelForTokenClassification
    elif any("score_head." in key for key in heads):
        kind = AutoModel
    # A value head stands beside the language-model head, which such checkpoints may lack.
    model = models.whole(kind, name, dtype, unused=("lm_head.",) if heads else ())
    if heads:
        layer = linear(heads, model.dtype)
        if kind is AutoModel:
            model = Headed(model, "score_head", layer)
        else:
            model = Headed(model, "v_head", nn.ModuleDict({"summary": layer}))
    return model.eval(), tokenizer


def linear(tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
    """A layer of a weight and, if there is one, a bias."""
    weight = next((x for key, x in tensors.items() if key.endswith("weight")), None)
    if weight is None:
        raise ValueError(f"the checkpoint has {', '.join(tensors)} but no weight beside it")
    bias = next((x for key, x in tensors.items() if key.endswith("bias")), None)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def tensors(name: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose keys hold one of `parts`."""

    def find(file: str) -> str | None:
        return cached_file(
            name, file, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip

    def wanted(key: str) -> bool:
        return any(part in key for part in parts)

    found: dict[str, Tensor] = {}
    for file in FILES:
        index, shards = find(f"{file}.index.json"), {file}
        if index is not None:
            with open(index, encoding="utf-8") as source:
                weights = json.load(source)["weight_map"]
            shards = {shard for key, shard in weights.items() if wanted(key)}
        for path in filter(None, map(find, sorted(shards))):
            if path.endswith(".safetensors"):
                from safetensors import safe_open

                with safe_open(path, "pt") as shard:
                    found |= {key: shard.get_tensor(key) for key in shard.keys() if wanted(key)}  # noqa: SIM118
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                found |= {key: x for key, x in loaded.items() if wanted(key)}
        if found:
            break
    return found
