"""Rival caches of the benchmarks: packing, KIVI's groups and residual, bytes, the interface.

quanto is asked for its bytes only: its first reading compiles C++ for a minute.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from bench.rivals import (  # noqa: E402
    CACHE,
    Groups,
    available,
    dequantize,
    kivi,
    pack,
    quantize,
    rivals,
    unpack,
)

LAYERS, H, D, VOCAB = 2, 2, 64, 97
OURS = ["kivi4", "kivi2", "kivi4-g64", "rtn4", "rtn8"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=H, head_dim=D,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def fill(rival, model, prompt):
    cache = transformers.DynamicCache()
    model(input_ids=prompt[None], use_cache=True, **{CACHE: cache})
    rival.add_prompt(len(prompt))
    for layer, kv in enumerate(cache.layers):
        rival.fill(layer, None, kv.keys[0], kv.values[0])


def run(name, model, length):
    if reason := available(name):
        pytest.skip(reason)
    rival = rivals()[name]
    rival.begin(model)
    fill(rival, model, torch.arange(length) % VOCAB)
    return rival


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack(bits):
    codes = torch.randint(2**bits, (1, 2, 5, 64), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (1, 2, 5, 8 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)
    assert pack(torch.tensor([3, 1], dtype=torch.uint8), 4).tolist() == [3 + 16]


def round_group(x, bits):
    low, high = x.min(), x.max()
    scale = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_groups(bits):
    """Keys per channel over 32 tokens, values per token over 32 channels, one group at a time."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, H, 300, D).mul_(torch.logspace(-1, 1, D)).unbind()
    layer = kivi(bits)
    assert layer.update(k, v)[0] is k  # the prompt attends to itself as it is
    expected_k, expected_v = k.clone(), v.clone()
    for h in range(H):
        for s in range(0, 256, 32):
            for d in range(D):
                group = (0, h, slice(s, s + 32), d)
                expected_k[group] = round_group(k[group], bits)
        for s in range(300 - 128):
            for d in range(0, D, 32):
                group = (0, h, s, slice(d, d + 32))
                expected_v[group] = round_group(v[group], bits)
    step = torch.randn(1, H, 1, D)
    seen_k, seen_v = layer.update(step, step)
    torch.testing.assert_close(seen_k, torch.cat([expected_k, step], -2))
    torch.testing.assert_close(seen_v, torch.cat([expected_v, step], -2))


def test_constant_group():
    x = torch.full((1, 1, 32, 32), 2.5)
    assert torch.equal(dequantize(*quantize(x, 4, -2, 32), 4, -2), x)


@pytest.mark.parametrize("steps", [0, 1, 56, 129])
@pytest.mark.parametrize("length", [5, 127, 128, 200, 300])
def test_kivi_residual(length, steps):
    layer = kivi(4)
    layer.update(*torch.randn(2, 1, 1, length, D))
    for _ in range(steps):
        new_k, new_v = torch.randn(2, 1, 1, 1, D)
        seen_k, seen_v = layer.update(new_k, new_v)
        assert torch.equal(seen_k[..., -1:, :], new_k) and torch.equal(seen_v[..., -1:, :], new_v)
    total = length + steps
    assert layer.get_seq_length() == total
    for side, quantised in zip(layer.sides, (total // 128 * 128, max(0, total - 128)), strict=True):
        assert side.fresh.shape[-2] == total - quantised
        assert (0 if side.quantized is None else side.quantized[0].shape[-2]) == quantised


def test_groups_append_only():
    """Tokens one by one give the codes of all at once."""
    x = torch.randn(1, H, 130, D)
    whole, single = Groups(4, -2, 64, block=64), Groups(4, -2, 64, block=64)
    whole.append(x)
    whole.flush()
    for token in x.split(1, -2):
        single.append(token)
        single.flush()
    assert all(map(torch.equal, whole.quantized, single.quantized))
    assert torch.equal(whole.read(), single.read())


# Bytes of one KV head after a prompt of 300 tokens; 4 bytes of scale and zero per group.
KIVI4 = 256 * 32 + 8 * D * 4 + 44 * D * 2 + 172 * (32 + 2 * 4) + 128 * D * 2
KIVI2 = 256 * 16 + 8 * D * 4 + 44 * D * 2 + 172 * (16 + 2 * 4) + 128 * D * 2
KIVI4_G64 = 256 * 32 + 4 * D * 4 + 44 * D * 2 + 300 * (32 + 2 * 4)
BYTES = {
    "dynamic": 2 * 300 * D * 2, "kivi4": KIVI4, "kivi2": KIVI2, "kivi4-g64": KIVI4_G64,
    "rtn4": 2 * 300 * (32 + 4), "rtn8": 2 * 300 * (64 + 4), "fp8-tensor": 2 * (300 * D + 1),
    "quanto4": 2 * 300 * (32 + 4), "quanto2": 2 * 300 * (16 + 4),
    "hqq4": 2 * 300 * (32 + 4), "hqq4-axis1": 2 * 300 * (32 + 4),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_nbytes(name, model):
    rival = run(name, model, 300)
    assert rival.nbytes() == LAYERS * H * BYTES[name]
    rival.begin(model)
    assert rival.nbytes() == 0


def test_names():
    assert set(rivals()) == set(BYTES)
    assert not any(available(name) for name in ["dynamic", *OURS])


@torch.no_grad()
def test_dynamic(model):
    """Nothing lossy behind the interface: the logits of one forward over everything."""
    rival = rivals()["dynamic"]
    rival.begin(model)
    texts = [torch.randint(VOCAB, (length,)) for length in (30, 17, 9)]
    fed, calls = (4, 7, 0), []
    for ids, n in zip(texts, fed, strict=True):
        fill(rival, model, ids[: len(ids) - n])
    tails = [ids[len(ids) - n :] for ids, n in zip(texts, fed, strict=True)]
    out = rival.feed(tails, progress=lambda: calls.append(1))
    assert len(calls) == sum(fed)
    for logits_nv, ids, n in zip(out, texts, fed, strict=True):
        expected = model(input_ids=ids[None]).logits[0, len(ids) - n :]
        torch.testing.assert_close(logits_nv, expected)


@pytest.mark.parametrize("name", [*OURS, "fp8-tensor", "hqq4", "hqq4-axis1"])
@torch.no_grad()
def test_feed(name, model):
    """Close to the logits of one forward: nearer than the logits of the neighbouring token."""
    rival = run(name, model, 140)
    tail = torch.arange(140, 144) % VOCAB
    (logits_nv,) = rival.feed([tail])
    exact = model(input_ids=torch.arange(144)[None] % VOCAB).logits[0, 140:]
    assert not torch.equal(logits_nv, exact)
    assert (logits_nv - exact).norm() < (exact.roll(1, 0) - exact).norm() / 4
