"""Weights that other packages have quantised: what models say with them without kvtools, by all
doors."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import kvtools
from kvtools import prm
from kvtools.prm.layouts import Tagged


def torchao(kind):
    def quantised(model, folder):
        package = pytest.importorskip("torchao")
        package.quantize_(model, getattr(package.quantization, kind)())
        return model

    return quantised


def hqq(bits):
    def quantised(model, folder):
        pytest.importorskip("hqq")
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        AutoHQQHFModel.quantize_model(
            model, quant_config=BaseQuantizeConfig(nbits=bits, group_size=32),
            compute_dtype=torch.float32, device="cpu",
        )  # fmt: skip
        return model

    return quantised


def bitsandbytes(**options):
    def quantised(model, folder):
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=transformers.BitsAndBytesConfig(**options),
            dtype=torch.float32, device_map="cpu",
        )  # fmt: skip

    return quantised


# How far log-probabilities may be from those of a forward. Activations that are quantised, too, are
# rounded to one side or the other of what is the same but for the order of sums; and bitsandbytes
# rounds what 4-bit layers give to bfloat16 on processors that have it.
KINDS = {
    ("torchao", "Int8WeightOnlyConfig"): (torchao("Int8WeightOnlyConfig"), 1e-4),
    ("torchao", "Int8DynamicActivationInt8WeightConfig"): (
        torchao("Int8DynamicActivationInt8WeightConfig"), 0.1
    ),
    ("hqq", "nbits=4"): (hqq(4), 1e-4),
    ("hqq", "nbits=8"): (hqq(8), 1e-4),
    ("bitsandbytes", "load_in_8bit=True, llm_int8_threshold=0.0"): (
        bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0), 0.1
    ),
    ("bitsandbytes", "load_in_4bit=True, bnb_4bit_quant_type='nf4'"): (
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.02
    ),
}  # fmt: skip
IDS = torch.arange(40, 80).view(2, 20)
NEW = 10


@dataclass
class Reader(Tagged):
    """Read at a tag, by two rows of the LM head."""

    tag: ClassVar[str] = bytes_to_unicode()[0]
    reduce: ClassVar[str] = "min"

    def text(self, question, steps):
        return question + "".join(step + Reader.tag for step in steps)

    def head(self, model, reference=None):
        return self.rows_of(model, "+", "-")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_as_without(kind, model, tokenizer, tmp_path, record):
    quantise, close = KINDS[kind]
    model = quantise(model, tmp_path).eval()
    model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        wanted = model.generate(IDS, **options)
        logits = model(wanted).logits.float().log_softmax(-1)[:, IDS.shape[1] - 1 : -1]
    new = wanted[:, IDS.shape[1] :]
    assert torch.equal(model.generate(IDS, custom_generate=kvtools.generate, **options), wanted)
    with kvtools.patch(model):
        assert torch.equal(model.generate(IDS, **options), wanted)
    rollouts = kvtools.Rollouts(model, temperature=0.0)
    rollouts.prefill(IDS.tolist(), n=1)
    rollouts.generate(max_new_tokens=NEW)
    assert rollouts.tokens == wanted.tolist()
    found = kvtools.logprobs(model, IDS.tolist(), [[x.tolist()] for x in new])
    found = torch.stack([x for (x,) in found.logprobs])
    torch.testing.assert_close(found, logits.gather(2, new[..., None])[..., 0], rtol=0, atol=close)

    steps = [["one step", "two"], ["one step", "another, longer", "end"]]
    scores = prm.load(model, tokenizer, Reader).score("What?", steps).probs
    for each, got in zip(steps, scores, strict=True):
        ids = tokenizer(Reader.text(None, "What?", each), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = model(ids).logits[0, ids[0] == 0][:, [ord("+"), ord("-")]].softmax(-1)[:, 0]
        torch.testing.assert_close(torch.as_tensor(got), said, rtol=0, atol=close)
    package, options = kind
    what = f"by generate, patch, Rollouts, logprobs, prm.load: {options}"
    record(package, what, "tokens and scores as without")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_outliers_that_depend_on_the_batch_are_refused(model, tmp_path, record):
    """As LLM.int8 has it by default; without the probe it runs."""
    model = bitsandbytes(load_in_8bit=True)(model, tmp_path).eval()
    model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=NEW, do_sample=False)
    refused = pytest.raises(ValueError, match="load it with llm_int8_threshold=0.0, or .*probe=")
    with refused, kvtools.patch(model):
        pass
    with kvtools.patch(model, probe=False):
        assert model.generate(IDS, **options).shape == (2, IDS.shape[1] + NEW)
    record(
        "bitsandbytes", "load_in_8bit=True, llm_int8_threshold=6.0, where outliers count",
        "refused, with the remedy",
    )  # fmt: skip
