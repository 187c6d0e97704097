"""Qwen2.5-Math-PRM's model class; the one in its checkpoint breaks with current transformers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
    """Qwen2 with a head of two layers that tells wrong steps (0) from right ones (1) at every
    token. `from_pretrained` loads the published checkpoints without running their code."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"lm_head"]

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        m = config.hidden_size
        self.score = nn.Sequential(nn.Linear(m, m), nn.ReLU(), nn.Linear(m, 2))
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> TokenClassifierOutput:
        hidden = self.model(input_ids, **options).last_hidden_state
        return TokenClassifierOutput(logits=self.score(hidden.to(self.score[0].weight.dtype)))


class Headed(nn.Module):
    """A model and a head beside it, as trl and ReasonEval keep them."""

    def __init__(self, pretrained_model: Any, name: str, head: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.config = pretrained_model, pretrained_model.config
        self.add_module(name, head)

    @property
    def device(self) -> torch.device:
        return self.pretrained_model.device
