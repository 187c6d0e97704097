"""vLLM with kvtools' attention against vLLM's own; run by `make engines`, which installs vLLM."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run make engines")

from batches import BLOCKS, PAGE, WIDTH, Batches  # noqa: E402
from models import COMMON, scaled  # noqa: E402

import kvtools  # noqa: E402
from kvtools.testing import Recorder, assert_within_budget  # noqa: E402

OURS, OWN = "kvtools.serve.vllm.Attention", "vllm.v1.attention.backends.cpu_attn"
WORKER = Path(__file__).with_name("vllm_worker.py")
WORDS = 250
SIZES = dict(num_hidden_layers=2, head_dim=32)  # vLLM's own attention knows no smaller heads
# Log-probabilities over packed caches: of keys that are summed in another order a head may get the
# other of two scales that are as good.
NEAR = 5e-3


def run(model: Path, requests: list[dict], setting: str | None = "1", check=True, **engine) -> dict:
    env = {k: v for k, v in os.environ.items() if k != "KVTOOLS_VLLM"} | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    env |= engine.pop("env", {}) | ({} if setting is None else {"KVTOOLS_VLLM": setting})
    engine = dict(dtype="float32", enforce_eager=True, max_num_seqs=64) | engine
    given = {"model": str(model), "engine": engine, "requests": requests, "new": 10}
    done = subprocess.run(
        [sys.executable, WORKER], input=json.dumps(given), env=env, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    if not check:
        return {"failed": done.returncode != 0, "said": done.stdout + done.stderr}
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def mixed(count: int = 64, words: int = WORDS) -> list[dict]:
    """Prompts of which some begin alike, and some want 16 continuations."""
    draw = random.Random(0)

    def text(n):
        return [draw.randrange(3, words) for _ in range(n)]

    stems = [text(70), text(100)]
    shared = [stems[i % 2] + text(draw.randint(1, 60)) for i in range(count // 2)]
    apart = [text(draw.randint(2, 120)) for _ in range(count - count // 2)]
    prompts = [x for pair in zip(shared, apart, strict=True) for x in pair]
    return [{"prompt": x, "n": 16 if i % 16 == 1 or i % 16 == 6 else 1}
            for i, x in enumerate(prompts)]  # fmt: skip


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return scaled(Qwen3ForCausalLM(Qwen3Config(**COMMON | SIZES)))


def unscaled():
    """Its logits are small: at low temperatures, there is much to draw from."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**COMMON | SIZES))


def gemma2():
    """Soft caps, and a window in every other layer that prompts exceed."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    special = dict(sliding_window=48, attn_logit_softcapping=5.0, query_pre_attn_scalar=16,
                   tie_word_embeddings=True)  # fmt: skip
    return scaled(Gemma2ForCausalLM(Gemma2Config(**COMMON | SIZES | special)))


def smollm2():
    from kvtools import models

    return models.load("smollm2", torch.float32, "cpu")[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that saves a model, once."""
    found = {}

    def save(make):
        if make not in found:
            torch.manual_seed(0)
            found[make] = tmp_path_factory.mktemp(make.__name__)
            make().float().save_pretrained(found[make])
        return found[make]

    return save


# Chunks of prompts come from few tokens in a step, preemption from few blocks.
TIGHT = dict(max_num_batched_tokens=96, max_model_len=256)


@pytest.mark.parametrize("make,count,own,ours", [
    (qwen3, 64, dict(block_size=32, num_gpu_blocks_override=40),
     dict(block_size=16, num_gpu_blocks_override=80)),
    pytest.param(
        gemma2, 64, dict(block_size=32, num_gpu_blocks_override=60),
        dict(block_size=32, num_gpu_blocks_override=60,
             env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        marks=pytest.mark.long),
    pytest.param(
        smollm2, 24, dict(block_size=32, num_gpu_blocks_override=40),
        dict(block_size=32, num_gpu_blocks_override=40), marks=pytest.mark.long),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_tokens_are_those_of_vllms_own_attention(make, count, own, ours, saved):
    requests = mixed(count)
    want = run(saved(make), requests, setting=None, **TIGHT, **own)
    found = run(saved(make), requests, **TIGHT, **ours)
    assert found["attention"] == [OURS]
    assert [x.rpartition(".")[0] for x in want["attention"]] == [OWN]
    assert found["preemptions"] > 0 and found["prefix_hits"] > 0
    assert found["tokens"] == want["tokens"]
    for a, b in zip(found["logprobs"], want["logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("format,size", [
    pytest.param("int8", 2 * 32 + 4, marks=pytest.mark.long), ("int4", 2 * 16 + 4),
])  # fmt: skip
def test_packed_caches(format, size, saved):
    """Tokens are those of a model whose attention reads what the format leaves of keys and values,
    preempted or not; and a cache of so many bytes has more blocks."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    requests = mixed(12)
    engine = dict(block_size=32, max_num_batched_tokens=96, max_model_len=256)
    engine["kv_cache_dtype"] = f"{format}_per_token_head"
    found = run(saved(qwen3), requests, **engine)
    assert found["attention"] == [OURS] and found["prefix_hits"] > 0
    assert found["preemptions"] == 0
    small = run(saved(qwen3), requests, num_gpu_blocks_override=24, **engine)
    assert small["preemptions"] > 0 and small["blocks"] == 24
    assert small["tokens"] == found["tokens"]
    for a, b in zip(small["logprobs"], found["logprobs"], strict=True):
        assert a == pytest.approx(b, abs=NEAR)
    layers, kv_heads = SIZES["num_hidden_layers"], COMMON["num_key_value_heads"]
    assert found["blocks"] == 2**30 // (layers * kv_heads * engine["block_size"] * size)

    def kept(module, query, *states, **given):
        key, value = (
            kvtools.dequantize_kv(*kvtools.quantize_kv(x, format), x.shape[-1]) for x in states[:2]
        )
        return sdpa_attention_forward(module, query, key, value, *states[2:], **given)

    AttentionInterface.register(f"kept in {format}", kept)
    models = [
        AutoModelForCausalLM.from_pretrained(saved(qwen3), attn_implementation=x).eval()
        for x in (f"kept in {format}", "sdpa")
    ]
    prompts = [x["prompt"] for x in requests for _ in range(x["n"])]
    rows = zip(prompts, found["tokens"], found["logprobs"], strict=True)
    off = []  # from each of the models
    for prompt, new, logprob in {str(x): x for x in rows}.values():
        off.append([])
        for model in models:
            with torch.no_grad():
                logits_tv = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
            if model is models[0]:
                assert logits_tv.argmax(-1).tolist() == new
            found_t = logits_tv.log_softmax(-1)[range(len(new)), new]
            off[-1].append((found_t - torch.tensor(logprob)).abs().max())
    kept_most, plain_most = torch.tensor(off).amax(0)
    assert kept_most < NEAR and kept_most < plain_most / 20


def test_installed_and_not_asked_for_it_changes_nothing(saved):
    """Nor does the setting where the plugin is gone."""
    requests = mixed(8)
    gone = run(saved(qwen3), requests, setting="1", env={"VLLM_PLUGINS": ""}, **TIGHT)
    unasked = run(saved(qwen3), requests, setting=None, **TIGHT)
    assert gone["loaded"] == [] and "kvtools.serve" in unasked["loaded"]
    assert not {f"kvtools.serve.{x}" for x in ("vllm", "steps", "interface")} & {*unasked["loaded"]}
    for found in (gone, unasked):
        assert [x.rpartition(".")[0] for x in found["attention"]] == [OWN]
    assert {k: v for k, v in gone.items() if k != "loaded"} == {
        k: v for k, v in unasked.items() if k != "loaded"
    }  # log-probabilities and blocks, too


SAMPLER = dict(logits_processors=["kvtools.serve.vllm_sampler:Sampler"])


def test_seeded_tokens_do_not_depend_on_the_batch(saved):
    """Nor on the attention. They are those of `kvtools.sample` on the model's logits."""
    from transformers import AutoModelForCausalLM

    filters = dict(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01)
    seeded = [
        x | {"n": 1 + 3 * (i == 2), "sampling": filters | {"seed": 100 * i}}
        for i, x in enumerate(mixed(12))
    ]
    engine = dict(block_size=32, max_model_len=256, max_num_batched_tokens=2048) | SAMPLER
    together = run(saved(qwen3), seeded, **engine)["tokens"]
    others = [x | {"n": 2, "sampling": {"temperature": 0.7}} for x in mixed(12)]
    shuffled = [x for pair in zip(others, seeded[::-1], strict=True) for x in pair]
    rows = run(saved(qwen3), shuffled, setting="0", **engine | dict(max_num_seqs=5))["tokens"]
    found = []
    for request in shuffled:
        found, rows = [*found, (request, rows[: request["n"]])], rows[request["n"] :]
    apart = [x for request, rows in found[::-1] if request in seeded for x in rows]
    assert apart == together
    assert len({tuple(x) for x in together[2:6]}) == 4  # the continuations of one prompt
    model = AutoModelForCausalLM.from_pretrained(saved(qwen3)).eval()
    each = [(x["prompt"], 100 * i + j) for i, x in enumerate(seeded) for j in range(x["n"])]
    for (prompt, seed), new in zip(each, together, strict=True):
        with torch.no_grad():
            logits_bv = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        position_b = torch.arange(len(new)) + len(prompt)
        seed_b = torch.full_like(position_b, seed)
        assert kvtools.sample(logits_bv, seed_b, position_b, **filters)[0].tolist() == new


def test_seeded_tokens_are_distributed_as_vllms_own(saved):
    """By chi-square against the probabilities that vLLM's sampler draws from; so are its own
    draws. Nothing is random here but what the seeds are."""
    filters = [
        dict(temperature=0.06),
        dict(temperature=0.1, top_k=7),
        dict(temperature=0.1, top_p=0.6),
        dict(temperature=0.1, min_p=0.1),
        dict(temperature=0.08, top_k=30, top_p=0.8, min_p=0.2),
    ]
    draws, engine = 800, dict(max_num_seqs=1024, max_num_batched_tokens=32768, max_logprobs=-1)
    prompts = [x["prompt"][:5] for x in mixed(10)[: len(filters)]]

    def requests(**given):
        return [
            {"prompt": x, "n": draws, "sampling": y | given | {"max_tokens": 1}}
            for x, y in zip(prompts, filters, strict=True)
        ]

    own = requests(logprobs=-1)
    want = run(saved(unscaled), own, None, logprobs_mode="processed_logprobs", **engine)
    found = run(saved(unscaled), requests(seed=10**9), **engine, **SAMPLER)
    for i, given in enumerate(filters):
        at = slice(i * draws, (i + 1) * draws)
        p_v = torch.zeros(COMMON["vocab_size"], dtype=torch.float64)
        for token, logprob in want["first"][i * draws]:
            p_v[token] = math.exp(logprob)
        assert p_v.sum() == pytest.approx(1) and p_v.max() < 0.7, given
        for rows in (found["tokens"][at], want["tokens"][at]):
            count_v = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(p_v))
            assert not count_v[p_v == 0].any(), given
            assert chi_square(count_v, p_v) > 0.01, given
        twisted_v = p_v**1.4 / (p_v**1.4).sum()  # as of a temperature that is off by that much
        count_v = torch.bincount(torch.tensor(found["tokens"][at])[:, 0], minlength=len(p_v))
        assert chi_square(count_v, twisted_v) < 0.001, given


def chi_square(count_v, p_v):
    """How likely counts as far from their expectation are, rare tokens counted as one."""
    n = int(count_v.sum())
    rare = p_v * n < 5
    expected = torch.cat([p_v[~rare], p_v[rare].sum()[None]]) * n
    counts = torch.cat([count_v[~rare], count_v[rare].sum()[None]])
    used = expected > 0
    x = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return float(torch.special.gammaincc((used.sum() - 1) / 2, x / 2))


def test_rows_of_the_sampler_follow_the_batch():
    """Requests come, go and move; one has no seed, one no finite logits, one a seed of 64 bits."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from kvtools.serve.vllm_sampler import Sampler

    sampler = Sampler(None, torch.device("cpu"), False)
    logits_bv = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler.apply(logits_bv.clone()), logits_bv)
    seeds, new = [7, None, 2**64 - 1], [[], [], [4, 4]]
    added = [(i, SamplingParams(seed=x), [1, 2], new[i]) for i, x in enumerate(seeds)]
    sampler.update_state(BatchUpdate(3, [], added, []))
    found_bv = sampler.apply(logits_bv.clone())
    want_b, *_ = kvtools.sample(logits_bv, torch.tensor([7, 0, -1]), torch.tensor([2, 0, 4]))
    assert torch.equal(found_bv[1], logits_bv[1])
    for row in (0, 2):
        assert torch.isfinite(found_bv[row]).nonzero().tolist() == [[int(want_b[row])]]
    new[0].append(9)  # vLLM's list: the next position
    sampler.update_state(BatchUpdate(3, [], [], [(0, 2, MoveDirectionality.SWAP)]))
    sampler.update_state(BatchUpdate(3, [0], [], []))
    logits_bv[2, 3] = torch.nan
    assert torch.equal(sampler.apply(logits_bv.clone())[:2], logits_bv[:2])
    assert torch.isnan(sampler.apply(logits_bv.clone())[2, 3])
    logits_bv[2, 3] = 0.0
    want_b, *_ = kvtools.sample(logits_bv[2:], torch.tensor([7]), torch.tensor([3]))
    assert sampler.apply(logits_bv.clone())[2].isfinite().nonzero().tolist() == [want_b.tolist()]


def cache_of(format, dtype, layout="LBHNC", block=PAGE, blocks=BLOCKS, layers=2):
    """A cache's specification, and vLLM's memory for it by layer."""
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, get_kv_quant_mode

    from kvtools.serve.vllm import Backend

    order, kv_heads, d = KVCacheLayout[layout].stride_order, 2, 32
    spec = Backend.customize_spec(FullAttentionSpec(
        block_size=block, num_kv_heads=kv_heads, head_size=d,
        dtype=STR_DTYPE_TO_TORCH_DTYPE.get(format, dtype), kv_quant_mode=get_kv_quant_mode(format),
    ))  # fmt: skip
    shape = torch.tensor([layers, blocks, kv_heads, block, spec.state_content_size_bytes])
    cache = torch.zeros(*shape[list(order)], dtype=torch.int8).view(spec.dtype)
    return spec, cache.permute(*(order.index(i) for i in range(5)))


def layer_of(monkeypatch, config=None, **given):
    """A layer's attention, without an engine."""
    from kvtools.serve import vllm as plugged

    monkeypatch.setattr(plugged, "get_current_vllm_config", lambda: config or configured())
    sizes = dict(num_heads=8, head_size=32, scale=0.3, num_kv_heads=2)
    return plugged.Attention(**sizes | given)


def configured(**changed):
    model = dict(dtype=torch.float32, is_mm_prefix_lm=False, rswa_window=None)
    parallel = dict(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    either = {k: changed.pop(k) for k in list(changed) if k == "speculative_config"}
    model, parallel = ({k: changed.get(k, v) for k, v in x.items()} for x in (model, parallel))
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**parallel),
        attention_config=SimpleNamespace(use_non_causal=changed.get("use_non_causal", False)),
        speculative_config=either.get("speculative_config"),
        kv_transfer_config=changed.get("kv_transfer_config"),
    )


@pytest.mark.parametrize("block,layout,dtype,given", [
    (16, "LBHNC", torch.float32, dict(sinks=True)),
    (32, "LBNHC", torch.bfloat16, dict(sliding_window=21, logits_soft_cap=3.0)),
    (64, "BHLNC", torch.float16, dict(sliding_window=40)),
    (128, "BLNHC", torch.float32, dict(logits_soft_cap=3.0, sinks=True, sliding_window=21)),
    (128, "LHBNC", torch.bfloat16, dict(sinks=True)),
    (32, "LBHNC", torch.bfloat16, dict(wide=True)),
    (16, "LBHNC", torch.float32, dict(moves=True)),
    (16, "BLHNC", torch.bfloat16, dict(moves=True, kv_cache_dtype="int4_per_token_head")),
    (16, "LBHNC", torch.float32, dict(kv_cache_dtype="int8_per_token_head", sinks=True)),
    (32, "LBNHC", torch.bfloat16, dict(kv_cache_dtype="int4_per_token_head", sliding_window=21)),
    (16, "BHLNC", torch.float16, dict(kv_cache_dtype="int4_per_token_head")),
    (64, "BLNHC", torch.float32, dict(kv_cache_dtype="fp8_per_token_head", logits_soft_cap=3.0)),
    (128, "LHBNC", torch.bfloat16, dict(kv_cache_dtype="fp8_per_token_head")),
], ids=str)  # fmt: skip
def test_a_layer_in_each_layout(monkeypatch, block, layout, dtype, given):
    """A mixed batch over views of vLLM's cache, written and read, against dense attention over what
    the cache's format leaves of keys and values."""
    from kvtools.serve.steps import step_from_block_table

    torch.manual_seed(0)
    heads, kv_heads, d, blocks = 8, 2, 32, 12
    stored = given.get("kv_cache_dtype", "auto")
    cache = cache_of(stored, dtype, layout, block, blocks)[1][1]  # the second layer's
    sinks = torch.randn(heads, dtype=dtype) if given.pop("sinks", False) else None
    wide, moves = given.pop("wide", False), given.pop("moves", None)
    layer = layer_of(monkeypatch, configured(kv_transfer_config=moves), sinks=sinks, **given)
    lens, counts = [block + 5, block + 2, 9], [1, 2, 9]
    table = torch.tensor([[5, 2], [5, 7], [1, 0]], dtype=torch.int32)
    k, v = torch.randn(2, 3, max(lens), kv_heads, d, dtype=dtype)
    k[1, :block], v[1, :block] = k[0, :block], v[0, :block]
    if wide:  # a model of another dtype than its cache
        dtype, k, v = torch.float32, k.float(), v.float()
    for row, n in enumerate(lens):
        at = torch.arange(n)
        slots = table[row, at // block].long() * block + at % block
        # What fills up a batch has no slot.
        layer.do_kv_cache_update(None, k[row, : n + 1], v[row, : n + 1], cache, slots)
    if moves:  # a token's bytes are its own, as whoever copies tokens takes them
        for slot in range(lens[2]):
            cache[3, :, slot] = cache[1, :, slot]
        table[2, 0], cache[1] = 3, 0
    start = torch.tensor([0, *counts]).cumsum(0)
    step = step_from_block_table(table, torch.tensor(lens), start, block, blocks=blocks)
    query = torch.randn(14, heads, d, dtype=dtype)
    output = torch.full_like(query, 7.0)
    layer.forward(None, query, None, None, cache, step, output)
    assert (output[12:] == 7).all()

    def kept(x, kind):
        format = stored.removesuffix("_per_token_head")
        if format == "auto":
            return x.to(kind)
        return kvtools.dequantize_kv(*kvtools.quantize_kv(x, format), d, dtype=kind)

    def dense(row, kind):
        n, t = lens[row], counts[row]
        q = query[start[row] : start[row] + t].to(kind)
        kk, vv = (kept(x[row, :n], kind) for x in (k, v))
        kk, vv = (x.repeat_interleave(heads // kv_heads, 1) for x in (kk, vv))
        x = torch.einsum("thd,shd->hts", q, kk) * layer.scale
        if cap := given.get("logits_soft_cap"):
            x = cap * torch.tanh(x / cap)
        at, key = torch.arange(n - t, n)[:, None], torch.arange(n)
        hidden = (key > at) | (key <= at - given.get("sliding_window", n))
        x = x.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            x = torch.cat([x, sinks.to(kind)[:, None, None].expand(-1, t, 1)], -1)
        return torch.einsum("hts,shd->thd", x.softmax(-1)[..., :n], vv)

    for row, t in enumerate(counts):
        exact, eager = dense(row, torch.float64), dense(row, dtype)
        assert_within_budget(f"row {row}", output[start[row] : start[row] + t], exact, eager)


class Decoding:
    """Steps of two layers over caches of their own: eager ones, or replays of one that is captured
    for so many requests."""

    def __init__(self, monkeypatch, dtype, layout, given, rows=0):
        from vllm.config import CUDAGraphMode

        from kvtools.serve.vllm import Builder

        spec, self.caches = cache_of(given.get("kv_cache_dtype", "auto"), dtype, layout)
        self.layers = [layer_of(monkeypatch, **given) for _ in self.caches]
        seen = SimpleNamespace(impl=self.layers[0], kv_cache=self.caches[0])
        mode = CUDAGraphMode.FULL_AND_PIECEWISE if rows else CUDAGraphMode.NONE
        context = SimpleNamespace(
            static_forward_context={"layer": seen}, cudagraph_mode=mode,
            cudagraph_capture_sizes=[rows],
        )  # fmt: skip
        config = SimpleNamespace(compilation_config=context)
        self.builder = Builder(spec, ["layer"], config, torch.device("cpu"))
        self.rows = rows
        if rows:
            self.held = [torch.zeros(rows, h, 32, dtype=dtype) for h in (8, 2, 2)]
            self.slots = torch.full((rows,), -1)
            with torch.inference_mode():  # as vLLM does both
                self.metadata = self.builder.build(0, self.nobody())
                self.forward(*self.held, self.slots)  # warms up, by what is then captured
                assert self.dummy() is self.metadata
            with Recorder() as self.recorder:
                self.output = self.forward(*self.held, self.slots)

    def dummy(self):
        """What vLLM captures with, and runs where other ranks have requests and this one none."""
        return self.builder.build_for_cudagraph_capture(self.nobody())

    def nobody(self):
        table, lens = torch.zeros(self.rows, WIDTH, dtype=torch.int32), torch.ones(self.rows)
        return batch_of(table, lens.int(), torch.arange(self.rows + 1))

    def forward(self, query, key, value, slots):
        outputs = []
        for layer, cache in zip(self.layers, self.caches, strict=True):
            layer.do_kv_cache_update(None, key, value, cache, slots)
            output = torch.empty_like(query)
            layer.forward(None, query, None, None, cache, self.metadata, output)
            outputs.append(output)
            query = query + output
        return torch.stack(outputs)

    def step(self, batch, given, slots):
        self.metadata = self.builder.build(0, batch)
        if not self.rows:
            return self.forward(*given, slots)
        for held, x in zip((*self.held, self.slots), (*given, slots), strict=True):
            held[: len(x)] = x
        self.slots[len(slots) :] = -1
        self.recorder.replay()
        return self.output[:, : len(slots)]


def batch_of(table, lens, start):
    return SimpleNamespace(
        num_reqs=len(lens), max_query_len=int(start.diff().max()), causal=True, seq_lens=lens,
        block_table_tensor=table, query_start_loc_cpu=start,
    )  # fmt: skip


@pytest.mark.parametrize("dtype,layout,given", [
    (torch.float32, "LBHNC", {}),
    (torch.bfloat16, "LBNHC", dict(sliding_window=7, logits_soft_cap=3.0)),
    (torch.float32, "BLNHC", dict(kv_cache_dtype="int4_per_token_head")),
], ids=str)  # fmt: skip
def test_captured_steps_are_those_of_each_batch(monkeypatch, dtype, layout, given):
    """Captured by the recorder in a graph's place, for 9 requests; replayed while these come, fork,
    grow and finish, with prompts and vLLM's own dummies between."""
    torch.manual_seed(0)
    eager = Decoding(monkeypatch, dtype, layout, given)
    graph = Decoding(monkeypatch, dtype, layout, given, rows=9)
    batches, several = Batches(9, seed=0), set()
    for i in range(40):
        table, lens, start = batches.step()
        live = int(start[-1])
        several.add(live)
        last = lens[:live].long() - 1
        slots = table[:live].gather(1, (last // PAGE)[:, None])[:, 0].long() * PAGE + last % PAGE
        tensors = [torch.randn(live, h, 32).to(dtype) for h in (8, 2, 2)]
        padded = table.where(torch.arange(9)[:, None] < live, 0)
        want = eager.step(batch_of(table[:live], lens[:live], start[: live + 1]), tensors, slots)
        found = graph.step(batch_of(padded, lens, start), tensors, slots)
        torch.testing.assert_close(found, want)
        assert torch.equal(graph.caches.view(torch.uint8), eager.caches.view(torch.uint8))
        if i % 4 == 0:
            graph.dummy()
            prompt = batch_of(table[:1], lens[:1], torch.tensor([0, int(lens[0])]))
            assert graph.builder.build(0, prompt).tokens == lens[0]
    assert len(several) > 3


def test_which_steps_vllm_captures(monkeypatch):
    from vllm.config import CompilationConfig
    from vllm.v1.attention.backend import AttentionCGSupport

    from kvtools.serve.vllm import Builder

    def support(speculative=None, ubatching=False):
        parallel = SimpleNamespace(use_ubatching=ubatching)
        config = SimpleNamespace(speculative_config=speculative, parallel_config=parallel)
        return Builder.get_cudagraph_support(config, None)

    assert support() == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert support(speculative=object()) == support(ubatching=True) == AttentionCGSupport.NEVER
    for asked, given in (
        ("FULL_AND_PIECEWISE", "FULL_AND_PIECEWISE"), ("FULL", "FULL_DECODE_ONLY"),
    ):  # fmt: skip
        config = CompilationConfig(
            cudagraph_mode=asked, mode=3, cudagraph_capture_sizes=[3], max_cudagraph_capture_size=3
        )
        found = config.resolve_cudagraph_mode_and_sizes(
            support(), "kvtools", 1, use_v2_model_runner=False, kv_cache_config=None,
            max_num_reqs=3, is_profiling=False,
        )  # fmt: skip
        assert found.name == given
    graph = Decoding(monkeypatch, torch.float32, "LBHNC", {}, rows=3)
    prompts = batch_of(torch.zeros(3, WIDTH).int(), torch.tensor([2, 2, 2]), torch.arange(4) * 2)
    with pytest.raises(NotImplementedError, match="captured in decode steps only: choose the cuda"):
        graph.builder.build_for_cudagraph_capture(prompts)


@pytest.mark.parametrize("given,said", [
    (dict(alibi_slopes=[0.5] * 8), "ALiBi"),
    (dict(attn_type="encoder_decoder"), "encoder_decoder attention"),
    (dict(attn_type="encoder_only"), "encoder_only attention"),
    (dict(kv_cache_dtype="fp8"), "kv_cache_dtype='fp8'"),
    (dict(kv_cache_dtype="nvfp4"), "kv_cache_dtype='nvfp4'"),
    (dict(kv_cache_dtype="int8_per_token_head", head_size=36),
     "kv_cache_dtype='int8_per_token_head' of heads of 36, no multiple of 8"),
    (dict(kv_sharing_target_layer_name="model.layers.0"), "layers that share another layer's"),
    (dict(q_lora_rank=None, kv_lora_rank=8), r"MLA \(multi-head latent attention\)\. Unset"),
    (dict(chunk_lookback=3), "the layer's arguments chunk_lookback"),
    (dict(config=dict(dtype=torch.float64)), "dtype torch.float64"),
    (dict(config=dict(is_mm_prefix_lm=True)), "attention to later tokens within a prompt"),
    (dict(config=dict(rswa_window=8)), "reference sliding windows"),
    (dict(config=dict(use_non_causal=True)), "attention that is not causal"),
    (dict(config=dict(decode_context_parallel_size=2)), "context parallelism"),
    (dict(config=dict(speculative_config=SimpleNamespace(enable_adaptive_verification=True))),
     "adaptive verification"),
    (dict(alibi_slopes=[0.5] * 8, kv_cache_dtype="fp8"), "ALiBi; nor kv_cache_dtype='fp8'"),
])  # fmt: skip
def test_what_it_does_not_do_is_refused_by_name(monkeypatch, given, said):
    config = configured(**given.pop("config", {}))
    with pytest.raises(NotImplementedError, match=f"does not do .*{said}.*KVTOOLS_VLLM"):
        layer_of(monkeypatch, config, **given)


def test_caches_and_batches_that_are_not_its_own(monkeypatch):
    from kvtools.serve.vllm import Builder

    class OtherSpec:
        block_size, num_kv_heads, head_size, head_size_v = 16, 2, 32, 16

    with pytest.raises(NotImplementedError, match="a cache of OtherSpec; nor values of another"):
        Builder(OtherSpec(), ["layer"], None, torch.device("cpu"))
    both_ways = SimpleNamespace(causal=False)
    with pytest.raises(NotImplementedError, match="is causal; this batch of vLLM's is not"):
        Builder.build(None, 0, both_ways)


def mla():
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = dict(
        num_hidden_layers=2, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=None,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, moe_intermediate_size=32,
        n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=2, n_shared_experts=1,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(DeepseekV2Config(**COMMON | sizes))


def encoder():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2,
    ))  # fmt: skip


@pytest.mark.parametrize("make,given,said", [
    (qwen3, dict(kv_cache_dtype="fp8", block_size=32), "kv_cache_dtype='fp8'"),
    pytest.param(mla, {}, "MLA (multi-head latent attention)", marks=pytest.mark.long),
    pytest.param(encoder, {}, "encoder_only attention", marks=pytest.mark.long),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_an_engine_that_it_cannot_serve_does_not_start(make, given, said, saved):
    found = run(saved(make), [], check=False, **given)
    assert found["failed"] and f"kvtools' attention does not do {said}" in found["said"]


def test_the_interface_is_the_one_it_was_written_for(monkeypatch):
    """And if it is not, that is said, with the version."""
    from vllm.v1.attention import backend

    from kvtools.serve import interface

    interface.check_interface()

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, scales=None):
        pass

    monkeypatch.setattr(backend.AttentionImpl, "forward", forward)
    monkeypatch.delattr(backend.AttentionMetadataBuilder, "build")
    fields = dict(interface.FIELDS)
    fields[interface.BACKEND, "CommonAttentionMetadata"] = {"seq_lens", "prefix_tree"}
    monkeypatch.setattr(interface, "FIELDS", fields)
    monkeypatch.setitem(interface.CALLS, ("vllm.gone", "call"), ("x",))
    with pytest.raises(RuntimeError) as raised:
        interface.check_interface()
    said = str(raised.value)
    assert said.startswith("kvtools' attention was written for vLLM 0.31 and 0.32, and vLLM 0.")
    assert "AttentionImpl.forward takes self, layer" in said and "output, scales, not self" in said
    assert "AttentionMetadataBuilder.build takes nothing, as it is gone, not self" in said
    assert "CommonAttentionMetadata has no prefix_tree" in said
    assert "call takes nothing, as it is gone, not x" in said
    assert said.endswith("Unset KVTOOLS_VLLM to run without it")


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_what_a_gpu_would_choose_from(monkeypatch, major):
    """As the package for CPUs brings the choice along, without what it needs of CUDA."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):
        monkeypatch.setitem(sys.modules, f"vllm.{name}", ModuleType(name))
    from vllm.platforms.cuda import CudaPlatform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends import registry
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from kvtools.serve import vllm_plugin
    from kvtools.serve.vllm import Backend

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setenv("KVTOOLS_VLLM", "1")
    vllm_plugin()

    def chosen(**given):
        asked = AttentionSelectorConfig(
            **dict(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16)
            | given
        )
        valid, reasons = CudaPlatform.get_valid_backends(DeviceCapability(major, 0), asked, 32)
        return {x.backend_class for x in valid}, {y for _, x in reasons.values() for y in x}

    assert chosen(has_sink=True, has_sliding_window=True) == ({Backend}, set())
    assert chosen(use_mla=True) == (set(), {"MLA not supported"})
    assert chosen(kv_cache_dtype="fp8") == (set(), {"kv_cache_dtype not supported"})
    assert chosen(use_batch_invariant=True) == (set(), {"batch invariance not supported"})
