"""kvtools inside SGLang: over its own classes where it is installed, else over stand-ins.

`make sglang` installs it and runs this with its engine, too.
"""

import copy
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang_standin
import sglang_worker
import torch
from models import random_ids, tiny_model
from sglang_small import Engine, Request, runner_of
from sglang_standin import EXECUTION

import kvtools
from kvtools import serve
from kvtools.testing import assert_within_budget

REAL = importlib.util.find_spec("sglang") is not None
only_real = pytest.mark.skipif(not REAL, reason="sglang is not installed: run make sglang")
SERVE = ("kvtools.serve.sglang", "kvtools.serve.sglang_sampler")


@pytest.fixture(scope="module")
def srt():
    """SGLang's names, those of its stand-in, and kvtools' two modules over them."""
    patch = pytest.MonkeyPatch()
    if REAL:
        import sglang_stubs

        sglang_stubs.install()
    else:
        sglang_standin.install(patch)
    for name in SERVE:
        patch.delitem(sys.modules, name, raising=False)
    found = SimpleNamespace()
    for name, what in sglang_standin.MODULES.items():
        module = importlib.import_module(f"sglang.srt.{name}")
        vars(found).update({x.__name__: getattr(module, x.__name__) for x in what})
    found.ours, found.sampler = (importlib.import_module(name) for name in SERVE)
    # What a server's process publishes.
    for name, value in dict(
        get_parallel=SimpleNamespace(dcp_enabled=False, attn_cp_size=1),
        get_exec=EXECUTION,
        get_disagg=SimpleNamespace(enable_pdmux=False),
    ).items():
        patch.setattr(found.ours, name, lambda value=value: value)
    patch.setattr(found.sampler, "get_server_args", lambda: SimpleNamespace(random_seed=7))
    yield found
    for name in SERVE:
        sys.modules.pop(name, None)
    patch.undo()


def mixed(count=7, n=16):
    """Some begin alike, some are chunks long, one wants many continuations."""
    stems = [random_ids(40, seed=i).tolist() for i in range(2)]
    prompts = [
        (stems[i % 2] if i % 3 else []) + random_ids(2 + 7 * i % 50, seed=9 + i).tolist()
        for i in range(count)
    ]
    return [Request(x, 6 + 4 * (i % 4)) for i, x in enumerate(prompts)] + [
        Request(stems[0] + [7], 6) for _ in range(n)
    ]


def alone(model, requests):
    """What transformers generates for each."""
    found, known = [], {}
    for x in requests:
        key = tuple(x.prompt), x.new
        if key not in known:
            out = model.generate(
                torch.tensor([x.prompt]), max_new_tokens=x.new, do_sample=False, eos_token_id=None
            )
            known[key] = out[0, len(x.prompt) :].tolist()
        found.append(known[key])
    return found


@pytest.mark.parametrize("name,given,retracts", [
    ("llama", dict(page=1), False),
    ("llama", dict(page=16, slots=288), True),
    ("gemma2", dict(page=1, slots=220), True),
    ("gemma2", dict(page=4, windows=True), False),
    ("gptoss", dict(page=1, slots=220, windows=True, chunk=30), True),
], ids=str)  # fmt: skip
def test_tokens_are_those_of_transformers(srt, name, given, retracts):
    model, requests = tiny_model(name), mixed()
    engine = Engine(model, srt, srt.ours.Backend, **given)
    assert engine.run(requests) == alone(model, requests)
    assert engine.counts["modes"] == {"EXTEND", "MIXED", "DECODE"} and engine.counts["hits"] > 0
    assert (engine.counts["retractions"] > 0) == retracts


@pytest.mark.parametrize("name,given", [
    ("llama", dict(page=1)),
    ("llama", dict(page=16, slots=288)),
    ("gemma2", dict(page=4, windows=True)),
    ("gptoss", dict(page=1, slots=220, windows=True, chunk=30)),
], ids=str)  # fmt: skip
def test_tokens_of_captured_steps(srt, name, given):
    """Decode steps of 5 or 12 requests, captured by the recorder before there is a request, and
    replayed while requests come, share, grow, are retracted and finish."""
    model, requests = tiny_model(name), mixed()
    for x in requests:
        x.new += 8
    engine = Engine(model, srt, srt.ours.Backend, graphs=(5, 12), **given)
    assert engine.run(requests) == alone(model, requests)
    assert min(engine.counts["replays"].values()) > 0 and engine.counts["hits"] > 0
    assert (engine.counts["retractions"] > 0) == ("slots" in given)


def layer_of(srt, page=1, slots=160, dtype=torch.float32, windows=None, **given):
    """A layer, its pools and its runner, without an engine."""
    layer = srt.RadixAttention(
        **dict(num_heads=8, head_dim=16, scaling=0.3, num_kv_heads=2, layer_id=0) | given
    )
    sizes = dict(page_size=page, dtype=dtype, head_num=2, head_dim=16, device="cpu")
    if windows is None:
        pool = srt.MHATokenToKVPool(size=slots, layer_num=1, enable_memory_saver=False, **sizes)
    else:
        pool = srt.SWAKVPool(
            size=slots,
            size_swa=slots,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            **sizes,
        )
        pool.register_mapping(windows)
    table = srt.ReqToTokenPool(12, 256, "cpu", False)
    return runner_of([layer], pool, table), layer


def batch_of(srt, runner, lens, counts, shared=0):
    """Rows, the first two of which share their first slots; the pages are taken at random."""
    pool, table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
    page, order = pool.page_size, torch.randperm(pool.size // pool.page_size) + 1
    rows, taken = [], 0
    for i, n in enumerate(lens):
        pages = -(-n // page)
        own = order[taken : taken + pages]
        taken += pages
        if i == 1:
            own[: shared // page] = rows[0][: shared // page]
        rows.append(own)
        slots = (own[:, None] * page + torch.arange(page)).flatten()
        table[i + 1] = 2**31 - 1  # past a row's end may be anything
        table[i + 1, :n] = slots[:n]
    mode = srt.ForwardMode.DECODE if set(counts) == {1} else srt.ForwardMode.MIXED
    at = list(enumerate(zip(lens, counts, strict=True)))
    batch = srt.ForwardBatch(
        mode, len(lens), torch.zeros(sum(counts)), torch.arange(len(lens)) + 1,
        torch.tensor(lens), torch.cat([table[i + 1, n - t : n] for i, (n, t) in at]).long(),
        sum(lens),
    )  # fmt: skip
    batch.extend_seq_lens = torch.tensor(counts)
    return batch


@pytest.mark.parametrize("page,dtype,given", [
    (1, torch.float32, dict(sinks=True)),
    (4, torch.bfloat16, dict(sliding_window_size=6, logit_cap=3.0)),
    (16, torch.float16, dict(logit_cap=3.0, sinks=True, sliding_window_size=20)),
    (4, torch.float32, dict(wide=True, filled=3)),
    (8, torch.float32, dict(hnd=True)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 9)], ids=["decode", "mixed"])
def test_a_layer(srt, page, dtype, given, counts):
    """Against dense attention, in the pool's layouts; SGLang's window has w + 1 keys."""
    torch.manual_seed(0)
    given = dict(given)
    sinks = torch.randn(8) if given.pop("sinks", False) else None
    wide, filled, hnd = (given.pop(x, 0) for x in ("wide", "filled", "hnd"))
    runner, layer = layer_of(srt, page=page, dtype=dtype, **given)
    lens = [37, 34, 9]
    pool, table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
    if hnd:
        size = (pool.size + page) // page
        pool.kv_cache_layout = "hnd"
        pool.use_hnd, pool.num_pages = True, size
        pool.k_buffer, pool.v_buffer = (
            [torch.zeros(size, 2, page, 16) for _ in range(4)] for _ in range(2)
        )
    backend = srt.ours.Backend(runner)
    batch = batch_of(srt, runner, lens, counts, shared=32)
    k, v = torch.randn(2, 3, max(lens), 2, 16).to(dtype)
    k[1, :32], v[1, :32] = k[0, :32], v[0, :32]
    for i, (n, t) in enumerate(zip(lens, counts, strict=True)):
        slots = table[i + 1, : n - t].long()
        for buffer, x in zip(pool.get_kv_buffer(0), (k, v), strict=True):
            if hnd:
                buffer[slots // page, :, slots % page] = x[i, : n - t]
            else:
                buffer[slots] = x[i, : n - t]
    q = torch.randn(sum(counts) + filled, 8 * 16).to(torch.float32 if wide else dtype)
    new = [torch.cat([x[i, n - t : n] for i, (n, t) in enumerate(zip(lens, counts, strict=True))])
           for x in (k, v)]  # fmt: skip
    backend.init_forward_metadata(batch)
    out = backend.forward(q, *new, layer, batch, **({} if sinks is None else dict(sinks=sinks)))
    assert out.shape == q.shape and not out[sum(counts) :].any()
    window, start = given.get("sliding_window_size"), 0

    def dense(i, kind):
        n, t = lens[i], counts[i]
        query = q[start : start + t].view(t, 8, 16).to(kind)
        keys, values = (x[i, :n].to(kind).repeat_interleave(4, 1) for x in (k, v))
        x = torch.einsum("thd,shd->hts", query, keys) * layer.scaling
        if layer.logit_cap:
            x = layer.logit_cap * torch.tanh(x / layer.logit_cap)
        at, key = torch.arange(n - t, n)[:, None], torch.arange(n)
        hidden = (key > at) | (key < at - (n if window is None else window))
        x = x.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            x = torch.cat([x, sinks.to(kind)[:, None, None].expand(-1, t, 1)], -1)
        return torch.einsum("hts,shd->thd", x.softmax(-1)[..., :n], values).flatten(1)

    for i, t in enumerate(counts):
        exact, eager = dense(i, torch.float64), dense(i, q.dtype)
        assert_within_budget(f"row {i}", out[start : start + t], exact, eager)
        start += t


@pytest.mark.parametrize("what,error,said", [
    ("slot", IndexError, "block_table: row 1 reads block 999, the cache has "),
    ("negative", ValueError, "block_table: row 1 has a block within its length that is negative"),
    ("page", ValueError, "block_table: row 1 has a block within its length that is negative"),
    ("length", ValueError, "seq_lens: row 1 has 257 tokens, req_to_token holds 256 of each"),
    ("request", IndexError, "req_pool_indices: row 1 is request 13, req_to_token has 13"),
    ("written", IndexError, "out_cache_loc: token 1 goes to slot 164, the pool has 164"),
    ("counts", ValueError, "query_lens: row 1 has 20, seq_lens has 17 tokens"),
])  # fmt: skip
def test_a_faulty_table_is_refused_by_name(srt, what, error, said):
    """And nothing is written, nor read by the next layer."""
    page = 4 if what in ("page", "written") else 1
    runner, layer = layer_of(srt, page=page)
    backend = srt.ours.Backend(runner)
    batch = batch_of(srt, runner, [21, 17, 9], [1, 2, 9])
    backend.init_forward_metadata(batch)
    before = [x.clone() for x in runner.token_to_kv_pool.get_kv_buffer(0)]
    table = runner.req_to_token_pool.req_to_token
    if what in ("slot", "negative", "page"):
        table[2, 8] = dict(slot=999, negative=-3, page=int(table[2, 9]))[what]
    elif what == "length":
        batch.seq_lens[1] = 257
    elif what == "request":
        batch.req_pool_indices[1] = 13
    elif what == "written":
        batch.out_cache_loc[1] = 164
    else:
        batch.extend_seq_lens[1] = 20
    with pytest.raises(error, match=said):
        backend.init_forward_metadata(batch)
    new = torch.randn(12, 2, 16)
    with pytest.raises(RuntimeError, match="no metadata of this forward: .* or it failed"):
        backend.forward(torch.randn(12, 128), new, new, layer, batch)
    assert all(map(torch.equal, before, runner.token_to_kv_pool.get_kv_buffer(0)))


def test_a_faulty_window_is_refused_by_name(srt):
    there = torch.arange(162) % 160
    runner, _ = layer_of(srt, windows=there)
    backend = srt.ours.Backend(runner)
    batch = batch_of(srt, runner, [21, 17], [1, 1])
    backend.init_forward_metadata(batch)
    there[runner.req_to_token_pool.req_to_token[2, 3].long()] = 161
    with pytest.raises(IndexError, match="block_table: row 1 reads block 161, the cache has 161"):
        backend.init_forward_metadata(batch)


def other(kind, **values):
    """A class of another name than `kind`'s, with these attributes."""
    return type("Other" + kind.__name__, (kind,), values)


@pytest.mark.parametrize("given,said", [
    (dict(runner=dict(use_mla_backend=True)), r"MLA \(multi-head latent attention\)"),
    (dict(model=dict(is_encoder_decoder=True)), "attention to an encoder"),
    (dict(model=dict(attention_chunk_size=8192)), "attention in chunks"),
    (dict(runner=dict(spec_algorithm=SimpleNamespace(is_none=lambda: False))), "speculative dec"),
    (dict(runner=dict(is_draft_worker=True)), "speculative decoding"),
    (dict(runner=dict(enable_hisparse=True)), "HiSparse"),
    (dict(runner=dict(server_args=SimpleNamespace(dllm_algorithm="x"))), "diffusion language"),
    (dict(published=dict(get_parallel=SimpleNamespace(dcp_enabled=True, attn_cp_size=1))),
     "context parallelism"),
    (dict(published=dict(get_parallel=SimpleNamespace(dcp_enabled=False, attn_cp_size=2))),
     "context parallelism"),
    (dict(published=dict(get_exec=SimpleNamespace(
        overlap=SimpleNamespace(enable_two_batch_overlap=True), graph=EXECUTION.graph))),
     "two-batch overlap"),
    (dict(published=dict(get_exec=SimpleNamespace(
        overlap=EXECUTION.overlap, graph=SimpleNamespace(enable_torch_compile=True)))),
     r"torch.compile \(--enable-torch-compile\)"),
    (dict(published=dict(get_disagg=SimpleNamespace(enable_pdmux=True))), "PD multiplexing"),
    (dict(pool=dict(dtype=torch.float8_e4m3fn)), r"quantised pools \(torch.float8_e4m3fn\)"),
    (dict(pool=dict(kv_cache_layout="vectorized_5d")), "the pool layout vectorized_5d"),
    (dict(pool=dict(v_head_dim=8)), "values of another head size than keys"),
    (dict(kind=True), "a pool of OtherMHATokenToKVPool"),
    (dict(layer=dict(is_cross_attention=True)), r"attention to an encoder \(layer 0\)"),
    (dict(layer=dict(attn_type="ENCODER_ONLY")), r"encoder_only attention \(layer 0\)"),
    (dict(layer=dict(attn_type="DECODER_BIDIRECTIONAL")), "decoder_bidirectional attention"),
    (dict(layer=dict(pos_encoding_mode="ALIBI")), "position encoding ALIBI"),
    (dict(layer=dict(logit_cap=30.0, logit_capping_method="rescale")), "soft caps by rescale"),
    (dict(layer=dict(v_head_dim=8)), r"values of another head size than keys \(layer 0\)"),
    (dict(runner=dict(use_mla_backend=True), layer=dict(pos_encoding_mode="ALIBI")),
     r"MLA \(multi-head latent attention\); nor position encoding ALIBI"),
])  # fmt: skip
def test_what_it_does_not_do_is_refused_by_name(srt, monkeypatch, given, said):
    asked = dict(given.get("layer", {}))
    if "attn_type" in asked:
        asked["attn_type"] = srt.AttentionType[asked["attn_type"]]
    runner, _ = layer_of(srt, **asked)
    srt.ours.Backend(layer_of(srt)[0])
    for at, values in (
        (runner, given.get("runner", {})),
        (runner.model_config, given.get("model", {})),
        (runner.token_to_kv_pool, given.get("pool", {})),
    ):
        for name, value in values.items():
            setattr(at, name, value)
    for name, value in given.get("published", {}).items():
        monkeypatch.setattr(srt.ours, name, lambda value=value: value)
    if "kind" in given:
        runner.token_to_kv_pool.__class__ = other(type(runner.token_to_kv_pool))
    with pytest.raises(NotImplementedError, match=f"does not do .*{said}.*--attention-backend to"):
        srt.ours.Backend(runner)


def test_what_a_forward_asks_for_that_it_does_not_do(srt, monkeypatch):
    runner, layer = layer_of(srt)
    backend = srt.ours.Backend(runner)
    batch = batch_of(srt, runner, [5, 6], [1, 1])
    monkeypatch.setattr(srt.ours, "check_cuda_graph_backend", lambda *x: x == ("prefill", "full"))
    with pytest.raises(NotImplementedError, match="prefill as one CUDA graph .*-prefill full"):
        srt.ours.Backend(runner)
    batch.forward_mode = srt.ForwardMode.EXTEND
    with pytest.raises(NotImplementedError, match="graphs of forwards of SGLang's mode EXTEND"):
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
    batch.forward_mode = srt.ForwardMode.DECODE
    backend.init_forward_metadata(batch)
    new = torch.randn(2, 2, 16)
    with pytest.raises(NotImplementedError, match="does not take q_rope, topk_indices of layer 0"):
        backend.forward(
            torch.randn(2, 128), new, new, layer, batch, q_rope=new, topk_indices=new, idx=None
        )
    batch.forward_mode = srt.ForwardMode.TARGET_VERIFY
    with pytest.raises(NotImplementedError, match="SGLang's mode TARGET_VERIFY"):
        backend.init_forward_metadata(batch)
    batch.forward_mode = srt.ForwardMode.IDLE
    backend.init_forward_metadata(batch)
    assert backend.forward(torch.randn(0, 128), None, None, layer, batch).shape == (0, 128)
    # A row that fills up a batch has one token, in the slot that is nobody's.
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


def test_nothing_is_read_from_the_device_within_a_graph(srt):
    """`init_forward_metadata_in_graph` is SGLang's own, which does nothing."""
    assert "init_forward_metadata_in_graph" not in vars(srt.ours.Backend)
    assert "init_forward_metadata" not in vars(srt.ours.Backend)


def test_the_plugin_adds_choices_and_imports_nothing(srt, monkeypatch):
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    registry = importlib.import_module("sglang.srt.layers.attention.attention_registry")
    samplers = importlib.import_module("sglang.srt.layers.sampler")
    if REAL:
        offered, made = choices.ATTENTION_BACKEND_CHOICES, registry.ATTENTION_BACKENDS
        drawn = samplers._CUSTOM_SAMPLER_FACTORIES
    else:
        offered, made = sglang_standin.CHOICES, sglang_standin.ATTENTION_BACKENDS
        drawn = sglang_standin.SAMPLERS
    before = list(offered), dict(made), dict(drawn)
    for name in SERVE:
        monkeypatch.delitem(sys.modules, name)
    serve.sglang_plugin()
    assert not set(SERVE) & set(sys.modules)
    assert offered == [*before[0], "kvtools"]
    assert made == before[1] | {"kvtools": serve._sglang_attention}
    assert drawn == before[2] | {"kvtools": serve._sglang_sampler}
    runner, _ = layer_of(srt)
    monkeypatch.setitem(sys.modules, SERVE[0], srt.ours)
    monkeypatch.setattr(sys.modules["kvtools.serve"], "sglang", srt.ours, raising=False)
    assert type(made["kvtools"](runner)) is srt.ours.Backend


def test_the_plugin_is_where_sglang_looks_for_it():
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines()
    entry = lines[lines.index('[project.entry-points."sglang.srt.plugins"]') + 1]
    assert entry.startswith(f'kvtools = "{serve.__name__}:{serve.sglang_plugin.__name__}"')


@pytest.mark.parametrize("check,calls,fields,remedy", [
    ("check_sglang", "SGLANG_CALLS", "SGLANG_FIELDS", "--attention-backend"),
    ("check_sglang_sampler", "SGLANG_SAMPLER_CALLS", "SGLANG_SAMPLER_FIELDS",
     "--sampling-backend"),
])  # fmt: skip
def test_another_interface_is_named(srt, monkeypatch, check, calls, fields, remedy):
    from kvtools.serve import interface

    getattr(interface, check)()
    (module, name), expected = next(iter(getattr(interface, calls).items()))
    monkeypatch.setitem(getattr(interface, calls), (module, name), (*expected, "tree"))
    monkeypatch.setitem(getattr(interface, calls), ("sglang.gone", "call"), ("x",))
    of, known = next(iter(getattr(interface, fields).items()))
    monkeypatch.setitem(getattr(interface, fields), of, known | {"prefix_tree"})
    with pytest.raises(RuntimeError) as raised:
        getattr(interface, check)()
    said = str(raised.value)
    assert "was written for SGLang 0.5.23, and SGLang " in said
    assert f"{name} takes {', '.join(expected)}, not {', '.join((*expected, 'tree'))}" in said
    assert "call takes nothing, as it is gone, not x" in said
    assert f"{of[1]} has no prefix_tree" in said and said.endswith(f"another {remedy}")


def info_of(srt, requests):
    """SGLang's description of a batch's sampling; each request has `sampling` and `rid`."""
    given = [
        dict(temperature=1.0, top_p=1.0, top_k=2**30, min_p=0.0) | x.sampling for x in requests
    ]
    for x in given:
        if x["temperature"] == 0:  # so SGLang takes it
            x.update(temperature=1.0, top_k=1)
    rows = {
        k: torch.tensor([x[k] for x in given]) for k in ("temperature", "top_p", "top_k", "min_p")
    }
    greedy = [x["top_k"] == 1 for x in given]
    info = srt.SamplingBatchInfo(
        rows["temperature"][:, None].float(), rows["top_p"].float(), rows["top_k"].int(),
        rows["min_p"].float(), all(greedy), any(greedy), True, True, True, 256, device="cpu",
    )  # fmt: skip
    seeds = [SimpleNamespace(sampling_seed=x.sampling.get("seed")) for x in requests]
    info.adjusted_from_schedule_batch(
        SimpleNamespace(reqs=[SimpleNamespace(sampling_params=p, rid=x.rid)
                              for p, x in zip(seeds, requests, strict=True)]), 256,
    )  # fmt: skip
    return info


@pytest.fixture
def sampler(srt, monkeypatch):
    """Without a process group, which only ranks need."""
    plain = srt.SamplingBatchInfo.adjusted_from_schedule_batch
    if REAL:
        monkeypatch.setattr(srt.Sampler, "__init__", torch.nn.Module.__init__)
    found = srt.sampler.Sampler()
    if REAL:
        found.rl_on_policy_target, found.enable_deterministic = None, False
        found.use_log_softmax_logprob = found.use_ascend_backend = False
        found.use_ascend_backend = False
    yield found
    srt.SamplingBatchInfo.adjusted_from_schedule_batch = plain


def draw(sampler, info, logits_bv, length_b):
    """As SGLang's runner asks: the position of the last token that there is."""
    output = SimpleNamespace(next_token_logits=logits_bv.clone())
    return sampler(output, info, False, [0], [None], length_b - 1)


def test_an_engines_tokens_are_those_of_sample(srt, sampler):
    """Whatever the batch, the chunks and who was retracted; greedy rows among them."""
    model = tiny_model()
    kinds = [
        dict(seed=3), dict(seed=-(2**63)), dict(temperature=0), {}, dict(seed=8, top_k=5),
        dict(temperature=0.6, top_p=0.8, seed=9), dict(min_p=0.05, seed=2**63 - 1),
    ]  # fmt: skip

    def requests(order):
        found = mixed(8, n=4)
        for i, x in enumerate(found):
            x.sampling, x.rid, x.new = kinds[i % len(kinds)], f"request {i}", 6
        return sorted(found, key=order)

    def choose(logits, rows, lens):
        return draw(sampler, info_of(srt, rows), logits, lens)

    apart = dict(page=1, slots=220, most=4, chunk=20, choose=choose)
    found = []
    for given, order in ((dict(choose=choose), lambda x: 0), (apart, lambda x: x.rid[::-1])):
        engine, sent = Engine(model, srt, srt.ours.Backend, **given), requests(order)
        found.append({x.rid: new for x, new in zip(sent, engine.run(sent), strict=True)})
    assert found[0] == found[1]
    for x in requests(lambda x: 0):
        new, kind = found[0][x.rid], dict(x.sampling)
        seed = kind.pop("seed", None)
        seed = srt.sampler._seed(None, x.rid) if seed is None else seed
        with torch.no_grad():
            logits_bv = model(torch.tensor([x.prompt + new])).logits[0, len(x.prompt) - 1 : -1]
        position_b = torch.arange(len(new)) + len(x.prompt)
        seed_b = torch.full_like(position_b, seed)
        assert kvtools.sample(logits_bv, seed_b, position_b, **kind)[0].tolist() == new


@pytest.mark.parametrize("sampling", [
    {}, dict(temperature=0.5), dict(top_k=4), dict(top_p=0.6), dict(min_p=0.3),
    dict(temperature=1.7, top_k=9, top_p=0.9, min_p=0.1),
], ids=str)  # fmt: skip
def test_draws_follow_the_filtered_distribution(srt, sampler, sampling):
    """A chi-square test over 6,000 requests without a seed, whose ids alone differ."""
    logits_v = 2 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    kind = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | sampling
    z = logits_v.double() / kind["temperature"]
    order = z.argsort(descending=True)
    kept = torch.ones(12, dtype=torch.bool)
    if kind["top_k"]:
        kept[order[kind["top_k"] :]] = False
    p = z.masked_fill(~kept, -torch.inf).softmax(-1)
    kept &= (p[order].cumsum(-1) - p[order] < kind["top_p"])[order.argsort()]
    kept &= z.softmax(-1) >= kind["min_p"] * z.softmax(-1).max()
    p = z.masked_fill(~kept, -torch.inf).softmax(-1)
    rows = [Request([], 0, rid=str(i), sampling=sampling) for i in range(6000)]
    token_b = draw(sampler, info_of(srt, rows), logits_v.expand(6000, -1), torch.full((6000,), 5))
    counts, expected = token_b.long().bincount(minlength=12), 6000 * p
    assert not counts[~kept].any()
    statistic = float(((counts - expected) ** 2 / expected)[kept].sum())
    free = int(kept.sum()) - 1
    assert statistic < free + 5 * (2 * free) ** 0.5 + 5


def test_greedy_rows_among_others_take_the_first_of_equals(srt, sampler):
    rows = [Request([], 0, rid=str(i), sampling=dict(temperature=0)) for i in range(20)]
    rows.append(Request([], 0, rid="another"))
    token_b = draw(sampler, info_of(srt, rows), torch.zeros(21, 12), torch.full((21,), 3))
    assert not token_b[:20].any()


def test_rows_from_which_none_can_be_drawn(srt, sampler):
    """Take what is greatest; and an SGLang of several ranks has the same seeds on all."""
    logits_bv = torch.randn(3, 12)
    logits_bv[0, 4], logits_bv[1] = torch.inf, -torch.inf
    rows = [Request([], 0, rid=x) for x in "abc"]
    token_b = draw(sampler, info_of(srt, rows), logits_bv, torch.tensor([3, 3, 3]))
    assert token_b.tolist()[:2] == [4, 0] and 0 <= token_b[2] < 12
    seeds = info_of(srt, rows).sampling_seed.tolist()
    assert seeds == info_of(srt, rows).sampling_seed.tolist() and len(set(seeds)) == 3


def asked(prompt, **sampling):
    return {"prompt": prompt, "sampling": sampling}


def run(tmp_path, model, rounds, sampler=False, check=True, **engine):
    """Rounds of requests through one engine of SGLang's."""
    model.save_pretrained(tmp_path / "model")
    sglang_worker.site(tmp_path, sampler)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(serve.__file__).parents[2])]),
        "SGLANG_USE_CPU_ENGINE": "1", "SGLANG_TEST_RETRACT": "1",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    given = dict(max_total_tokens=700, chunked_prefill_size=64, max_running_requests=24)
    given = {"engine": given | engine | {"model_path": str(tmp_path / "model")}, "rounds": rounds}
    done = subprocess.run(
        [sys.executable, sglang_worker.__file__], input=json.dumps(given), env=env,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if not check:
        return {"failed": done.returncode != 0, "said": said}
    assert done.returncode == 0, said[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"said": said}


@only_real
def test_an_engine_of_sglangs(tmp_path):
    """A whole one on a CPU: scheduler, radix cache, chunks, mixed batches, retraction; and seeds.

    On a CPU SGLang has one sampler only, so there it is replaced under that one's name.
    """
    model, requests = tiny_model("qwen3"), mixed(48)
    sent = [asked(x.prompt, temperature=0, max_new_tokens=x.new) for x in requests]
    filters = dict(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01)
    seeded = [
        asked(x.prompt, max_new_tokens=6, sampling_seed=7 * i - 20, **filters)
        for i, x in enumerate(mixed(10, n=4))
    ]
    others = [asked(x.prompt[::-1], max_new_tokens=9, temperature=1.3) for x in mixed(10, n=4)]
    shuffled = [x for pair in zip(others, seeded[::-1], strict=True) for x in pair]
    found = run(
        tmp_path, model, [sent, seeded, shuffled], sampler=True, attention_backend="kvtools",
        enable_mixed_chunk=True,
    )  # fmt: skip
    assert found["attention"] == "kvtools" and "made kvtools.serve.sglang" in found["said"]
    assert found["cached"] > 0 and re.search(r"#retracted_reqs: [1-9]", found["said"])
    greedy, together, apart = found["tokens"]
    assert greedy == alone(model, requests)
    assert together == apart[1::2][::-1]
    for x, new in zip(seeded, together, strict=True):
        with torch.no_grad():
            logits_bv = model(torch.tensor([x["prompt"] + new])).logits[
                0, len(x["prompt"]) - 1 : -1
            ]
        position_b = torch.arange(len(new)) + len(x["prompt"])
        seed_b = torch.full_like(position_b, x["sampling"]["sampling_seed"])
        assert kvtools.sample(logits_bv, seed_b, position_b, **filters)[0].tolist() == new


@only_real
@pytest.mark.long
def test_an_engine_that_asks_for_another_attention(tmp_path):
    model, requests = tiny_model(), mixed(6, n=2)
    sent = [asked(x.prompt, temperature=0, max_new_tokens=x.new) for x in requests]
    found = run(tmp_path, model, [sent], attention_backend="torch_native")
    assert found["attention"] == "torch_native" and "made kvtools" not in found["said"]
    assert found["tokens"] == [alone(model, requests)]


@only_real
@pytest.mark.long
def test_an_engine_refuses_by_name_before_it_serves(tmp_path):
    model = copy.deepcopy(tiny_model())
    model.config.attention_chunk_size = 64
    found = run(tmp_path, model, [], attention_backend="kvtools", check=False)
    assert found["failed"]
    assert "does not do attention in chunks. Choose another --attention-backend" in found["said"]


@only_real
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 5, 9)], ids=["decode", "extend"])
def test_a_layer_against_sglangs_own(srt, counts):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    torch.manual_seed(0)
    runner, layer = layer_of(srt, page=4, sliding_window_size=20)
    batch = batch_of(srt, runner, [37, 34, 9], counts, shared=28)
    batch.extend_prefix_lens = batch.seq_lens - batch.extend_seq_lens
    for x in runner.token_to_kv_pool.get_kv_buffer(0):
        x.copy_(torch.randn_like(x))
    q, k, v = torch.randn(sum(counts), 8 * 16), *torch.randn(2, sum(counts), 2, 16)
    outs = []
    for make in (srt.ours.Backend, TorchNativeAttnBackend):
        backend = make(runner)
        backend.init_forward_metadata(batch)
        outs.append(backend.forward(q, k, v, layer, batch))
    torch.testing.assert_close(*outs)
