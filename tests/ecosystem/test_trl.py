"""trl: trainers that sample through kvtools, beside the same ones without it."""

import copy
import time
import warnings

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from examples import example  # noqa: E402

import kvtools  # noqa: E402
from kvtools import CacheConfig  # noqa: E402
from kvtools.integrations.trl import patch  # noqa: E402

TRAINERS = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig),
}
GREEDY = dict(do_sample=False)  # with top_k=1 torch's generator, and batches with it, differ


@pytest.fixture
def trainer(tmp_path, tokenizer, words, model):
    """Makes one over `model`, two prompts to a step and eight samples of each."""

    def make(kind="GRPO", tokens=8, length=60, model=model, steps=2, peft_config=None, **options):
        cls, config = TRAINERS[kind]
        if options.get("beta") and peft_config is None:  # the reference is loaded by name
            model.save_pretrained(tmp_path / "reference")
            model.config._name_or_path = str(tmp_path / "reference")
        prompts = words(*range(length, length + 2 * steps))
        defaults = dict(
            output_dir=str(tmp_path), max_steps=steps, num_generations=8, bf16=False,
            per_device_train_batch_size=16, max_completion_length=tokens, report_to=[],
            use_cpu=True, learning_rate=1e-3, logging_strategy="no", save_strategy="no", seed=3,
            disable_tqdm=True, beta=0.0,
        )  # fmt: skip
        return cls(
            model, reward_funcs=lambda completions, **_: [i % 3.0 for i in range(len(completions))],
            args=config(**defaults | options), processing_class=tokenizer, peft_config=peft_config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )  # fmt: skip

    return make


class Heard:
    """What each `generate` of a model gave, and the time it took the processor."""

    def __init__(self, monkeypatch, *classes):
        self.calls, self.seconds = [], []
        for cls in classes:
            stock = cls.generate

            def generate(model, *args, stock=stock, **kwargs):
                begin = time.process_time()
                out = stock(model, *args, **kwargs)
                self.seconds.append(time.process_time() - begin)
                self.calls.append(out.clone())
                return out

            monkeypatch.setattr(cls, "generate", generate)


def train(trainer, monkeypatch, config=None, through=True):
    """What the steps of a trainer sampled, and what became of the weights. Everything else of the
    model must be as it was."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    before = type(model), vars(model).keys(), model.config.to_dict()
    generation = model.generation_config.to_dict()
    loops = []
    stock = kvtools.hf.generate.__globals__["_generate"]
    with monkeypatch.context() as context:
        heard = Heard(context, type(model))
        context.setitem(
            kvtools.hf.generate.__globals__, "_generate",
            lambda *args: loops.append(1) or stock(*args),
        )  # fmt: skip
        if through:
            with patch(trainer, config) as same:
                assert same is trainer
                trainer.train()
        else:
            trainer.train()
    assert len(loops) == (len(heard.calls) if through else 0)
    assert (type(model), vars(model).keys(), model.config.to_dict()) == before
    assert model.generation_config.to_dict() == generation
    weights = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    return heard, weights


LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize(
    "kind, lora, options",
    [
        ("GRPO", None, {}),
        ("RLOO", None, {}),
        ("GRPO", LORA, {}),
        ("RLOO", LORA | dict(lora_dropout=0.0), dict(gradient_checkpointing=True)),
        ("GRPO", None, dict(gradient_checkpointing=True, repetition_penalty=1.1)),
        ("GRPO", None, dict(bf16=True)),  # autocast over float32 weights
    ],
    ids=["grpo", "rloo", "grpo-lora", "rloo-lora-checkpointing", "grpo-checkpointing", "autocast"],
)
def test_training_is_that_without(kind, lora, options, trainer, model, monkeypatch, record):
    """Greedily: the same tokens in every step, hence the same weights."""
    found = []
    for through in (False, True):
        torch.manual_seed(7)
        made = trainer(
            kind, model=copy.deepcopy(model), steps=5 if (kind, lora, options) == ("GRPO", None, {})
            else 2, peft_config=lora and peft.LoraConfig(**lora), generation_kwargs=GREEDY,
            **options,
        )  # fmt: skip
        found.append(train(made, monkeypatch, through=through))
    (stock, wanted), (ours, weights) = found
    assert len(stock.calls) == len(ours.calls) == made.args.max_steps
    for got, want in zip(ours.calls, stock.calls, strict=True):
        assert torch.equal(got, want)
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-3, atol=1e-5)
    said = ", ".join([kind, *(["LoRA"] if lora else []), *(f"{k}={v}" for k, v in options.items())])
    for package in ["trl", *(["peft"] if lora else [])]:
        what = f"8 samples of a prompt, greedily: {said}, {made.args.max_steps} steps"
        record(package, what, "tokens and weights as without")


def test_online_dpo(model, tokenizer, words, tmp_path, monkeypatch, record):
    """Two samples of each prompt, of which one is preferred: the same as without."""
    online = pytest.importorskip("trl.experimental.online_dpo")

    def trainer(**options):
        torch.manual_seed(7)
        return online.OnlineDPOTrainer(
            copy.deepcopy(model),
            reward_funcs=lambda completions, **_: [i % 3.0 for i in range(len(completions))],
            args=online.OnlineDPOConfig(
                output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, bf16=False,
                max_new_tokens=8, report_to=[], use_cpu=True, learning_rate=1e-3, seed=3,
                logging_strategy="no", save_strategy="no", disable_tqdm=True,
                generation_kwargs=GREEDY | options,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": words(*range(60, 68))}),
        )  # fmt: skip

    cached = dict(use_cache=True)  # by itself it turns that off beside gradient checkpointing
    found = [train(trainer(**cached), monkeypatch, through=x) for x in (False, True)]
    (stock, wanted), (ours, weights) = found
    assert len(stock.calls) == len(ours.calls) == 2
    for got, want in zip(ours.calls, stock.calls, strict=True):
        assert torch.equal(got, want)
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-3, atol=1e-5)
    record(
        "trl",
        "two samples of a prompt, greedily: online DPO, 2 steps",
        "tokens and weights as without",
    )
    with pytest.raises(ValueError, match="use_cache=False .* generation_kwargs"), patch(trainer()):
        pass


def test_adapters_count(trainer, model, monkeypatch):
    """With the adapter's weights at zero the tokens are others."""
    tokens = []
    for scale in (1, 0):
        torch.manual_seed(7)
        made = trainer(
            steps=1, peft_config=peft.LoraConfig(**LORA, lora_alpha=64), generation_kwargs=GREEDY
        )
        with torch.no_grad():
            for name, x in made.model.named_parameters():
                if "lora_B" in name:
                    x *= scale
        heard, _ = train(made, monkeypatch)
        tokens.append(heard.calls[0])
        made.model.unload()
    assert not torch.equal(*tokens)


def test_samples_and_a_compressed_cache(trainer, monkeypatch, record):
    made = trainer(steps=1)
    heard, _ = train(made, monkeypatch, CacheConfig.preset("balanced"))
    assert len({tuple(x) for x in heard.calls[0].tolist()}) > 8
    record("trl", "GRPO with preset `balanced`", "trains")


@pytest.mark.long
def test_generation_is_faster(trainer, larger, monkeypatch, record):
    """Two prompts of 512 tokens, encoded and read once for eight samples each."""
    seconds = {}
    for through in (False, True):
        made = trainer(model=copy.deepcopy(larger), length=512, tokens=16)
        seconds[through] = min(train(made, monkeypatch, through=through)[0].seconds)
    ratio = seconds[False] / seconds[True]
    what = (
        "GRPO, 8 samples of two prompts of 512 tokens, time of `generate` over that with kvtools "
        "(4 layers of 384)"
    )
    record("trl", what, f"{ratio:.1f}", ratio, 4)
    assert ratio > 2.5, seconds  # 4 and more where nothing else runs


SCORES = "_get_per_token_logps_and_entropies"


@pytest.mark.parametrize(
    "kind, lora, options",
    [
        ("GRPO", None, dict(beta=0.1, steps_per_generation=2, temperature=0.7)),
        ("GRPO", LORA, dict(beta=0.1)),  # the reference is the model without adapters
        ("RLOO", None, dict(beta=0.1, bf16=True, mask_truncated_completions=True, tokens=64)),
    ],
    ids=["grpo", "grpo-lora", "rloo-autocast"],
)
def test_log_probabilities_are_those_of_the_trainer(kind, lora, options, trainer, record):
    """Old ones and those of the reference, beside the trainer's own of the same completions; and
    the trainer's own alone where there are gradients."""
    options = dict(tokens=8) | options
    made = trainer(
        kind, length=40, peft_config=lora and peft.LoraConfig(**lora), learning_rate=1e-2, **options
    )
    asked, loops, stock = [], [], getattr(made, SCORES)
    module = __import__("sys").modules["kvtools.integrations.trl"]

    def beside(*args, **kwargs):
        before = len(loops)
        found = ours(*args, **kwargs)
        asked.append((torch.is_grad_enabled(), len(loops) - before))
        if not torch.is_grad_enabled():
            close = dict(rtol=0, atol=0.1 if made.args.bf16 else 1e-4)
            kwargs |= dict(compute_entropy=args[0] is made.model)  # a reference has none
            wanted, again = stock(*args, **kwargs), ours(*args, **kwargs)
            assert torch.equal(again[0], found[0])
            torch.testing.assert_close(again[:2], wanted[:2], **close)
            assert (found[0] != 0).any()
        return found

    likelihood = module.likelihood
    with pytest.MonkeyPatch.context() as context:
        context.setattr(
            module, "likelihood",
            lambda *a, **k: loops.append(torch.is_autocast_enabled("cpu")) or likelihood(*a, **k),
        )  # fmt: skip
        with patch(made, logprobs=True):
            ours = getattr(made, SCORES)
            setattr(made, SCORES, beside)
            made.train()
    assert SCORES not in vars(made)
    assert {(True, 0), (False, 1)} == set(asked) and {*loops} == {made.args.bf16}
    said = ", ".join([kind, *(["LoRA"] if lora else []), *(f"{k}={v}" for k, v in options.items())])
    record("trl", f"logprobs=True: {said}", "log-probabilities as without")


@pytest.mark.long
def test_log_probabilities_are_faster(trainer, larger, record):
    """A prompt of 512 tokens is encoded once for its eight completions."""
    made = trainer(model=larger, length=512, tokens=16)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(97, 123, (16, 528), generator=rng)
    ids[:8, :512], ids[8:, :512] = ids[0, :512], ids[8, :512]
    args = made.model, ids, torch.ones_like(ids), 16
    found, seconds = [], []
    with torch.no_grad(), patch(made, logprobs=True):
        for score in (type(made).__dict__[SCORES].__get__(made), getattr(made, SCORES)) * 3:
            begin = time.process_time()
            found.append(score(*args)[0])
            seconds.append(time.process_time() - begin)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    ratio = min(seconds[::2]) / min(seconds[1::2])
    what = (
        "logprobs=True, GRPO, 8 completions of 16 tokens after each of two prompts of 512, time of "
        "the trainer's own over that with kvtools (4 layers of 384)"
    )
    record("trl", what, f"{ratio:.1f}", ratio, 4)
    assert ratio > 3, seconds


def test_log_probabilities_that_cannot_be_taken_are_refused(trainer, model):
    made = trainer(cast_lm_head_to_fp32=True)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32"), patch(made, logprobs=True):
        pass
    other = type("Trainer", (), dict(accelerator=made.accelerator, model=model, args=made.args))()
    refused = pytest.raises(ValueError, match="logprobs=True: a Trainer has no")
    with refused, patch(other, logprobs=True):
        pass


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cache_implementation="static"), "cache_implementation='static' .* leave it out"),
        (dict(generation_kwargs=dict(cache_implementation="static")), "cache_implementation"),
        (dict(use_transformers_continuous_batching=True),
         "use_transformers_continuous_batching=True: samples come from generate_batch"),
    ],
)  # fmt: skip
def test_what_does_not_go_through_is_refused(options, message, trainer, record):
    made = trainer(**options)
    before = type(made.model)
    with pytest.raises(ValueError, match=message), patch(made):
        pass
    assert type(made.model) is before
    record(
        "trl", f"in the trainer's arguments: `{next(iter(options))}`", "refused, with the remedy"
    )


def test_no_trainer():
    with pytest.raises(TypeError, match="trainer is a dict: pass a trainer"), patch({}):
        pass


def test_patch_alone_warns_of_generate_batch(model, monkeypatch):
    """Which stays transformers' own, here without its large cache."""
    monkeypatch.setattr(type(model), "generate_batch", lambda model, *args: (model, *args))
    with kvtools.patch(model), pytest.warns(RuntimeWarning, match="generate_batch"):
        assert model.generate_batch([[5]]) == (model, [[5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate_batch([[5]])


def test_example(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(example("grpo").main(str(tmp_path), steps=2, tokens=4, n=2)) == 2
