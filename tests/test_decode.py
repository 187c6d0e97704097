"""Steps ahead of the host, captured by the recorder in a CUDA graph's place."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from interrupts import Interrupt
from models import fresh_model, tiny_model
from torch.testing._internal.two_tensor import TwoTensor

import kvtools
from kvtools import CacheConfig, Rollouts
from kvtools._host import PoolExhausted
from kvtools.hf import decode
from kvtools.hf.plug import CACHE
from kvtools.ops.upload import Room, on_device

EOS = [5, 77, 9]
CONFIGS = {
    "exact": CacheConfig(),
    "balanced": CacheConfig.preset("balanced"),
    "history": CacheConfig(bits=4, budget=24, recent=8, sinks=2),
    "last": CacheConfig(budget=24, recent=8, policy="tova"),
    "ring": CacheConfig(bits=4, budget=24, recent=6, sinks=2, recent_bits=8, policy="snapkv"),
    "layers": CacheConfig(bits=8, budget=40, recent=6, layer_budget="later", policy="streaming"),
}


class Then(torch.nn.Module):
    """A module, and a function of what goes in and what comes out."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x):
        return self.function(x, self.module(x))


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 256, (n,), generator=generator).tolist() for n in lengths]


def started(config, model="llama", **options):
    model = tiny_model(model) if isinstance(model, str) else model
    options = dict(temperature=0.9, eos_token_id=EOS, seed=3) | options
    rollouts = Rollouts(model, config, **options)
    rollouts.prefill(prompts(20, 33, 7), 2)
    return rollouts


def same(a, b):
    assert a.tokens == b.tokens
    assert torch.equal(a.kv.lengths, b.kv.lengths) and (a.finished == b.finished).all()
    for ours, theirs in zip(a.logprobs, b.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)  # a code may fall to the other side


@pytest.mark.parametrize("model,config", [
    ("llama", "exact"), ("llama", "balanced"), ("llama", "history"), ("llama", "last"),
    ("qwen3", "exact"), ("qwen3", "ring"), ("gemma3", "exact"), ("gemma3", "layers"),
    ("gptoss", "exact"), ("gptoss", "balanced"),
])  # fmt: skip
def test_rollouts(model, config, graphs):
    """Rows that end by a token, by their number of tokens, and not; forks, and more of the same."""
    both = []
    for graph in (False, "auto"):
        rollouts = started(CONFIGS[config], model, graph=graph)
        rollouts.generate([40, 40, 3, 40, 17, 40])
        rollouts.gather([0, 0, 1, 3, 5, 2])
        rollouts.generate(20)
        both.append(rollouts)
    same(*both)
    assert both[0].finished.any() and not both[0].finished.all()
    assert graphs.replays > 2 * graphs.captures > 0


def state(rollouts):
    """What a row that stood still must not have changed."""
    kv = rollouts.kv
    kept = [[kv.kept(layer, row) for row in range(kv.rows)] for layer in (0, kv.layers - 1)]
    hosts = [(store.left.tolist(), store.forest.lengths().tolist()) for store in kv.stores]
    return kept, hosts, kv._recent and kv._recent.start.tolist()


@pytest.mark.parametrize("kind,config", [
    ("tokens", "exact"), ("tokens", "ring"), ("tokens", "history"), ("callable", "ring"),
    ("progress", "exact"),
])  # fmt: skip
def test_until(kind, config, graphs):
    """Rows that pause, at any time of their victims, hold what those hold that nothing followed."""
    both, until = [], None
    if kind != "progress":
        until = set(range(40, 90)) if kind == "tokens" else lambda new: sum(new) % 7 == 0
    for graph in (False, "auto"):
        rollouts, told = started(CONFIGS[config], graph=graph, eos_token_id=()), []
        both.append((rollouts, [rollouts.generate(9, until, told.append) and state(rollouts)
                                for _ in range(12)]))  # fmt: skip
        assert told[-1] == 0
    same(both[0][0], both[1][0])
    assert both[0][1] == both[1][1] and graphs.replays


def test_a_page_that_a_stop_gives_back(graphs):
    """Row 1 stops where the next step, launched already, takes its last page; that page goes to row
    2, and row 1 gets another when it goes on."""
    config = CacheConfig(bits=8, budget=21, recent=6, policy="streaming", page_size=4)
    both, stop = [], None
    for graph in (False, False, "auto"):
        rollouts = started(config, graph=graph, eos_token_id=())
        rollouts.generate([40, 20, 8, 0, 0, 0])
        if stop is None:
            rollouts.generate([0, 1, 0, 0, 0, 0])
            stop = rollouts.tokens[1][-1]
            continue
        rollouts.generate([12, 12, 12, 0, 0, 0], {stop})
        rollouts.generate([12, 40, 12, 0, 0, 0])
        both.append((rollouts, state(rollouts)))
    same(both[0][0], both[1][0])
    assert both[0][1] == both[1][1] and graphs.replays


@pytest.mark.parametrize("options", [
    {}, {"do_sample": True, "top_k": 50, "temperature": 0.8}, {"eos_token_id": [*range(60, 99)]},
    {"do_sample": True, "top_p": 0.9, "eos_token_id": [*range(60, 64)]},
])  # fmt: skip
@pytest.mark.parametrize("config", ["exact", "history"])
def test_generate(options, config, graphs):
    ids = torch.tensor(prompts(30, 30, 30))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = []
    for graph in (False, "auto"):
        torch.manual_seed(1)
        with kvtools.patch(tiny_model(), CONFIGS[config], graph=graph) as model:
            out = model.generate(ids, attention_mask=mask, max_new_tokens=40,
                                 return_dict_in_generate=True, **options)  # fmt: skip
            both.append(out.sequences)
    assert torch.equal(*both) and graphs.replays


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.2}, {"output_scores": True}, {"max_time": 1e9},
])  # fmt: skip
def test_what_the_host_has_to_see(options, graphs):
    """It is waited for: nothing runs ahead."""
    ids = torch.tensor(prompts(30))
    with kvtools.patch(tiny_model()) as model:
        model.generate(ids, max_new_tokens=8, return_dict_in_generate=True, **options)
    rollouts = started(CONFIGS["exact"], processor=lambda tokens, logits: logits)
    rollouts.generate(8)
    assert not graphs.captures


def test_what_changes_in_the_model(graphs):
    """A value in place is seen by replays; a parameter, a module, a number make graphs anew."""
    model, twin = fresh_model(), fresh_model()
    both = started(CONFIGS["exact"], twin, graph=False), started(CONFIGS["exact"], model)

    def grow():
        for rollouts in both:
            rollouts.generate(6)
        same(*both)

    grow()
    for change in (
        lambda m: m.lm_head.weight.data.mul_(0.5),
        lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.flip(0))),
        lambda m: setattr(m.model.layers[1].mlp, "act_fn", torch.nn.Tanh()),
        lambda m: setattr(m.model, "norm", Then(m.model.norm, lambda x, out: out * 0.7)),
        lambda m: setattr(m.model.norm.module, "variance_epsilon", 10.0),
    ):
        for each in (model, twin):
            with torch.no_grad():
                change(each)
        grow()


def test_pools_that_grow_and_prompts_that_come(graphs):
    """What lies elsewhere is not read where it was."""
    both = []
    for graph in (False, "auto"):
        rollouts = started(CacheConfig(page_size=4, bits=8), graph=graph, eos_token_id=())
        rollouts.generate(30)
        rollouts.prefill(prompts(50), 3)
        rollouts.generate(30)
        rollouts.crop([len(tokens) - 5 for tokens in rollouts.tokens])
        rollouts.generate(9)
        rollouts.peek([3, 4], [0, 1])
        rollouts.generate(9)
        both.append(rollouts)
    same(*both)


@pytest.mark.parametrize("config", ["exact", "balanced", "ring", "last"])
def test_rows_that_are_gathered(config, graphs):
    """What was captured holds for as many rows in another order, and while pools have room."""
    rollouts = started(CONFIGS[config], eos_token_id=())
    rollouts.generate(34)
    captures = graphs.captures
    rollouts.gather([5, 4, 3, 2, 1, 0])
    rollouts.generate(12)
    assert graphs.captures == captures


def test_logits_that_are_no_distribution(graphs):
    """Rows and step are named, a step late; rows are as before that step, and go on."""
    model, calls = fresh_model(), []

    def spoil(x, out):
        # By what rows are fed, so that a graph can hold it.
        return torch.where((x[:, -1:, :1] * bad).isnan(), torch.nan, out)

    bad = torch.zeros(1)
    model.lm_head = Then(model.lm_head, spoil)
    ours, twin = started(CONFIGS["exact"], model), started(CONFIGS["exact"], graph=False)
    ours.generate(8)

    def progress(left):
        calls.append(left)
        if len(calls) == 4:
            bad.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"no token can be drawn for row 0 at step \d+"):
        ours.generate(30, progress=progress)
    assert 3 <= len(ours.tokens[0]) - 28 <= 6
    bad.zero_()
    twin.generate(40)
    ours.generate([40 - len(x) for x in ours.logprobs])
    assert ours.tokens == twin.tokens


@pytest.mark.parametrize("config", ["exact", "balanced"])
def test_interrupts(config, graphs):
    """Anywhere; then rows say what undisturbed ones say."""
    twin = started(CONFIGS[config], graph=False, eos_token_id=EOS)
    twin.generate(24)
    rng = np.random.default_rng(0)
    ours = started(CONFIGS[config])
    ours.generate(4)
    with Interrupt() as whole:
        started(CONFIGS[config]).generate(4)
    for at in rng.integers(1, whole.seen, 12):
        try:
            with Interrupt(at):
                ours.generate([min(6, 24 - len(x)) for x in ours.logprobs])
        except KeyboardInterrupt:
            pass
    ours.generate([24 - len(x) for x in ours.logprobs])
    assert ours.tokens == twin.tokens
    for store in ours.kv.stores:
        store.forest.check()


def test_a_model_that_looks_at_values(graphs):
    """It is named once, with the call, and run step by step."""
    model = fresh_model()
    model.model.norm = Then(model.model.norm, lambda x, out: out * (1 + 0 * out.sum().item()))
    twin = started(CONFIGS["exact"], graph=False)
    ours = started(CONFIGS["exact"], model)
    with pytest.warns(UserWarning, match="llama is run step by step.*_local_scalar_dense"):
        ours.generate(12)
    ours.generate(5)
    twin.generate(17)
    assert ours.tokens == twin.tokens and not graphs.captures


def test_a_model_whose_frequencies_follow_lengths(graphs):
    config = fresh_model().config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = type(fresh_model())(config).eval()
    with pytest.warns(UserWarning, match="rotary frequencies depend on how long rows are"):
        started(CONFIGS["exact"], model)
    started(CONFIGS["exact"], model).generate(3)
    assert not graphs.captures


@pytest.mark.parametrize("fault,call", [
    (lambda x: x.sum().item(), "_local_scalar_dense"),
    (lambda x: torch.tensor([1.0, 2.0]), "lift_fresh"),
    (lambda x: x[x > 0], "aten.index"),
])  # fmt: skip
def test_faults_are_refused(fault, call, graphs, monkeypatch):
    attend = kvtools.cache.KVCache.attend

    def faulty(self, layer, q, *args, **kwargs):
        fault(q)
        return attend(self, layer, q, *args, **kwargs)

    monkeypatch.setattr(kvtools.cache.KVCache, "attend", faulty)
    with pytest.warns(UserWarning, match=f"cannot be captured.*{call}.*test_decode.py"):
        started(CONFIGS["exact"], fresh_model()).generate(6)


def test_a_plan_that_moves_is_not_replayed(graphs, monkeypatch):
    """Were it not seen that it does, the recorder would refuse."""
    put = Room.put

    def moved(self, names, arrays):
        self._names = None
        return put(self, names, arrays)

    monkeypatch.setattr(Room, "put", moved)
    started(CONFIGS["exact"]).generate(8)
    assert not graphs.captures
    monkeypatch.setattr(Room, "made", property(lambda self: 0, lambda self, n: None), raising=False)
    with pytest.raises(RuntimeError, match="freed or moved"):
        started(CONFIGS["exact"]).generate(8)


def test_options():
    with pytest.raises(ValueError, match="graph=True: expected 'auto' or False"):
        Rollouts(tiny_model(), graph=True)


class Record:
    def __init__(self, **arrays):
        vars(self).update(arrays)


def test_room():
    """What is there is filled up; what does not fit makes it anew."""
    room = Room(4, torch.device("cpu"))

    def put(tokens, nodes):
        record = Record(
            slot_t=np.arange(tokens), frame_t=np.arange(tokens) + 5, kind="no array",
            page_indptr=np.arange(nodes + 1), item=np.arange(6 * nodes).reshape(nodes, 6),
            part_indptr=np.arange(tokens + 1),
        )  # fmt: skip
        on_device(torch.device("cpu"), record, room=room)
        return record

    first = put(3, 3)
    assert first.slot_t.tolist() == [0, 1, 2, -1] and first.frame_t.tolist() == [5, 6, 7, 0]
    assert first.page_indptr.tolist() == [0, 1, 2, 3, 3] and first.part_indptr.tolist() == [
        0, 1, 2, 3, 3,
    ]  # fmt: skip
    assert first.item.shape == (4, 6) and first.item[3].tolist() == [0] * 6
    second = put(4, 2)
    assert room.made == 1 and second.slot_t.data_ptr() == first.slot_t.data_ptr()
    assert first.slot_t.tolist() == [0, 1, 2, 3] and first.page_indptr.tolist() == [0, 1, 2, 2, 2]
    assert second.item[1:].tolist() == [[6, 7, 8, 9, 10, 11], [0] * 6, [0] * 6]
    assert put(4, 5).item.shape == (8, 6) and room.made == 2


def test_a_room_that_is_left_half_made():
    """By an interrupt or the end of memory: it is made anew."""
    room, arrays = Room(4, torch.device("cpu")), [np.arange(3), np.arange(6)]
    with Interrupt() as whole:
        room.put(["slot_t", "page"], arrays)
    for at in range(1, whole.seen + 1):
        room.put(["slot_t", "item"], [np.arange(3), np.arange(16)])
        with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
            room.put(["slot_t", "page"], arrays)
        slots, page = room.put(["slot_t", "page"], arrays)
        assert slots.tolist() == [0, 1, 2, -1] and page.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


@pytest.mark.parametrize("config", CONFIGS)
def test_single_steps_between(config, graphs):
    """Steps of the host go on from what steps ahead left, and the other way round."""
    both = []
    for graph in (False, "auto"):
        rollouts = started(CONFIGS[config], graph=graph, eos_token_id=())
        for n in (2, 4, 3):
            rollouts.generate(n)
            rollouts.step()
        both.append(rollouts)
    same(*both)
    assert graphs.replays


def test_autocast(graphs):
    """Entered or left between calls; weights in its dtype do not outlive it."""
    both = []
    for graph in (False, "auto"):
        rollouts = started(CONFIGS["exact"], fresh_model(), graph=graph, eos_token_id=())
        for enabled in (True, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled):
                rollouts.generate(6)
        both.append(rollouts)
    same(*both)
    assert graphs.captures >= 3


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(register, graphs, monkeypatch):
    """At each step, and what they take from elsewhere is what it is then."""
    monkeypatch.setattr(decode, "_warn", decode._warn.__wrapped__)
    both = []
    for graph in (False, "auto"):
        model, seen = fresh_model(), []
        rollouts = started(CONFIGS["exact"], model, graph=graph, eos_token_id=())
        rollouts.generate(5)

        def steered(module, args, *out, seen=seen):
            seen.append(len(seen))
            return (out or args)[0] * (0.5 + len(seen) % 3)

        handle = getattr(model.model.norm, register)(steered)
        with (
            pytest.warns(UserWarning, match="while it has forward hooks")
            if graph
            else (contextlib.nullcontext())
        ):
            rollouts.generate(9)
        handle.remove()
        assert len(seen) == 9
        rollouts.generate(5)
        both.append(rollouts)
    same(*both)
    assert graphs.captures


def test_what_tells_models_apart():
    """Parts of tensors that are made of others, what a config says, an order, a dtype."""
    model = fresh_model()
    session = Rollouts(model, graph=False)._session
    parts = TwoTensor(torch.ones(3), torch.ones(3)), TwoTensor(torch.ones(3), torch.ones(3))
    model.model.norm.scale = torch.nn.Parameter(parts[0], False)
    seen = [decode._fingerprint(session)]
    assert seen[0] == decode._fingerprint(session)
    layers, weight = model.model.layers, model.lm_head.weight
    for change in (
        lambda: setattr(model.model.norm, "scale", torch.nn.Parameter(parts[1], False)),
        lambda: setattr(model.config, "final_logit_softcapping", 5.0),
        lambda: model.set_attn_implementation("eager"),
        lambda: layers.__setitem__(0, layers[1]),
        lambda: layers.__setitem__(2, layers[1]),
        lambda: setattr(weight, "data", weight.data.view(torch.int32).view(torch.float32).t()),
        lambda: model.train(),
    ):
        change()
        seen.append(decode._fingerprint(session))
    assert len(set(seen)) == len(seen)


def test_callables_see_rows_as_they_are(graphs):
    """No token is under way when they are called; what they change counts from the next step."""
    both = []
    for graph in (False, "auto"):
        rollouts, told = started(CONFIGS["history"], graph=graph), []

        def progress(left, rollouts=rollouts, told=told):
            told.append((left, [list(x) for x in rollouts.tokens], rollouts.kv.lengths.tolist()))
            rollouts.filters["temperature"] = 0.5 + 0.5 * (len(told) > 5)
            if len(told) == 4:
                rollouts.finished[1] = True
            if len(told) == 7:
                rollouts.eos.update(range(30, 60))
            if len(told) % 6 == 2:
                rollouts.peek([3], [0])
                rollouts.step([2])

        def until(new, told=told):
            told.append(list(new))
            return len(told) > 150

        rollouts.generate(14, progress=progress)
        rollouts.generate(8, until)
        both.append((rollouts, told))
    same(both[0][0], both[1][0])
    assert both[0][1] == both[1][1] and graphs.replays


def test_pages_that_run_out(graphs):
    """In the very step in which the host's steps find too few: a row that stops needs none."""
    for pages in (47, 48):
        both = []
        for graph in (False, "auto"):
            rollouts = started(
                CacheConfig(page_size=2), graph=graph, pages=pages, eos_token_id=range(40)
            )
            with contextlib.suppress(PoolExhausted):
                rollouts.generate(24)
            both.append(rollouts)
        same(*both)
    assert graphs.replays


def test_a_model_that_asks_for_the_length(graphs):
    """What a step is told of the longest row is not what it was when it was captured."""
    both = []
    for graph in (False, "auto"):
        model = fresh_model()
        forward = model.model.forward

        def scaled(*args, forward=forward, **kwargs):
            out, past = forward(*args, **kwargs), kwargs[CACHE].get_seq_length()
            out.last_hidden_state = out.last_hidden_state * (0.5 + past % 7 / 7)
            return out

        model.model.forward = scaled
        rollouts = started(CONFIGS["exact"], model, graph=graph, probe=False, eos_token_id=())
        rollouts.generate(20)
        both.append(rollouts)
    same(*both)
    assert graphs.replays


@pytest.mark.parametrize("policy", ["h2o", "tova", "scissorhands"])
def test_interrupts_of_rows_that_evict(policy, graphs):
    """Attention is counted once."""
    config = CacheConfig(bits=8, budget=14, recent=3, sinks=1, policy=policy, drop=3)
    twin, ours = started(config, graph=False), started(config)
    twin.generate(40)
    ours.generate(14)
    with Interrupt() as whole:
        started(config).generate(3)
    rng = np.random.default_rng(0)
    for at in rng.integers(1, whole.seen // 3, 24):
        with contextlib.suppress(KeyboardInterrupt), Interrupt(at):
            ours.generate([min(1, 40 - len(x)) for x in ours.logprobs])
    ours.generate([40 - len(x) for x in ours.logprobs])
    same(ours, twin)
    assert state(ours) == state(twin)


@functools.cache
def precise(name):
    """In which the size of a batch excites no difference."""
    model = fresh_model(name).double()
    model.lm_head = Then(model.lm_head, lambda x, out: out.float())
    return model


def random_config(rng):
    sinks, recent = int(rng.choice([0, 1, 2, 4])), int(rng.choice([1, 3, 6, 8]))
    options = dict(
        bits=rng.choice([16, 16, 8, 4]).item(), recent_bits=rng.choice([None, 8, 16]),
        page_size=int(rng.choice([3, 4, 8, 16])), sinks=sinks, recent=recent,
        layer_budget=str(rng.choice(["uniform", "uniform", "later"])),
    )  # fmt: skip
    if rng.random() < 0.7:
        names = "scissorhands", "h2o", "snapkv", "tova", "streaming", "lru", "random"
        options |= dict(budget=sinks + recent + int(rng.integers(1, 12)), window=8)
        options |= dict(policy=str(rng.choice(names)))
    if rng.random() < 0.4:
        options |= dict(prompt_budget=(0.5, sinks + recent + 3)[rng.integers(2)])
    return CacheConfig(**options)


def random_change(rng, rows, tokens, prompt_lengths):
    """What to do with rollouts that have these rows."""
    some = rng.integers(0, rows, int(rng.integers(1, rows + 3))).tolist()
    each = [int(rng.integers(least, len(x) + 1)) if rng.random() < 0.5 else len(x)
            for x, least in zip(tokens, prompt_lengths, strict=True)]  # fmt: skip
    most = int(rng.integers(1, 25)) if rng.random() < 0.5 else rng.integers(0, 20, rows)
    parity, untils = int(rng.integers(3, 9)), set(rng.integers(0, 256, 30).tolist())
    until = (None, None, untils, lambda new: sum(new) % parity == 0)[rng.integers(4)]
    value, calls = float(rng.choice([0, 0.7, 1.2])), rng.random() < 0.3
    return {
        "generate": lambda x, told: x.generate(most, until, told.append if calls else None),
        "step": lambda x, told: x.step(None if calls else some),
        "gather": lambda x, told: x.gather(some),
        "many": lambda x, told: x.gather((some * 66)[:66] if calls else range(rows)),
        "crop": lambda x, told: x.crop(each),
        "peek": lambda x, told: told.append(x.peek([3, 4], some)),
        "prefill": lambda x, told: x.prefill(prompts(1 + len(untils), parity), 2),
        "state": lambda x, told: x.finished.__setitem__(some, calls) or x.seeds.__iadd__(parity),
        "filters": lambda x, told: x.filters.update(temperature=value, top_k=parity * 5),
        "eos": lambda x, told: x.eos.symmetric_difference_update(untils),
    }[str(rng.choice(["generate"] * 8 + CHANGES))]


CHANGES = [
    "step", "gather", "many", "crop", "peek", "prefill", "state", "filters", "eos",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_as_the_host_steps(seed, graphs):
    """Whatever is done with rows."""
    rng = np.random.default_rng(seed)
    name = str(rng.choice(["llama", "qwen3", "gemma3"]))
    model, pages = precise(name) if seed % 4 else tiny_model("llama"), None
    if rng.random() < 0.3:
        pages = int(rng.integers(40, 120))
    config, eos = random_config(rng), [(), EOS, range(30)][rng.integers(3)]
    both = [started(config, model, graph=graph, pages=pages, eos_token_id=eos)
            for graph in (False, "auto")]  # fmt: skip
    for _ in range(6):
        change = random_change(rng, both[0].rows, both[0].tokens, both[0].prompt_lengths)
        ends = []
        for rollouts in both:
            try:
                ends.append([told := [], change(rollouts, told)])
            except PoolExhausted:
                ends.append(PoolExhausted)
        if PoolExhausted in ends:
            assert ends == [PoolExhausted] * 2
        else:
            torch.testing.assert_close(*ends, rtol=1e-3, atol=5e-3)
        same(*both)
        assert state(both[0]) == state(both[1])
    for rollouts in both:
        for store in rollouts.kv.stores:
            store.forest.check()
    if pages is not None:  # there may be none left
        return
    everywhere = [rollouts.peek([3, 4], range(rollouts.rows)) for rollouts in both]
    torch.testing.assert_close(*everywhere, rtol=1e-3, atol=5e-3)


def test_graphs_are_of_the_model_s_device(monkeypatch):
    """And not of the current one, which would record nothing."""
    entered, device = [], torch.device("cuda", 1)

    class Entered(contextlib.nullcontext):
        def __init__(self, *args, **options):
            super().__init__()
            self.seen = args, options

        def __enter__(self):
            entered.append(self.seen)

    graph = type("Graph", (), {"replay": lambda self: entered.append("replay")})()
    for name, fake in dict(
        graph_pool_handle=lambda: "pool", CUDAGraph=lambda: graph, device=Entered, graph=Entered,
        Stream=lambda device: device,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    decode.capturer(device)(lambda: entered.append("run"))()
    first, (args, options), *rest = entered
    assert first == ((device,), {}) and rest == ["run", "replay", "replay"]
    assert args == (graph,) and options["stream"] == device and options["pool"] == "pool"
