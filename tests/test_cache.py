"""The cache: what rows hold and attend to, who is evicted, what it costs, what is refused."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from interrupts import Exhausted
from twin import Twin

import kvtools
from kvtools import CacheConfig, _host
from kvtools.config import BITS
from kvtools.policy import POLICIES

OPTIONS = [{}, {"softcap": 2.0, "sliding": 7}, {"sink_h": torch.linspace(-1, 1, 4)}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "sliding", "sink_h"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_exact_rows_attend_to_all_they_have_seen(page_size, options):
    twin = Twin(CacheConfig(page_size=page_size), layers=2, **options)
    for length, copies in ((1, 2), (19, 3), (16, 1)):
        twin.add(length, copies)
    twin.seeds = [1, 2, 1, 2, 3, 4]
    twin.check_step()
    twin.check_step([0, 3, 1, 18, 0, 2])
    twin.gather([4, 1, 1, 5, 0], seeds=[1, 2, 3, 4, 5])
    twin.check_step([2, 1, 0, 1, 5])
    twin.crop([11, 2, 3, 16, len(twin.rows[4])])  # into the prompt, into a shared run, not at all
    twin.check_step([1, 2, 20, 0, 1])
    twin.add(5, 2)
    twin.check_step()
    assert [twin.cache.kept(1, r)[0] for r in range(7)] == [list(range(len(r))) for r in twin.rows]
    twin.gather([])
    store = twin.cache.stores[0]
    assert store.forest.free_pages == store.forest.num_pages


@dataclass(eq=False)
class Token:
    position: int
    k: np.ndarray
    v: np.ndarray
    received: dict[int, float] = field(default_factory=dict)  # by step, mean over the group
    low: set[int] = field(default_factory=set)  # steps at which it was below the mean

    def mass(self, since=0):
        return sum(p for step, p in self.received.items() if step >= since)


class Literal:
    """Eviction as design.md section 5 tells it, for one row of one layer: lists and loops.

    `worth(literal, head, i, now)` of own token i orders the victims, lowest first.
    """

    def __init__(self, config, k_shd, v_shd, worth):
        self.config, self.worth, self.group = config, worth, config.group
        self.sinks = min(config.sinks, len(k_shd))
        heads = k_shd.shape[1]
        self.prompt = [
            [Token(p, k_shd[p, h], v_shd[p, h]) for p in range(len(k_shd))] for h in range(heads)
        ]
        self.own = [[] for _ in range(heads)]
        self.victims = [[] for _ in range(heads)]
        self.selected = 0  # when victims were last chosen

    def step(self, now, q_hgd, k_hd, v_hd):
        config = self.config
        if len(self.own[0]) == config.budget and not self.victims[0]:
            drop = max(1, config.budget // 8) if config.drop is None else config.drop
            for h, own in enumerate(self.own):
                open_ = [i for i, token in enumerate(own) if token.position < now - config.recent]
                rank = {i: (*self.worth(self, h, i, now), own[i].position) for i in open_}
                self.victims[h] = [own[i] for i in sorted(open_, key=rank.get)[:drop]]
            self.selected = now
        for h, own in enumerate(self.own):
            if len(own) == config.budget:
                own.remove(self.victims[h].pop(0))
            own.append(Token(now, k_hd[h], v_hd[h]))
        return np.concatenate([self.attend(h, now, q_gd) for h, q_gd in enumerate(q_hgd)])

    def attend(self, h, now, q_gd):
        seen = self.prompt[h] + self.own[h]
        x = q_gd @ np.stack([token.k for token in seen]).T * q_gd.shape[1] ** -0.5
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = p[:, self.sinks :].sum(1) / (len(seen) - self.sinks)
        for token, p_g in zip(seen, p.T, strict=True):
            token.received[now] = p_g.mean()
            if (p_g < mean).all() if self.group == "all" else p_g.mean() < mean.mean():
                token.low.add(now)
        return p @ np.stack([token.v for token in seen])

    def kept(self):
        return [
            sorted(token.position for token in prompt + own)
            for prompt, own in zip(self.prompt, self.own, strict=True)
        ]


def lows(literal, h, i, now):
    return sum(now - age in literal.own[h][i].low for age in range(1, literal.config.window + 1))


def idle(literal, h, i, now):
    ages = range(1, literal.config.window + 1)
    return next((n - 1 for n in ages if now - n not in literal.own[h][i].low), len(ages))


WORTH: dict[str, Callable] = {
    "scissorhands": lambda x, h, i, now: (-lows(x, h, i, now), x.own[h][i].mass()),
    "h2o": lambda x, h, i, now: (x.own[h][i].mass(),),
    "snapkv": lambda x, h, i, now: (x.own[h][i].mass(since=x.selected),),
    "tova": lambda x, h, i, now: (np.mean([own[i].mass(since=now - 1) for own in x.own]),),
    "streaming": lambda x, h, i, now: (),
    "lru": lambda x, h, i, now: (-idle(x, h, i, now),),
}


class Replay(Twin):
    """A Twin whose rows are each followed by a Literal."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.literals = []

    def add(self, length, copies=1, seed=0):
        super().add(length, copies, seed)
        _, k, v = self.qkv(0, -1)
        worth = WORTH[self.cache.config.policy]
        self.literals += [
            Literal(self.cache.config, k.numpy(), v.numpy(), worth) for _ in range(copies)
        ]

    def gather(self, index, seeds=None):
        super().gather(index, seeds)
        self.literals = [copy.deepcopy(self.literals[i]) for i in index]

    def check_step(self, counts=None):
        starts = [len(row) for row in self.rows]
        (out,) = self.step(counts)
        expected = []
        for row, (literal, start) in enumerate(zip(self.literals, starts, strict=True)):
            q, k, v = (x.numpy() for x in self.qkv(0, row, start))
            q = q.reshape(len(q), self.heads, self.group, self.d)
            for i in range(len(q)):
                expected.append(literal.step(start + i, q[i], k[i], v[i]))
            assert self.cache.kept(0, row) == literal.kept(), f"row {row} at {start}"
        torch.testing.assert_close(out, torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-12)


# budget, window, recent, drop: w > m and w < m, w = 1, m = 1, m = B - r, w across and on words
SIZES = [(12, 8, 3, 4), (12, 3, 2, 10), (10, 1, 1, 3), (9, 5, 2, 1), (16, 40, 4, 6), (11, 32, 1, 2),
         (20, 33, 4, 16), (7, 64, 3, None)]  # fmt: skip


@pytest.mark.long_if(when=lambda B, group: (B % 2 == 0) == (group == "all"))
@pytest.mark.parametrize("group", ["all", "mean"])
@pytest.mark.parametrize("B,w,r,m", SIZES)
def test_scissorhands_is_the_literal_algorithm(B, w, r, m, group):
    config = CacheConfig(
        budget=B, window=w, recent=r, drop=m, group=group, sinks=w % 3, page_size=1 + w % 5
    )
    twin = Replay(config, group=2 + B % 2)
    twin.add(9)
    for _ in range(150):
        twin.check_step()


@pytest.mark.parametrize("policy", WORTH)
def test_rows_evict_on_their_own(policy):
    """Rows of different ages, steps of several tokens, forks and prompts once evictions began."""
    config = CacheConfig(policy=policy, budget=12, window=9, recent=3, drop=5, sinks=3, page_size=4)
    twin = Replay(config)
    rng = np.random.default_rng(0)
    twin.add(7)
    twin.add(2, seed=1)  # shorter than the sinks
    for n in range(40):
        twin.check_step([1, int(n > 17 and n % 3 > 0)])
    twin.gather([1, 0, 1, 0, 0], seeds=[1, 2, 3, 4, 5])
    for _ in range(40):
        twin.check_step([1, *rng.integers(0, 4, 4)])
    twin.add(5, 2, seed=2)
    twin.gather([6, 3, 5, 0])
    for _ in range(40):
        twin.check_step(rng.integers(0, 3, 4) + [0, 0, 1, 0])
    assert len(set(map(str, (twin.cache.kept(0, r) for r in range(4))))) == 4


def odd_first(candidates):
    return -(candidates.position_nhs % 2)


def name_of(policy):
    return getattr(policy, "__name__", policy)


def small(policy="scissorhands", **options):
    sizes = dict(prompt_budget=24, budget=14, window=12, recent=4, sinks=2, drop=4, page_size=4)
    return CacheConfig(policy=policy, **(sizes | options))


@pytest.mark.parametrize("policy", [*POLICIES, odd_first], ids=name_of)
def test_no_policy_exceeds_the_budget_or_touches_what_is_protected(policy):
    twin = Twin(small(policy), group=3)
    twin.add(40, 2)
    twin.seeds = [1, 2]
    prompt = twin.cache.kept(0, 0)
    for n in range(1, 201):
        (twin.check_step if n % 5 == 0 else twin.step)()  # what is kept is what is attended to
        for row in range(2):
            for h, kept in enumerate(twin.cache.kept(0, row)):
                assert kept[:24] == prompt[h] and len(set(kept)) == 24 + min(n, 14)
                assert kept[:2] == [0, 1]
                assert kept[-min(n, 4) :] == list(range(40 + n))[-min(n, 4) :]
                if policy == "streaming":
                    assert kept[24:] == list(range(40 + max(n - 14, 0), 40 + n))
    if policy != "streaming":
        assert twin.cache.kept(0, 0)[0][24] < 226  # something old survives


@pytest.mark.parametrize("options", OPTIONS[1:], ids=["sliding", "sink_h"])
def test_rows_that_evict_attend_as_the_model_does(options):
    twin = Twin(small(), layers=2, **options)
    twin.add(40, 2)
    for _ in range(30):
        twin.check_step()


@pytest.mark.parametrize("policy", [*POLICIES, odd_first], ids=name_of)
def test_a_row_evicts_the_same_in_any_batch(policy):
    def run(seeds, counts):
        twin = Twin(small(policy))
        twin.add(33, len(seeds))
        twin.seeds = list(seeds)
        for n in range(60):
            twin.step([count if n % 3 or count == 1 else 0 for count in counts])
        return {seed: twin.cache.kept(0, row) for row, seed in enumerate(seeds)}

    together = run((1, 2, 3), (1, 0, 2))
    assert run((1,), (1,))[1] == together[1]
    assert run((3, 1), (2, 1))[3] == together[3]


def test_a_callable_sees_the_candidates_and_is_obeyed():
    calls = []

    def worth(candidates):
        calls.append(candidates)
        return odd_first(candidates)

    twin = Twin(small(worth, drop=1), layers=2)
    twin.add(40, 2)
    assert [(c.layer, c.prompt, c.now_n.tolist()) for c in calls] == [
        (0, True, [40]),
        (1, True, [40]),
    ]
    for kept in twin.cache.kept(0, 0):  # 16 of 17 odd ones between sinks and recent go
        assert [p for p in kept if p % 2] == [1, 35, 37, 39]
    calls.clear()
    for n in range(60):
        before = twin.cache.kept(1, 0)
        twin.step()
        now = 40 + n
        for old, new in zip(before, twin.cache.kept(1, 0), strict=True):
            open_ = [p for p in old[24:] if p < now - 4]
            gone = set(old) - set(new)
            assert n < 14 and not gone or gone == {next((p for p in open_ if p % 2), min(open_))}
    last = calls[-1]
    assert (last.layer, last.prompt, last.now_n.tolist()) == (1, False, [now, now])
    for x in (last.position_nhs, last.mass_nhs, last.low_nhs, last.idle_nhs):
        assert x.shape == (2, 2, 14)
    assert (last.mass_nhs > 0).all() and (last.idle_nhs <= last.low_nhs).all()
    assert last.low_nhs.max() <= 12


@pytest.mark.parametrize("policy", [*POLICIES, odd_first], ids=name_of)
@pytest.mark.parametrize("budget,kept", [(30, 30), (0.25, 50), (1.0, 200), (300, 200)])
def test_a_prompt_is_compressed_to_its_budget(budget, kept, policy):
    twin = Twin(CacheConfig(policy=policy, prompt_budget=budget, recent=4, sinks=2), layers=2)
    twin.add(200, 2)
    edge = max(4, kept // 10)
    for layer in range(2):
        for positions in twin.cache.kept(layer, 1):
            assert len(positions) == len(set(positions)) == kept
            assert positions[: kept // 10] == list(range(kept // 10))  # more than the sinks
            assert positions[-edge:] == list(range(200 - edge, 200))
    twin.check_step([2, 1])


def test_scissorhands_compresses_a_prompt_by_its_last_queries():
    twin = Twin(CacheConfig(prompt_budget=21, window=9, recent=3, sinks=2))
    twin.add(60)
    q, k, _ = (x.transpose(0, 1)[None] for x in twin.qkv(0, 0))
    mass, _ = kvtools.key_scores(q[:, :, -9:], k, sinks=2)
    for h, kept in enumerate(twin.cache.kept(0, 0)):
        near = [max(mass[0, h, max(p - 6, 2) : p + 7].tolist()) for p in range(60)]
        rank = sorted(range(2, 57), key=near.__getitem__)
        assert kept == sorted({*range(60)} - {*rank[:39]})


def test_a_prompt_budget_of_all_of_it_evicts_nothing_in_any_layer():
    twin = Twin(CacheConfig(prompt_budget=1.0, layer_budget="later"), layers=2)
    twin.add(60)
    twin.check_step()
    assert [len(twin.cache.kept(layer, 0)[0]) for layer in range(2)] == [61, 61]


def test_layers_have_budgets_of_their_own():
    def run(layer_budget, prompt_budget=40):
        config = small(prompt_budget=prompt_budget, layer_budget=layer_budget, budget=20)
        twin = Twin(config, layers=4)
        twin.add(100, 2)
        prompts = [len(twin.cache.kept(layer, 0)[0]) for layer in range(4)]
        for _ in range(40):
            twin.step()
        twin.check_step()
        own = [len(twin.cache.kept(layer, 0)[0]) for layer in range(4)]
        return prompts, [b - a for a, b in zip(prompts, own, strict=True)], twin.cache.memory()

    prompts, own, _ = run("later")
    assert (prompts, own) == ([20, 33, 47, 60], [10, 17, 23, 30])
    prompts, own, large = run([1, 2, 0.1, 0.5])  # sinks + recent + 1 at the least
    assert (prompts, own) == ([40, 80, 7, 20], [20, 40, 7, 10])
    assert run("uniform", 0.3)[0] == [30] * 4
    small_ = run([0.5, 1, 0.1, 0.25])[2]
    pages = [[-(-(n - 2) // 4) for n in each] for each in ((40, 80, 7, 20), (20, 40, 7, 10))]
    sinks = 4 * 2 * 2 * 2 * 8 * 8  # layers, K and V, tokens, heads, D, bytes
    for memory, each in zip((large, small_), pages, strict=True):
        assert memory["prefix"] == sum(each) * 4 * 2 * 2 * 8 * 8 + sinks


@pytest.mark.parametrize("config", [CacheConfig(page_size=3), small("streaming"), small("random"),
                                    small("lru", window=1)], ids=lambda c: c.policy)  # fmt: skip
def test_crop_before_eviction_undoes_what_was_appended(config):
    straight, detour = Twin(config), Twin(config)
    for twin in (straight, detour):
        twin.add(30, 3)
        twin.step([5, 1, 9])
    detour.seeds = [1, 2, 3]
    detour.step([4, 7, 2])
    detour.crop([33, 31, 39])
    straight.crop([33, 31, 39])
    detour.seeds = [0, 0, 0]
    for _ in range(30):
        for one, other in zip(straight.step(), detour.step(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert [straight.cache.kept(0, r) for r in range(3)] == [
        detour.cache.kept(0, r) for r in range(3)
    ]


@pytest.mark.parametrize("policy", [*POLICIES, odd_first], ids=name_of)
def test_crop_after_eviction_leaves_slots_that_are_used_first(policy):
    twin = Twin(small(policy), layers=2)
    twin.add(30, 3)
    for _ in range(25):
        twin.step()
    twin.gather([0, 1, 2, 1], seeds=[1, 2, 3, 4])
    before = [[twin.cache.kept(layer, row) for layer in range(2)] for row in range(4)]
    twin.crop([49, 55, 52, 30])
    for row, (was, length) in enumerate(zip(before, (49, 55, 52, 30), strict=True)):
        for layer in range(2):
            now = twin.cache.kept(layer, row)
            assert now == [[p for p in head if p < length] for head in was[layer]]
    for _ in range(40):
        old = [twin.cache.kept(0, row) for row in range(4)]
        twin.check_step()
        for row in range(4):
            for one, other in zip(old[row], twin.cache.kept(0, row), strict=True):
                kept = {*one, len(twin.rows[row]) - 1}
                assert len(other) == min(len(kept), 38) and kept.issuperset(other)


def test_crop_into_the_prompt_after_eviction():
    twin = Twin(small("streaming", prompt_budget=None))
    twin.add(30, 2)
    for _ in range(20):
        twin.step()
    twin.seeds = [1, 2]
    twin.crop([12, 30])
    assert twin.cache.kept(0, 0) == [list(range(12))] * 2
    for _ in range(20):
        twin.check_step()


def quantised(k_bits, v_bits, **options):
    config = CacheConfig(k_bits=k_bits, v_bits=v_bits, **options)
    twin = Twin(config, d=16, layers=2)
    twin.add(40, 3)
    twin.seeds = [1, 2, 3]
    return twin


@pytest.mark.pairwise
@pytest.mark.parametrize("k_bits", list(BITS))
@pytest.mark.parametrize("v_bits", [16, 8, 3])
@pytest.mark.parametrize("recent_bits", [None, 16, 8])
def test_quantised_rows_attend_to_what_was_stored(k_bits, v_bits, recent_bits):
    twin = quantised(k_bits, v_bits, recent=5, recent_bits=recent_bits)
    twin.check_step([3, 0, 1])
    twin.check_step([8, 1, 2])
    twin.gather([2, 2, 0], seeds=[1, 2, 3])
    twin.check_step([0, 2, 1])
    twin.crop([40, 20, 42])
    twin.check_step([1, 1, 1])


@pytest.mark.parametrize("k_bits,v_bits,recent_bits", [(4, 4, 8), (3, 6, 16), (4, 16, 8)])
@pytest.mark.parametrize("options", [{}, {"sliding": 3}, {"sliding": 9, "softcap": 4.0}], ids=str)
def test_what_is_read_does_not_depend_on_how_many_tokens_come(k_bits, v_bits, recent_bits, options):
    config = CacheConfig(k_bits=k_bits, v_bits=v_bits, recent=5, recent_bits=recent_bits)
    outs = []
    for calls in (
        [[14, 0, 3]],
        [[1, 0, 1]] * 3 + [[1, 0, 0]] * 11,
        [[2, 0, 3], [7, 0, 0], [5, 0, 0]],
    ):
        twin = Twin(config, d=16, layers=2, **options)
        twin.add(7, 3)
        twin.seeds = [1, 2, 3]
        rows = {}
        for counts in calls:
            start = 0
            for row, (count, out) in enumerate(zip(counts, [twin.step(counts)] * 3, strict=True)):
                rows.setdefault(row, []).append(torch.stack(out)[:, start : start + count])
                start += count
        outs.append(torch.cat([torch.cat(x, 1) for _, x in sorted(rows.items())], 1))
    for other in outs[1:]:
        torch.testing.assert_close(outs[0], other, rtol=1e-9, atol=1e-9)


def test_more_bits_err_less():
    errors = {}
    for bits in (16, 8, 6, 4, 3, 2):
        twin = quantised(bits, bits)
        outs = torch.cat([twin.step([9, 1, 4])[0] for _ in range(3)])
        exact = quantised(16, 16)
        errors[bits] = (outs - torch.cat([exact.step([9, 1, 4])[0] for _ in range(3)])).norm()
    assert errors[16] == 0
    assert list(errors.values()) == sorted(errors.values())
    assert errors[2] < torch.cat([outs]).norm()


@pytest.mark.parametrize("bits", list(BITS))
def test_forked_rows_hold_the_same_codes(bits):
    twin = quantised(bits, bits, budget=14, recent=4, sinks=2, page_size=4)
    for _ in range(20):
        twin.step()
    store = twin.cache.stores[0]

    def content(row):
        slots = torch.from_numpy(store.forest.row_slots(row)).long()
        where = (slots // 4, slice(None), slots % 4)
        tensors = (x for x in store.layers[1].tensors() if x is not None)
        return [x[where].contiguous().view(torch.uint8) for x in tensors]

    before = [content(row) for row in range(3)]
    index = [2, 0, 2, 2]
    twin.gather(index)
    slots = [set(store.forest.row_slots(row)[-14:].tolist()) for row in range(4)]
    assert len(set.union(*slots)) == 4 * 14  # nobody's evictions touch another
    for row, source in enumerate(index):
        assert all(map(torch.equal, content(row), before[source]))


def undone(kind, cache, rng, twin):
    """A change of `cache`, and attention in some of its layers, taken back."""
    rows, layers = cache.rows, rng.integers(1, twin.layers + 1)
    with cache.transaction() as change:
        match kind:
            case "extend" | "twice" | "step":
                for _ in range(2 if kind == "twice" else 1):  # what is written is written again
                    counts = [1] * rows if kind == "step" else rng.integers(4, size=rows)
                    total = len(cache.extend(counts))
                    shape = (total, twin.heads * (twin.group + 2), twin.d)
                    for layer in range(layers if total else 0):
                        x = torch.from_numpy(rng.normal(size=shape))
                        split = x.split([twin.heads * twin.group, twin.heads, twin.heads], 1)
                        cache.attend(layer, *split, **twin.options)
            case "gather":  # as many rows as there are: pages for copies come from rows that go
                cache.gather(rng.integers(rows, size=rows))
            case "crop":
                least = [length for _, length in twin.prompts]
                cache.crop(rng.integers(least, cache.lengths.numpy() + 1))
            case "add":
                cache.add_prompt(5, 1)
                for layer in range(layers):
                    x = torch.from_numpy(rng.normal(size=(twin.heads, 5, twin.d)))
                    q = x.repeat_interleave(twin.group, 0)
                    cache.fill(layer, q, x, x, **twin.options)
        change.undo()


@pytest.mark.parametrize("pages,options", [
    (None, dict(bits=4, recent=5, page_size=3)),
    (None, dict(bits=4, recent=4, budget=12, sinks=2, window=5, drop=3, page_size=4)),
    (18, dict(bits=4, recent=4, budget=12, sinks=2, window=5, drop=3, page_size=4)),
    (18, dict(policy="snapkv", recent=4, budget=12, prompt_budget=12, sinks=2, page_size=4)),
    (26, dict(policy="tova", recent=4, budget=12, sinks=2, page_size=4, layer_budget="later")),
])  # fmt: skip
def test_what_is_undone_leaves_nothing_behind(pages, options):
    """A cache in which other changes were made and undone all along gives the same bits."""
    rng, config = np.random.default_rng(5), CacheConfig(**options)
    twins = [Twin(config, layers=2, dtype=torch.float32, pages=pages) for _ in (0, 1)]
    for twin in twins:
        twin.add(9, 2)
        twin.add(14, 2, seed=1)
        twin.seeds = [2, 3, 4, 5]
    for turn in range(24):
        for kind in (rng.choice(["extend", "twice", "gather", "add"]), "crop", "step"):
            try:
                undone(kind, twins[0].cache, rng, twins[0])
            except _host.PoolExhausted:
                assert pages
            kept = [[twin.cache.kept(1, row) for row in range(4)] for twin in twins]
            assert kept[0] == kept[1]
        for twin in twins:
            if turn % 8 == 7:
                twin.gather([1, 2, 3, 1], seeds=[2, 3, 4, 5])
            elif turn % 3 == 2:
                twin.crop([len(row) - 1 for row in twin.rows])
        outs = [torch.stack(twin.step()) for twin in twins]
        assert torch.equal(*outs)
    for store in twins[0].cache.stores:
        store.forest.check()


def test_a_change_that_fails_midway_changes_nothing():
    """Memory ends at each operation of each change in turn."""
    config = CacheConfig(bits=4, recent=4, budget=12, sinks=2, window=5, drop=3, page_size=4)
    twins = [Twin(config, layers=2, dtype=torch.float32) for _ in (0, 1)]

    def extend(twin):
        with twin.cache.transaction() as change:
            twin.cache.extend([1, 0, 2, 1])
            change.undo()

    for twin in twins:
        twin.add(9, 2)
        twin.add(14, 2, seed=1)
        for _ in range(14):
            twin.step()
    for change in (
        extend,
        lambda twin: twin.gather([3, 0, 0, 2], seeds=[2, 3, 4, 5]),
        lambda twin: twin.crop([len(row) - 2 for row in twin.rows]),
    ):
        for at in range(1, 100):
            try:
                with Exhausted(at):
                    change(twins[0])
                break
            except MemoryError:
                assert torch.equal(twins[0].cache.lengths, twins[1].cache.lengths)
        assert 1 < at < 99
        change(twins[1])
        for _ in range(3):
            assert torch.equal(*(torch.stack(twin.step()) for twin in twins))


def held(x, seen):
    """Bytes of all tensors reachable from an object, each once: addresses go to `seen`."""
    if isinstance(x, torch.Tensor):
        storage, before = x.untyped_storage(), len(seen)
        seen.update(range(storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return len(seen) - before
    children = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return sum(held(child, seen) for child in [*children, *getattr(x, "__dict__", {}).values()])


def test_memory_is_the_prompts_and_the_suffixes():
    total = {}
    for bits, recent_bits in ((16, None), (4, None), (4, 8)):
        config = CacheConfig(bits=bits, recent_bits=recent_bits)
        twin = Twin(config, layers=2, heads=3, group=1, d=64, dtype=torch.bfloat16,
                    longest=2200)  # fmt: skip
        twin.add(2000, 64)
        twin.cache.extend([128] * 64)
        memory = twin.cache.memory()
        assert memory["total"] == sum(memory[x] for x in ("prefix", "suffix", "metadata"))
        assert memory["total"] == held(
            [twin.cache.stores, twin.cache._sinks, twin.cache._recent, twin.cache._frame], set()
        )
        total[bits, recent_bits] = memory["total"]
        if bits == 16:
            token = 2 * 2 * 3 * 64 * 2  # layers, K and V, heads, D, bytes
            assert (memory["prefix"], memory["suffix"]) == (2000 * token, 64 * 128 * token)
            assert memory["metadata"] < 0.015 * memory["total"]  # 8,192 query tokens in the plan
    assert total[4, None] <= 0.285 * total[16, None]
    copies = 64 * 16 * 2 * 2 * 3 * (64 + 2)  # rows, slots, layers, K and V, heads, bytes
    plan = 8192 * 48  # bytes of where the new tokens go and who reads them
    assert 0 <= total[4, 8] - total[4, None] - copies <= 64 * 16 * 4 + 64 * 1024 + plan


@pytest.mark.parametrize("options", [{"budget": 14}, {"prompt_budget": 30, "policy": "h2o"}, {}],
                         ids=str)  # fmt: skip
def test_memory_counts_every_tensor(options):
    twin = Twin(CacheConfig(bits=4, recent=4, sinks=2, layer_budget="later", **options), layers=3)
    twin.add(40, 2)
    for step in range(21):
        if step in (0, 20):
            names = ("stores", "_sinks", "_recent", "_frame", "_filling")
            caches = [getattr(twin.cache, name) for name in names]
            assert twin.cache.memory()["total"] == held(caches, set())
        twin.step()


@pytest.mark.parametrize("options,message", [
    ({"bits": 5}, "bits=5 does not exist; expected one of 16, 8, 6, 4, 3, 2 or 'fp8'"),
    ({"recent_bits": 4}, "recent_bits=4 does not exist"),
    ({"k_bits": "int4"}, "k_bits='int4' does not exist"),
    ({"v_bits": 1}, "v_bits=1 does not exist"),
    ({"window": 0}, "window=0 must be an integer of at least 1"),
    ({"recent": 2.5}, "recent=2.5 must be an integer"),
    ({"sinks": -1}, "sinks=-1 must be an integer of at least 0"),
    ({"page_size": True}, "page_size=True must be an integer"),
    ({"policy": "fifo"}, "policy='fifo' does not exist; expected one of scissorhands, h2o"),
    ({"group": "any"}, "group='any': expected 'all' or 'mean'"),
    ({"budget": 20}, r"budget=20 must be an integer above sinks \+ recent = 20: raise budget"),
    ({"budget": 0.5}, "budget=0.5 must be an integer above"),
    ({"prompt_budget": 20}, "prompt_budget=20 must be above .* raise prompt_budget or lower"),
    ({"prompt_budget": 1.5}, r"prompt_budget=1.5 must be an integer, or a fraction in \(0, 1\]"),
    ({"prompt_budget": 0.0}, "prompt_budget=0.0 must be an integer, or a fraction"),
    ({"drop": 4}, "drop=4 needs a budget: set budget too"),
    ({"drop": 15, "budget": 30}, "drop=15 must be an integer from 1 to budget - recent = 14"),
    ({"drop": 0, "budget": 30}, "drop=0 must be an integer from 1"),
    ({"layer_budget": "sooner"}, "layer_budget='sooner': expected 'uniform', 'later' or one"),
])  # fmt: skip
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**options)


def test_numbers_of_numpy():
    config = CacheConfig(bits=np.int64(4), budget=np.int32(64), prompt_budget=np.uint8(128))
    assert config == CacheConfig(bits=4, budget=64, prompt_budget=128)
    assert {type(getattr(config, name)) for name in ("bits", "budget", "prompt_budget")} == {int}


def test_bad_layer_budget():
    for factors in ([1, 2], [1, 1, 0]):
        with pytest.raises(ValueError, match="layer_budget has . factors; the model needs 3 pos"):
            kvtools.KVCache(CacheConfig(layer_budget=factors), 3)


def aged(config, **options):
    twin = Twin(config, layers=2, **options)
    twin.add(40, 2)
    for _ in range(20):
        twin.step()
    return twin


def state(cache):
    stores = [store for store in [*cache.stores, cache._sinks] if store]
    return (cache.rows, cache.lengths.tolist(), len(cache._prompts),
            [(s.forest.free_pages, s.forest.num_pages, s.forest.num_nodes) for s in stores],
            [[cache.kept(0, row) for row in range(cache.rows)]])  # fmt: skip


BAD_CALLS = [
    (lambda c: c.add_prompt(0), ValueError, "length=0: a prompt needs at least one token"),
    (lambda c: c.add_prompt(3, 0), ValueError, "copies=0: a prompt needs at least one row"),
    (lambda c: c.extend([1, -1]), ValueError, "counts must not be negative, got -1"),
    (lambda c: c.extend([1]), ValueError, "counts has 1 entries; there are 2 rows"),
    (lambda c: c.extend([1.0, 2.0]), ValueError, "counts must be a list of integers"),
    (lambda c: c.extend(torch.ones(1, 2).int()), ValueError, "counts must be a list of integers"),
    (lambda c: c.gather([0, 2]), IndexError, "index holds 2; there are rows 0 to 1"),
    (lambda c: c.gather([-1]), IndexError, "index holds -1; there are rows 0 to 1"),
    (lambda c: c.gather([True]), ValueError, "index must be a list of integers"),
    (lambda c: c.crop([40, 99]), ValueError, r"lengths\[1\]=99 is out of range"),
    (lambda c: c.crop([0, 40]), ValueError, r"lengths\[0\]=0 is out of range: this row can be"),
    (lambda c: c.crop([40]), ValueError, "lengths has 1 entries; there are 2 rows"),
]


@pytest.mark.parametrize("config", [CacheConfig(page_size=4), small(prompt_budget=None),
                                    small(bits=4, prompt_budget=1.0, layer_budget="later")],
                         ids=["exact", "budget", "int4"])  # fmt: skip
def test_a_refused_call_changes_nothing(config):
    twin, untouched = aged(config), aged(config)
    for call, error, message in BAD_CALLS:
        before = state(twin.cache)
        with pytest.raises(error, match=message):
            call(twin.cache)
        assert state(twin.cache) == before
    assert all(map(torch.equal, twin.step(), untouched.step()))


@pytest.mark.parametrize("config,call", [
    (CacheConfig(page_size=4), lambda c: c.add_prompt(200)),
    (CacheConfig(page_size=4), lambda c: c.extend([0, 200])),
    (small(prompt_budget=None), lambda c: c.add_prompt(200)),
    (small(), lambda c: c.gather([0, 1] * 20)),
    (small(layer_budget=[0.5, 1]), lambda c: c.gather([0] * 9)),  # one of the pools would do
])  # fmt: skip
def test_an_exhausted_pool_changes_nothing(config, call):
    twin, untouched = aged(config, pages=32), aged(config)
    before = state(twin.cache)
    with pytest.raises(_host.PoolExhausted, match="pages are needed, .* of 32 are free; give the"):
        call(twin.cache)
    assert state(twin.cache) == before
    assert all(map(torch.equal, twin.step(), untouched.step()))


def test_crop_into_a_compressed_prompt_is_refused():
    twin = Twin(small())
    twin.add(40)
    twin.step()
    with pytest.raises(ValueError, match=r"lengths\[0\]=39 .* can be cropped to 40..41 tokens"):
        twin.cache.crop([39])
    twin.check_step()


def test_a_refused_fill_can_be_repeated_or_dropped():
    twin = Twin(CacheConfig(bits=4), layers=2)
    twin.add(20, 2)
    twin.step()
    before = state(twin.cache)
    q, k, v = (x.transpose(0, 1) for x in twin.qkv(0, 0, 0, 20))
    twin.cache.add_prompt(20)
    with pytest.raises(ValueError, match="k_hld has 19 tokens, the prompt was announced with 20"):
        twin.cache.fill(0, q, k[:, :19], v[:, :19])
    with pytest.raises(ValueError, match="v_thd has shape"):
        twin.cache.fill(0, q, k, v[:, :, :4])
    twin.cache.fill(0, q, k, v)  # a second layer never comes
    twin.cache.gather([0, 1])
    assert state(twin.cache)[:3] == before[:3] and state(twin.cache)[4:] == before[4:]
    twin.check_step()


def test_head_size_must_suit_the_format():
    cache = kvtools.KVCache(CacheConfig(k_bits=4), 1)
    cache.add_prompt(5)
    q = k = torch.zeros(2, 5, 12)
    with pytest.raises(ValueError, match="head size 12 is not supported by format='int4'"):
        cache.fill(0, q, k, k)


def test_a_fraction_keeps_more_than_the_protected_tokens():
    twin = Twin(CacheConfig(prompt_budget=0.3))
    for length in (20, 60, 200):
        twin.add(length)
    assert [len(twin.cache.kept(0, row)[0]) for row in range(3)] == [20, 21, 60]
    twin.check_step()


def test_what_a_policy_sees_of_prompts():
    """Keys and values of all tokens, of which of several that were added together; and without
    protection the worth alone decides."""
    seen = []

    def longest(c):
        if not c.prompt:
            assert c.k_nhld is None and c.v_nhld is None
            return c.mass_nhs
        seen.append(c)
        return c.k_nhld[:, :, -c.position_nhs.shape[2] :].norm(dim=-1)

    for protect in (True, False):
        policy = kvtools.policy.Policy(longest, mass="life", protect=protect)
        config = CacheConfig(policy=policy, prompt_budget=12, budget=12, sinks=2, recent=4)
        cache = kvtools.cache.KVCache(config, layers=1)
        rng = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(h, 60, 8, generator=rng) for h in (4, 2, 2))
        cache.add_prompt([25, 7, 28], [1, 1, 1])
        cache.fill(0, q, k, v)
        assert [x.part for x in seen] == [0, 2]  # the second is short enough to be kept whole
        for x, span, row in zip(seen, (slice(0, 25), slice(32, 60)), (0, 2), strict=True):
            assert torch.equal(x.k_nhld[0], k[:, span]) and torch.equal(x.v_nhld[0], v[:, span])
            worth = k[:, span].norm(dim=-1)
            worth[:, :2] = torch.inf
            if protect:
                worth[:, -4:] = torch.inf
            assert cache.kept(0, row) == worth.topk(12).indices.sort().values.tolist()
        seen.clear()
