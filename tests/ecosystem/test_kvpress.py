"""kvpress: what its presses keep of a prompt, and what they keep here."""

import pytest
import torch
import transformers

kvpress = pytest.importorskip("kvpress")

import kvtools  # noqa: E402
from kvtools.integrations.kvpress import pressed  # noqa: E402

LENGTH = 200
PRESSES = [
    kvpress.KnormPress(0.5),
    kvpress.SnapKVPress(0.5, window_size=16),
    kvpress.TOVAPress(0.75),
    kvpress.ExpectedAttentionPress(0.5),
    kvpress.KeyDiffPress(0.25),
    kvpress.StreamingLLMPress(0.5),
    kvpress.LagKVPress(0.5, lag_size=32),
    kvpress.CURPress(0.5),
    kvpress.NonCausalAttnPress(0.5),
    kvpress.LeverageScorePress(0.5),
    kvpress.CompactorPress(0.5),
    kvpress.CapPress(0.5),
    kvpress.CriticalKVPress(kvpress.SnapKVPress(0.5, window_size=16)),
    kvpress.RandomPress(0.5, seed=3),
]
name_of = lambda press: type(press).__name__  # noqa: E731


@pytest.fixture
def ids():
    rng = torch.Generator().manual_seed(1)
    # Each once: keys of equal tokens are of equal length, and who stays would be up to rounding.
    return lambda n: 1 + torch.randperm(255, generator=rng)[:n]


@torch.no_grad()
def theirs(model, press, ids, monkeypatch):
    """Positions [layers, heads, kept], ascending, of the keys that kvpress leaves in its cache."""
    whole = model(ids[None], use_cache=True).past_key_values
    stock, position = press.forward_hook, torch.arange(len(ids))

    def hook(module, args, kwargs, output):  # transformers 5.24 names these otherwise, or not
        more = dict(past_key_values=kwargs["cache"], cache_position=position)
        return stock(module, args, kwargs | more, output)

    with monkeypatch.context() as context:
        context.setattr(press, "forward_hook", hook)
        torch.manual_seed(0)
        with press(model):
            held = model(ids[None], use_cache=True).past_key_values
    found = []
    for some, every in zip(held.layers, whole.layers, strict=True):
        same = (some.keys[0, :, :, None] == every.keys[0, :, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        found.append(same.int().argmax(-1).sort(-1).values)
    for layer in model.model.layers:
        del layer.self_attn.rotary_emb  # kvpress leaves it there
    return torch.stack(found)


def ours(model, press, *prompts, **options):
    with pressed(model, press, **options) as config:
        torch.manual_seed(0)
        rollouts = kvtools.Rollouts(model, config)
        rollouts.prefill([x.tolist() for x in prompts], n=1)
        return [
            torch.tensor([rollouts.kv.kept(layer, row) for layer in range(2)])
            for row in range(len(prompts))
        ]


@pytest.mark.parametrize("press", PRESSES, ids=name_of)
def test_the_same_tokens_stay(press, model, ids, monkeypatch, record):
    prompt = ids(LENGTH)
    wanted = theirs(model, press, prompt, monkeypatch)
    (found,) = ours(model, press, prompt)
    assert torch.equal(found, wanted)
    record("kvpress", f"what stays of a prompt: {name_of(press)}", "what stays with kvpress")


def test_of_several_prompts_each_by_itself(model, ids):
    """Prompts that share a forward, padded, some too short for anything to go, beside one another
    and among what is stored in few bits."""
    prompts = [ids(n) for n in (200, 2, 180, 200, 195)]
    for press in PRESSES[:2]:
        for prompt, found in zip(prompts, ours(model, press, *prompts), strict=True):
            if len(prompt) == 2:
                assert found.tolist() == [[[0, 1]] * 2] * 2
            else:
                assert torch.equal(found, *ours(model, press, prompt))


def test_options_of_the_cache(model, ids, record):
    """Who stays is of the press, how it is stored is ours; and sinks stay besides."""
    prompt = ids(LENGTH)
    snap = kvpress.SnapKVPress(0.5, window_size=16)
    (wanted,), (found,) = ours(model, snap, prompt), ours(model, snap, prompt, bits=4)
    assert torch.equal(found, wanted)
    (found,) = ours(model, kvpress.KnormPress(0.5), prompt, bits=4, sinks=6)
    with torch.no_grad():
        held = model(prompt[None], use_cache=True).past_key_values
    for keys, got in zip(held.layers, found, strict=True):
        worth = -keys.keys[0].norm(dim=-1)
        worth[:, :6] = torch.inf
        assert torch.equal(got, worth.topk(LENGTH // 2).indices.sort().values)
    record("kvpress", "SnapKVPress: keys and values in 4 bits", "what stays with kvpress")


def test_generate_and_patch(model, ids, record):
    """Tokens are other ones than without, and all is as before afterwards."""
    model.generation_config.eos_token_id = None
    before = [(name, sorted(vars(x))) for name, x in model.named_modules()]
    prompt = torch.stack([ids(120), ids(120)])
    options = dict(max_new_tokens=12, do_sample=False)
    tokens = [model.generate(prompt, **options)]
    with pressed(model, kvpress.StreamingLLMPress(0.75)) as config:
        tokens.append(
            model.generate(prompt, custom_generate=kvtools.generate, kv_config=config, **options)
        )
        with kvtools.patch(model, config):
            assert torch.equal(model.generate(prompt, **options), tokens[1])
    with pressed(model, kvpress.StreamingLLMPress(0.0)) as config, kvtools.patch(model, config):
        assert torch.equal(model.generate(prompt, **options), tokens[0])
    assert not torch.equal(*tokens)
    for (name, held), module in zip(before, model.modules(), strict=True):
        assert {*vars(module)} - {"masked_key_indices"} == {*held}, name  # kvpress' own, at import
    record("kvpress", "StreamingLLMPress: by generate, patch", "runs")


OBSERVED = kvpress.ObservedAttentionPress(0.5)
REFUSED = [
    (OBSERVED, "attention matrices, which nothing here makes: pass .*h2o"),
    (kvpress.PyramidKVPress(0.5), "PyramidKVPress has a compress of its own"),
    (kvpress.CriticalKVPress(OBSERVED), "ObservedAttentionPress needs"),
]
WRAPPERS = (
    kvpress.AdaKVPress, kvpress.ChunkKVPress, kvpress.BlockPress, kvpress.KeyRerotationPress,
)  # fmt: skip


def test_what_is_not_scores_alone_is_refused(model, ids, record):
    good, prompt = kvpress.KnormPress(0.5), ids(20)
    for press, message in REFUSED:
        with pytest.raises(ValueError, match=message), pressed(model, press):
            pass
        record("kvpress", f"presses: {name_of(press)}", "refused, with what to write instead")
    for press in [
        *(kind(good) for kind in WRAPPERS),
        kvpress.ThinKPress(0.5),
        kvpress.KnormPress,
        0.5,
    ]:
        with pytest.raises(TypeError, match="is no ScorerPress .* instead"), pressed(model, press):
            pass
        if isinstance(press, kvpress.BasePress):
            record("kvpress", f"presses: {name_of(press)}", "refused, with what to write instead")
    for name, value in dict(policy="h2o", prompt_budget=9, budget=64, layer_budget="later").items():
        refused = pytest.raises(ValueError, match=f"{name}=.*leave it out")
        with refused, pressed(model, good, **{name: value}):
            pass
    # From a prefill, which leaves no rows; and where the press sees nothing.
    with pressed(model, kvpress.SnapKVPress(0.5)) as config:
        rollouts = kvtools.Rollouts(model, config)
        with pytest.raises(
            ValueError, match="SnapKVPress cannot score a prompt of 20 tokens: .*64"
        ):
            rollouts.prefill([prompt.tolist()], n=1)
        assert not rollouts.rows
    with pytest.raises(ValueError, match="has not seen layer 0: use .* inside"):
        kvtools.Rollouts(model, config).prefill([prompt.tolist()], n=1)
    with pressed(model, good) as config:
        other = type(model)(model.config).eval()
        with pytest.raises(ValueError, match="has not seen layer 0"):
            kvtools.Rollouts(other, config).prefill([prompt.tolist()], n=1)


def test_layers_that_presses_do_not_know_are_refused():
    small = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**small, sliding_window=8))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=1, n_positions=64)
    )
    for other, message in ((mistral, "sliding window"), (gpt2, "no model.layers with self_attn")):
        with pytest.raises(ValueError, match=message), pressed(other.eval(), PRESSES[0]):
            pass
