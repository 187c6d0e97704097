"""Caches in files."""

import json
import os
import shutil
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from models import fresh_model, padded_prompts, random_ids, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_continuation import cache_of, generate
from test_door import MODELS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

import kvtools
from kvtools import CacheConfig, load_cache, save_cache
from kvtools.hf import check_model

EVICTS = dict(budget=24, recent=8, sinks=2, drop=4)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bits=4),
        dict(bits="fp8", recent_bits=16, sinks=0),
        dict(k_bits=6, v_bits=3, page_size=5),
        dict(k_bits=16, v_bits=2, prompt_budget=24, recent=8),
        dict(bits=8, **EVICTS),
        dict(**EVICTS, policy="h2o", layer_budget="later"),
        dict(bits=4, **EVICTS, policy="tova", prompt_budget=25),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_goes_on_as_the_cache_that_was_saved(name, options, tmp_path):
    """To the bit: rows that have forked and evicted, greedy and seeded."""
    model, config = tiny_model(name), CacheConfig(**options)
    ids, mask = padded_prompts((40, 20, 33))
    how = dict(do_sample=True, num_return_sequences=2, max_new_tokens=20)
    torch.manual_seed(1)
    cache = cache_of(generate(model, ids, mask=mask, kv_config=config, **how))
    cache.gather([4, 0, 0, 3, 1])
    path = tmp_path / "cache.safetensors"
    save_cache(model, cache, path)
    assert os.listdir(tmp_path) == [path.name]
    pages = sum(x.forest.num_pages - x.forest.free_pages for x in cache.kv.stores)
    copies = [load_cache(model, path), load_cache(model, path, config)]
    for copy in copies:
        assert (copy.texts, copy.prompt_lengths) == (cache.texts, cache.prompt_lengths)
        assert sum(x.forest.num_pages for x in copy.kv.stores) == pages, "those in use alone"
        assert copy.kv.lengths.tolist() == cache.kv.lengths.tolist()
        for layer in range(4):
            for row in range(5):
                assert copy.kv.kept(layer, row) == cache.kv.kept(layer, row)
    runs = [kvtools.Rollouts(model, seed=5, cache=x) for x in (cache, *copies)]
    for r in runs:
        r.generate(9)
        r.gather([1, 1, 0, 4])
        r.append([[5, 6, 7], [8], [], [9]])
        r.filters["temperature"] = 0.0
        r.generate(30)
    for r in runs[1:]:
        assert r.tokens == runs[0].tokens
        assert torch.equal(
            torch.tensor(r.logprobs[0]).nan_to_num(), torch.tensor(runs[0].logprobs[0]).nan_to_num()
        )


def test_generate_goes_on(tmp_path):
    """In a process that has seen no prompt yet, whose model is another copy of it."""
    for name in ("llama", "gemma3"):
        ids, path = random_ids(1, 40), tmp_path / name
        first = generate(tiny_model(name), ids)
        save_cache(tiny_model(name), cache_of(first), path)
        model, said = fresh_model(name), torch.cat([first.sequences, random_ids(1, 7)], 1)
        want = generate(tiny_model(name), said, cache_of(first)).sequences
        assert torch.equal(generate(model, said, load_cache(model, path)).sequences, want)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(bits=4), dict(bits=8, **EVICTS), dict(bits="fp8", prompt_budget=24, recent=8)],
    ids=str,
)
def test_a_cache_is_its_own_once_loaded(options, tmp_path):
    """Whatever becomes of the file, which safetensors maps, also where it is written over in
    place, as cp does."""
    model, path = tiny_model(), tmp_path / "cache"
    how = dict(kv_config=CacheConfig(**options), max_new_tokens=30)
    save_cache(model, cache_of(generate(model, random_ids(2, 40), **how)), path)
    cache = load_cache(model, path)
    before = {name: x.clone() for name, x in cache.kv.packed().items()}
    with path.open("r+b") as file:
        file.write(b"\1" * path.stat().st_size)
    for name, x in cache.kv.packed().items():
        held, now = (bytes(y.contiguous().view(-1).view(torch.uint8)) for y in (before[name], x))
        assert held == now, name


def test_rows_that_passed_a_switch(tmp_path):
    model, path = MODELS["longrope past its switch"](), tmp_path / "cache"
    cache = cache_of(generate(model, random_ids(1, 38)))
    save_cache(model, cache, path)
    runs = [
        kvtools.Rollouts(model, temperature=0.0, cache=x) for x in (cache, load_cache(model, path))
    ]
    assert runs[0].generate(16) == runs[1].generate(16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache"
    config = CacheConfig(bits=8, **EVICTS)
    how = dict(kv_config=config, max_new_tokens=30)
    cache = cache_of(generate(tiny_model(), random_ids(1, 40), **how))
    save_cache(tiny_model(), cache, path)
    return path, cache


def changed(path, new, tensors=(), **words):
    """A file with other content."""
    with safe_open(path, "pt") as file:
        held = file.metadata()
    save_file(load_file(path) | dict(tensors), new, held | words)
    return new


def test_what_cannot_be_loaded(saved, tmp_path):
    path, cache = saved
    model, other = tiny_model(), fresh_model()
    inside = fresh_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
        inside.model.layers[2].self_attn.k_proj.weight[7, 5] += 1e-3
    base = CacheConfig(bits=8, **EVICTS)
    assert load_cache(model, path, CacheConfig(bits=8, **EVICTS, impl="reference")).kv.rows == 1
    for at, args, words in (
        (tiny_model("qwen3"), (), "another model: class='LlamaForCausalLM', not 'Qwen3ForCausal"),
        (other, (), "another model: weights="),
        (inside, (), "another model: weights="),
        (fresh_model().bfloat16(), (), "another model: dtype='torch.float32', not 'torch.bfloat16"),
        (model, (CacheConfig(),), "another config: bits=8, not 16"),
        (model, (CacheConfig(**{**vars(base), "window": 9}),), "config: window=16, not 9"),
        (model, (CacheConfig(policy=len),), "policy=<built-in function len> is a function"),
    ):
        with pytest.raises(ValueError, match=words):
            load_cache(at, path, *args)
    with pytest.raises(TypeError, match="config='exact': expected"):
        load_cache(model, path, "exact")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_cache(model, tmp_path / "none")
    with pytest.raises(TypeError, match="got str"):
        load_cache("gpt2", path)
    size = path.stat().st_size
    for n in (0, 7, 100, size // 2, size - 1):
        cut = tmp_path / "cut"
        cut.write_bytes(path.read_bytes()[:n])
        with pytest.raises(ValueError, match="cut is no whole file of a cache"):
            load_cache(model, cut)
    new = tmp_path / "new"
    save_file({"x": torch.ones(1)}, new)
    with pytest.raises(ValueError, match="has the format None, not"):
        load_cache(model, new)
    with pytest.raises(ValueError, match='has the format "kvtools cache 2", not'):
        load_cache(model, changed(path, new, format=json.dumps("kvtools cache 2")))
    shutil.copy(path, new)
    held = load_file(path)
    for name, x in (
        ("kv.store0.page", held["kv.store0.page"] * 0),
        ("kv.store0.node", held["kv.store0.node"][:-1]),
        ("kv.store0.row", held["kv.store0.row"] + 9),
        ("kv.store0.victims", held["kv.store0.victims"] + 24),
        ("kv.store0.left", held["kv.store0.left"] + 5),
        ("kv.store0.1.k", held["kv.store0.1.k"][:-1]),
        ("kv.store0.1.k_scale", held["kv.store0.1.k_scale"].float()),
        ("kv.prompt", held["kv.prompt"] + 1),
        ("kv.seen", held["kv.seen"].repeat(2)),
        ("lengths", held["lengths"] + 1),
    ):
        with pytest.raises(ValueError, match="new is no whole file of a cache"):
            load_cache(model, changed(path, new, {name: x}))
    assert cache.kv.rows == 1 and len(cache.texts[0]) == 70


def test_what_cannot_be_saved(saved, tmp_path, monkeypatch):
    """What is at the path stays what it was."""
    path, cache = saved
    model, new = tiny_model(), tmp_path / "there"
    shutil.copy(path, new)
    taken = cache_of(generate(model, random_ids(1, 20)))
    kvtools.Rollouts(model, cache=taken)
    function = CacheConfig(policy=lambda x: x.position_nhs.float(), **EVICTS)
    empty = cache_of(generate(model, random_ids(1, 20)))
    empty.gather([])
    for at, what, error, words in (
        (tiny_model("qwen3"), cache, ValueError, "cache was filled by another model"),
        (model, taken, ValueError, "cache does not know its texts"),
        (model, empty, ValueError, "cache holds no rows"),
        (model, DynamicCache(), TypeError, "cache is a DynamicCache"),
        (model, None, TypeError, "cache is None"),
        (model, cache_of(generate(model, random_ids(1, 20), kv_config=function)), ValueError,
         "policy=.* is a function, which no file can hold"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            save_cache(at, what, new)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_cache(model, cache, tmp_path / "no folder" / "cache")
    with pytest.raises(IsADirectoryError, match="name a file"):
        save_cache(model, cache, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="name a file"):
        save_cache(model, cache, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "pipe").unlink()
    monkeypatch.setattr("os.fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_cache(model, cache, new)
    assert new.read_bytes() == path.read_bytes() and os.listdir(tmp_path) == ["there"]
    assert check_model(model).windows


def test_who_may_read_a_file(saved, tmp_path):
    """As with any other file: the umask, or what was there, says so."""
    path, cache = saved
    plain, new = tmp_path / "plain", tmp_path / "new"
    plain.touch()
    save_cache(tiny_model(), cache, new)
    assert new.stat().st_mode == plain.stat().st_mode
    new.chmod(0o640)
    save_cache(tiny_model(), cache, new)
    assert new.stat().st_mode & 0o777 == 0o640
    assert load_cache(tiny_model(), new).kv.rows == 1


def test_weights_that_are_no_parameters(tmp_path):
    """Of quantised layers, say: what a checkpoint holds counts, wherever it is kept."""
    model, path = fresh_model(), tmp_path / "cache"
    layer = model.model.layers[1].mlp
    layer.register_buffer("scale", torch.tensor(2.0))
    layer.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    layer.register_buffer("none", torch.empty(0, 4))
    layer.register_buffer("length", torch.tensor(5), persistent=False)
    save_cache(model, cache_of(generate(model, random_ids(1, 20))), path)
    layer.length += 1
    assert load_cache(model, path).kv.rows == 1
    for change in (layer.scale.mul_, layer.mask.fill_):
        before = deepcopy(layer.state_dict())
        change(0)
        with pytest.raises(ValueError, match="another model: weights="):
            load_cache(model, path)
        layer.load_state_dict(before)
    assert load_cache(model, path).kv.rows == 1


class Adapted(torch.nn.Linear):
    """A layer with adapters, as peft has them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.merged_adapters = linear.weight, []
        self.active_adapters, self.disable_adapters = ["one"], False
        self.scaling = {"one": 2.0, "two": 2.0}
        self.lora = torch.nn.Parameter(torch.randn(2, linear.out_features))

    def forward(self, x):
        on = [] if self.disable_adapters else self.active_adapters
        extra = sum(self.scaling[name] * self.lora[int(name == "two")] for name in on)
        return super().forward(x) + extra


def test_adapters_count(tmp_path):
    """Which are on, and how much each counts, which weights do not tell."""
    model, path = fresh_model(), tmp_path / "cache"
    part = model.model.layers[1].self_attn
    part.k_proj = layer = Adapted(part.k_proj)
    save_cache(model, cache_of(generate(model, random_ids(1, 20))), path)
    assert load_cache(model, path).kv.rows == 1
    for change, words in (
        (dict(disable_adapters=True), "adapters='one', not 'off'"),
        (dict(active_adapters=["two"]), "adapters='one', not 'two'"),
        (dict(active_adapters=["one", "two"]), "adapters='one', not 'one, two'"),
        (dict(scaling={"one": 1.0, "two": 2.0}), "weights="),
    ):
        before = dict(vars(layer))
        vars(layer).update(change)
        with pytest.raises(ValueError, match=f"another model: {words}"):
            load_cache(model, path)
        off = tmp_path / "off"
        save_cache(model, cache_of(generate(model, random_ids(1, 20))), off)
        vars(layer).update(before)
        with pytest.raises(ValueError, match="was saved of another model"):
            load_cache(model, off)
    with pytest.raises(ValueError, match="another model: adapters='one', not None"):
        load_cache(fresh_model(), path)
    layer.scaling["two"] = 7.0  # is not on
    assert load_cache(model, path).kv.rows == 1


def test_parameters_of_one_rank_are_whole(tmp_path):
    """FSDP2 has them in tensors of its own, if it is only to offload or to cast."""
    path = tmp_path / "cache.safetensors"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(fresh_model(), mesh=init_device_mesh("cpu", (1,)))
        cache = cache_of(generate(model, random_ids(9)[None]))
        model.reshard()
        assert all(isinstance(x, DTensor) for x in model.parameters())
        save_cache(model, cache, path)
        assert load_cache(model, path).kv.rows == 1
        model.reshard()
        with torch.no_grad():
            next(model.parameters()).to_local().add_(1)
        with pytest.raises(ValueError, match="weights"):
            load_cache(model, path)
    finally:
        dist.destroy_process_group()
