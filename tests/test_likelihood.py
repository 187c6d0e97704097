"""Log-probabilities of given completions."""

import numpy as np
import pytest
import torch
from models import Counter, fresh_model, random_ids, tiny_model
from test_door import MODELS
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import kvtools
from kvtools import CacheConfig
from kvtools.hf import check_model, heads
from kvtools.hf import session as sessions
from kvtools.testing import assert_within_budget


def case(seed=0):
    """Prompts that begin alike, one of them twice; completions of many lengths, also of none."""
    stem = random_ids(40, seed=9)
    prompts = [torch.cat([stem[:n], random_ids(m, seed=m)]) for n, m in ((40, 5), (40, 9), (0, 20))]
    prompts = [*prompts, prompts[1]]
    lengths = [(5, 1, 12), (30,), (), (0, 3)]
    texts = [[random_ids(n, seed=seed + n + 50) for n in each] for each in lengths]
    return prompts, texts


def plain(model, prompt, completion, temperature=1.0):
    """Of one text by itself."""
    ids = torch.cat([prompt, completion])[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprob = (logits / temperature).log_softmax(-1)
    own = logprob.gather(1, completion[:, None])[:, 0]
    return own, -(logprob.exp() * logprob).sum(-1), logprob.argmax(-1) == completion


def check(found, model, prompts, texts, bound, temperature=1.0):
    for i, prompt in enumerate(prompts):
        assert len(found.logprobs[i]) == len(found.entropies[i]) == len(texts[i])
        each = zip(found.logprobs[i], found.entropies[i], found.greedy[i], texts[i], strict=True)
        for got, entropy, greedy, text in each:
            want = plain(model, prompt, text, temperature)
            torch.testing.assert_close(got, want[0], atol=bound, rtol=bound)
            torch.testing.assert_close(entropy, want[1], atol=bound, rtol=bound)
            assert torch.equal(greedy, want[2])


@pytest.mark.parametrize(
    "name, rows, apart",
    [
        ("llama", 64, True), ("llama", 1, False), ("gemma2", 2, True), ("gemma2", 64, False),
        ("gemma3", 1, True), ("gemma3", 2, False), ("gptoss", 64, True), ("gptoss", 2, False),
    ],
)  # fmt: skip
def test_as_each_text_by_itself(name, rows, apart, monkeypatch):
    """Whether its head can be run by itself or not."""
    monkeypatch.setattr(sessions, "LOGITS", 256 * 7)
    model, (prompts, texts) = tiny_model(name), case()
    door, done = check_model(model), []
    monkeypatch.setattr(door, "apart", None if apart else False)
    found = kvtools.logprobs(
        model, prompts, texts, temperature=1.3, rows=rows, progress=done.append
    )
    check(found, model, prompts, texts, 2e-4, 1.3)
    assert done[-1] == 6 and done == sorted(done)
    assert bool(door.apart) == apart


def test_each_token_is_encoded_once():
    model, (prompts, texts) = tiny_model(), case()
    kvtools.logprobs(model, [[5]], [[[5]]])  # finds out whether its head can be run by itself
    with Counter(model) as count:
        kvtools.logprobs(model, prompts, texts)
    # The third prompt has no completion; of completions, the last tokens say nothing.
    assert sum(count.forwards) == 40 + 5 + 9 + (4 + 0 + 11 + 29 + 0 + 2)


@pytest.mark.parametrize("most", [256 * 7, 1 << 24])
def test_logits_are_made_of_few_tokens_at_a_time(most, monkeypatch):
    monkeypatch.setattr(sessions, "LOGITS", most)
    model, (prompts, texts) = fresh_model(), case()
    heads, bodies = [], []
    model.lm_head.register_forward_hook(lambda m, args, out: heads.append(out[0].shape[0]))
    model.model.layers[0].register_forward_hook(lambda m, args, out: bodies.append(len(args)))
    kvtools.logprobs(model, prompts, texts)
    assert max(heads) * 256 <= most
    before = len(bodies)
    kvtools.logprobs(model, prompts, texts)
    assert len(bodies) - before == 3, "a stem, what follows it, and all completions"


class Biased(LlamaForCausalLM):
    """Its logits depend on more than hidden states."""

    def forward(self, input_ids=None, **how):
        out = super().forward(input_ids=input_ids, **how)
        out.logits[..., 7] += input_ids[:, -out.logits.shape[1] :] % 5
        return out


def test_a_head_that_cannot_be_run_by_itself():
    torch.manual_seed(0)
    model, (prompts, texts) = Biased(tiny_model().config).eval(), case()
    found = kvtools.logprobs(model, prompts, texts)
    assert check_model(model).apart is False
    check(found, model, prompts, texts, 2e-4)


def own_forward(model):
    model.forward = lambda *args, stock=model.forward, **how: stock(*args, **how)


def hook(model):
    def more(module, args, kwargs, out):
        ids = args[0] if args else kwargs["input_ids"]
        out.logits[..., 7] += ids[:, -out.logits.shape[1] :] % 5

    model.register_forward_hook(more, with_kwargs=True)


def pre_hook(model):
    def other(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        return (), kwargs | {"input_ids": ids ^ 1}

    model.register_forward_pre_hook(other, with_kwargs=True)


@pytest.mark.parametrize("change", [
    own_forward, hook, pre_hook, lambda model: setattr(model, "__class__", Biased),
], ids=["forward", "hook", "pre_hook", "class"])  # fmt: skip
def test_a_model_that_is_changed_after_its_head_was_run_by_itself(change):
    """A wrapper, a hook or another class that comes later counts."""
    model, (prompts, texts) = fresh_model(), case()
    kvtools.logprobs(model, [[5]], [[[5]]])
    assert check_model(model).apart
    change(model)
    found = kvtools.logprobs(model, prompts[:1], texts[:1])
    check(found, model, prompts[:1], texts[:1], 2e-4)


class Masked(LlamaForCausalLM):
    """Writes to its logits, where they lie."""

    def forward(self, input_ids=None, **how):
        out = super().forward(input_ids=input_ids, **how)
        out.logits[..., 3:9] = -99.0
        return out


class Scaled(LlamaForCausalLM):
    def forward(self, input_ids=None, **how):
        out = super().forward(input_ids=input_ids, **how)
        out.logits = out.logits / 4
        return out


class Wider(LlamaForCausalLM):
    """Its head is given something else than hidden states."""

    def forward(self, input_ids=None, logits_to_keep=0, **how):
        how.pop("use_cache", None)
        hidden = self.model(input_ids=input_ids, **how).last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutput(logits=self.lm_head(3 * hidden))


def parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", torch.nn.Tanh())


def biased(model):
    model.lm_head.bias = torch.nn.Parameter(torch.randn(len(model.lm_head.weight)))


def into(kind):
    return lambda model: setattr(model, "__class__", kind)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out - out[..., :1].abs())


def wrapped(model):
    model.lm_head.forward = lambda x, stock=model.lm_head.forward: 2 * stock(x)


@pytest.mark.parametrize("change, made", [
    (lambda model: None, False), (biased, False), (into(Wider), False), (into(Masked), True),
    (into(Scaled), True), (hooked, True), (wrapped, True), (parametrized, True),
    (lambda model: model.double(), True), (lambda model: model.bfloat16(), True),
], ids=["plain", "bias", "wider", "masked", "scaled", "hook", "forward", "parametrized",
        "float64", "bfloat16"])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_are_left_out_where_a_product_is_last(change, made, mode, monkeypatch):
    model, (prompts, texts) = fresh_model(), case()
    change(model)
    seen, op = [], heads.token_logprobs
    monkeypatch.setattr(heads, "token_logprobs", lambda *a, **how: seen.append(1) or op(*a, **how))
    with mode():
        found = kvtools.logprobs(model, prompts[:1], texts[:1], temperature=0.7)
    assert bool(seen) != made and check_model(model).apart
    check(found, model, prompts[:1], texts[:1], 0.1 if model.dtype == torch.bfloat16 else 2e-4, 0.7)


class Overwritten(LlamaForCausalLM):
    """Writes to its logits, and no version tells."""

    def forward(self, input_ids=None, **how):
        out = super().forward(input_ids=input_ids, **how)
        out.logits.data[..., 3:9] = -99.0
        return out


class Halved(LlamaForCausalLM):
    """Its head runs under autocast of its own."""

    def forward(self, input_ids=None, logits_to_keep=0, **how):
        how.pop("use_cache", None)
        hidden = self.model(input_ids=input_ids, **how).last_hidden_state[:, -logits_to_keep:]
        with torch.autocast("cpu", torch.bfloat16):
            return CausalLMOutput(logits=self.lm_head(30 * hidden).float())


@pytest.mark.parametrize("kind", [Overwritten, Halved])
def test_a_head_that_only_looks_like_a_product(kind):
    """Found out the first time; another class is tried again."""
    model, (prompts, texts) = fresh_model(), case()
    found = kvtools.logprobs(model, prompts[:1], texts[:1])
    assert check_model(model).product
    model.__class__ = kind
    found = kvtools.logprobs(model, prompts[:1], texts[:1], temperature=0.7)
    assert check_model(model).product is False
    check(found, model, prompts[:1], texts[:1], 2e-4, 0.7)


@pytest.mark.parametrize("tried", [False, True])
def test_hooks_around_all_modules_count(tried):
    model, (prompts, texts) = fresh_model(), case()
    if tried:
        kvtools.logprobs(model, prompts[:1], texts[:1])
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out / 2 if module is model.lm_head else None
    )
    try:
        found = kvtools.logprobs(model, prompts[:1], texts[:1])
        check(found, model, prompts[:1], texts[:1], 2e-4)
    finally:
        hook.remove()


def test_logits_under_autocast_are_those_of_autocast():
    model, (prompts, texts) = fresh_model(), case()
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = kvtools.logprobs(model, prompts[:1], [texts[0][:1]]).logprobs[0]
        want = plain(model, prompts[0], texts[0][0])[0]
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


def test_as_near_to_the_truth_as_torch():
    """Where logits are large, and so many that their probabilities are not one together."""
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(8, 60_000) + 100, torch.arange(8)

    def plain(logits):
        logp = logits.log_softmax(-1)
        return logp[target, target], -(logp.exp() * logp).sum(-1)

    found = heads.likelihood(logits, target, 1.0).unbind(1)[:2]
    for name, *each in zip(
        ("logprob", "entropy"), found, plain(logits.double()), plain(logits), strict=True
    ):
        assert_within_budget(name, *each)


def test_a_float64_model():
    model, (prompts, texts) = fresh_model().double(), case()
    found = kvtools.logprobs(model, prompts, texts)
    assert found.logprobs[0][0].dtype == torch.float64
    check(found, model, prompts, texts, 1e-6)


def test_a_policy_and_its_reference():
    models, (prompts, texts) = [tiny_model(), tiny_model("qwen3")], case()
    for model, found in zip(models, kvtools.logprobs(models, prompts, texts), strict=True):
        check(found, model, prompts, texts, 2e-4)


def test_texts_that_pass_a_switch():
    """longrope: a token's place in its text decides, as when it is sampled."""
    model = MODELS["longrope past its switch"]()
    prompt, text = random_ids(40), random_ids(20, seed=3)
    got = kvtools.logprobs(model, [prompt], [[text, text[:4]]]).logprobs[0]
    ids = torch.cat([prompt, text])
    with torch.no_grad():
        want = [
            float(model(ids[None, :at]).logits[0, -1].log_softmax(-1)[ids[at]])
            for at in range(40, 60)
        ]
    assert got[0].tolist() == pytest.approx(want, abs=2e-3)
    assert got[1].tolist() == pytest.approx(want[:4], abs=2e-3)


def test_a_compressed_cache_is_near():
    model, (prompts, texts) = tiny_model(), case()
    found = kvtools.logprobs(model, prompts, texts, CacheConfig(bits=8))
    check(found, model, prompts, texts, 0.3)


def test_half_precision_and_what_a_model_rules_out():
    model = fresh_model().bfloat16()
    prompts, texts = case()
    found = kvtools.logprobs(model, prompts, texts)
    assert found.logprobs[1][0].dtype == torch.float32
    check(found, model, prompts, texts, 0.15)
    model = fresh_model()
    model.lm_head.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([0, 1]), -torch.inf)
    )
    found = kvtools.logprobs(model, prompts, texts)
    assert all(x.isfinite().all() for each in found.entropies for x in each)
    ((got,),) = kvtools.logprobs(model, prompts[:1], [[[5, 1, 5]]]).logprobs
    assert got.isneginf().tolist() == [False, True, False]


def test_as_sampled():
    model = tiny_model()
    r = kvtools.Rollouts(model, temperature=0.7, eos_token_id=())
    r.prefill([random_ids(20)], 5)
    texts = r.generate([3, 9, 1, 0, 12])
    found = kvtools.logprobs(model, [random_ids(20)], [texts], temperature=0.7)
    for got, want in zip(found.logprobs[0], r.logprobs, strict=True):
        assert got.tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(completions=[[[5]]]), ValueError, "completions has 1 entries for 2 prompts"),
        (dict(prompts=[[5], []]), ValueError, r"prompts\[1\] is empty"),
        (dict(completions=[[5, 6], []]), TypeError, r"completions\[0\]\[0\]=5: expected a list"),
        (dict(completions=["ab", []]), TypeError, r"completions\[0\]='ab'"),
        (dict(prompts=["ab", [5]]), TypeError, r"prompts\[0\]='ab': expected a list of token ids"),
        (dict(prompts=[[0.5], [5]]), TypeError, r"prompts\[0\] holds something else"),
        (dict(completions=[[[5, -100]], []]), ValueError, r"completions\[0\]\[0\] holds -100"),
        (dict(prompts=[[5], [256]]), ValueError, r"prompts\[1\] holds 256, which is no token"),
        (dict(temperature=0.0), ValueError, "temperature=0.0 must be a positive number"),
        (dict(rows=0), ValueError, "rows=0 must be a whole number"),
        (dict(rows=2.5), ValueError, "rows=2.5 must be a whole number"),
        (dict(temperature="1"), ValueError, "temperature=.1. must be a positive number"),
        (dict(temperature=True), ValueError, "temperature=True must be a positive number"),
        (dict(model="gpt2"), TypeError, "expected a transformers model, got str"),
    ],
)
def test_bad_input(change, error, words):
    args = dict(model=tiny_model(), prompts=[[5, 6], [7]], completions=[[[5]], []]) | change
    with pytest.raises(error, match=words):
        kvtools.logprobs(args.pop("model"), args.pop("prompts"), args.pop("completions"), **args)


def test_numbers_of_numpy():
    model = tiny_model()
    found = kvtools.logprobs(model, [np.array([5, 6])], [np.array([[7, 8], [9, 3]])])
    assert [len(x) for x in found.logprobs[0]] == [2, 2]
