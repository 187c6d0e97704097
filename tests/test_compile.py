"""A model given to torch.compile decodes as one graph, for any number of rows and tokens, with the
tokens of the eager one; what cannot be compiled runs eagerly and says so."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
from models import COMMON, Counter, fresh_model, padded_prompts, random_ids, scaled, tiny_model
from test_door import MODELS
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import kvtools
from kvtools.hf import decode, session
from kvtools.hf.door import eager_of

CONFIGS = {
    "exact": kvtools.CacheConfig(),
    "balanced": kvtools.CacheConfig.preset("balanced", recent=4),
    "evicting": kvtools.CacheConfig(bits=8, budget=8, recent=2),
}


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs(list):
    """A backend that runs graphs as they are, and lists them."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward

    def __deepcopy__(self, memo):  # which CompileConfig asks for
        return self


def compiled(model, **options):
    graphs = Graphs()
    options = dict(backend=graphs, fullgraph=True) | options
    model.forward = torch.compile(model.forward, **options)
    return model, graphs


def rollouts(model, config, counts=(8, 3, 1, 5, 4, 1, 2)):
    """Greedy tokens of rows over two prompts, forked and pruned between steps."""
    run = kvtools.Rollouts(model, config, temperature=0, eos_token_id=())
    run.prefill([random_ids(20).tolist(), random_ids(33, seed=2).tolist()], 3)
    seen = []
    for count in counts:
        run.step()
        seen.append([list(x) for x in run.tokens])
        run.gather([(5 * i) % run.rows for i in range(count)])
    return seen, run.kv


@pytest.mark.parametrize(
    "name, config, dynamic",
    [
        ("llama", "exact", True), ("qwen3", "balanced", None), ("gemma3", "evicting", None),
        ("gptoss", "balanced", None),
    ],
)  # fmt: skip
def test_one_graph_for_any_rows(name, config, dynamic):
    want, _ = rollouts(tiny_model(name), CONFIGS[config])
    model, graphs = compiled(fresh_model(name), dynamic=dynamic)
    for _ in range(2):
        got, kv = rollouts(model, CONFIGS[config])
        assert got == want
    assert len(graphs) == 2  # and one for a single row, which torch.compile always tells apart
    kv = weakref.ref(kv)
    gc.collect()
    assert kv() is None  # no graph holds it


@pytest.mark.parametrize(
    "name",
    ["layers that share keys", "positions counted from the cache", "longrope past its switch"],
)
def test_other_doors(name):
    ids, mask = padded_prompts()
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=12)
    plain = MODELS[name]().generate(ids, custom_generate=kvtools.generate, **options)
    model, graphs = compiled(MODELS[name]())
    assert torch.equal(model.generate(ids, custom_generate=kvtools.generate, **options), plain)
    assert 1 <= len(graphs) <= 2  # with longrope a row may be alone


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


def decoder(model, **options):
    model.model = torch.compile(model.model, **options)
    return model


def layer(model, **options):
    model.model.layers[0].compile(**options, dynamic=True)  # its rows are not ours to mark
    return model


LONG = [pytest.param(x, marks=pytest.mark.long) for x in (in_place, decoder)]


@pytest.mark.parametrize("form", [whole, forward, layer, *LONG, None])
def test_forms(form):
    """Rows finish one by one; prompts never come to the compiler."""
    ids, mask = padded_prompts()
    stock = fresh_model()
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=12)
    tokens = stock.generate(ids, **options)[:, ids.shape[1] :]
    options |= dict(eos_token_id=[int(tokens[0, 3]), int(tokens[1, 6])])
    plain, graphs = stock.generate(ids, **options), Graphs()
    given = dict(backend=graphs, fullgraph=True)
    model = fresh_model() if form is None else form(fresh_model(), **given)
    with kvtools.patch(model):
        if form is None:
            options["compile_config"] = CompileConfig(mode=None, **given)
        assert torch.equal(model.generate(ids, **options), plain)
    assert 1 <= len(graphs) <= 2
    if form is None:
        before = len(graphs)
        torch._dynamo.reset()
        with kvtools.patch(model):
            assert torch.equal(model.generate(ids, disable_compile=True, **options), plain)
        assert len(graphs) == before


def test_prompts_and_extensions_run_eagerly():
    model, graphs = compiled(fresh_model())
    with Counter(model) as seen:
        run = session.Session(model, kvtools.CacheConfig())
        run.prefill([random_ids(9)], [2])
        run.extend(random_ids(5), torch.tensor([2, 3]).numpy())
        assert not graphs and len(seen.forwards) == 2
        run.extend(random_ids(2))
    assert len(graphs) == 1


def test_steps_ahead_of_the_host(monkeypatch):
    """Where there are CUDA graphs, they hold compiled steps, some of whose rows are skipped."""

    def generate(model):
        run = kvtools.Rollouts(model, CONFIGS["balanced"], seed=3, eos_token_id=range(60))
        run.prefill([random_ids(20).tolist()], 5)
        run.generate(12)
        return run.tokens, [round(x, 4) for row in run.logprobs for x in row]

    want = generate(tiny_model())
    launched = []

    def capture(run):
        launched.append(run())
        return run

    monkeypatch.setattr(decode, "capturer", lambda device: capture)
    model, graphs = compiled(fresh_model())
    assert generate(model) == want
    assert launched and 1 <= len(graphs) <= 2


def one_layer():
    torch.manual_seed(0)
    return scaled(LlamaForCausalLM(LlamaConfig(**COMMON | dict(num_hidden_layers=1))))


def test_what_inductor_is_told():
    """It neither drops the operator nor replays it without the host."""
    graphs = Graphs()
    model, _ = compiled(one_layer(), backend=aot_autograd(fw_compiler=graphs))
    rollouts(model, None, (2, 2))
    (graph,) = graphs
    attend = torch.ops.kvtools.attend_rows.default
    (node,) = (node for node in graph.graph.nodes if node.target is attend)
    assert torch.Tag.cudagraph_unsafe in attend.tags and node.is_impure()


def test_inductor():
    counts = 4, 3, 2
    want, _ = rollouts(one_layer(), CONFIGS["balanced"], counts)
    model, _ = compiled(one_layer(), backend="inductor")
    assert rollouts(model, CONFIGS["balanced"], counts)[0] == want


@pytest.mark.parametrize("name", ["dynamic rope", "latent keys"])
def test_what_cannot_be_compiled(name):
    session._warn.cache_clear()
    model, graphs = compiled(MODELS[name]())
    ids = random_ids(2, 12)
    options = dict(do_sample=False, max_new_tokens=6, custom_generate=kvtools.generate)
    want = MODELS[name]().generate(ids, **options)
    with pytest.warns(RuntimeWarning, match=f"{model.config.model_type} without torch.compile"):
        assert torch.equal(model.generate(ids, **options), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, **options), want)
    assert not graphs


def test_breaks_are_errors():
    model = fresh_model()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    model, _ = compiled(model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        rollouts(model, None)


def test_plain_forwards_beside():
    """Of a model that another thread runs through kvtools, and of one that has been."""
    model, graphs = compiled(fresh_model())
    ids = random_ids(2, 24)
    with torch.no_grad():
        want = tiny_model()(ids, use_cache=False).logits
    got = []

    def beside():
        with torch.no_grad():
            got.append(model(ids, use_cache=False).logits)

    run = session.Session(model, kvtools.CacheConfig())
    with session.plugged(run.door):
        run.prefill([ids[0]], 2)
        run.extend(ids[:, 0])
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        run.extend(ids[:, 1])
    beside()
    assert len(got) == 2 and all(torch.equal(x, want) for x in got)
    assert len(graphs) == 3


def test_eager_of_shares_all_but_what_is_compiled():
    model = fresh_model()
    assert eager_of(model) is model
    layer = model.model.layers[1]
    layer.compile()
    bare = eager_of(torch.compile(model))
    assert bare is not model and bare.model.layers[1] is not layer
    assert bare.model.layers[1].self_attn is layer.self_attn
    assert bare.model.layers[0] is model.model.layers[0] and bare.config is model.config
    assert all(x is y for x, y in zip(bare.parameters(), model.parameters(), strict=True))
    assert layer._compiled_call_impl is not None and isinstance(model.model, type(bare.model))
