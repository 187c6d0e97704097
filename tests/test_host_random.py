"""Pages, tree and plan on the host against plain Python, by random operations."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_host import GARBAGE, attended, slots, state

from kvtools._host import Forest, PoolExhausted, plan_from_block_table


class Machine(RuleBasedStateMachine):
    """Each row is a list of unique values; `memory` maps a slot to the value written there."""

    def __init__(self):
        super().__init__()
        self.forest = Forest(24, 4)
        self.rows = []  # (base, sealed values, values)
        self.memory = {}
        self.written = 0

    def write(self, slots):
        values = list(range(self.written, self.written + len(slots)))
        self.written += len(slots)
        self.memory.update(zip(slots.tolist(), values, strict=True))
        return values

    def attempt(self, needed, call):
        """The result of `call`, or None where the pool has too few pages and nothing changed."""
        before = state(self.forest)
        if needed <= before[2]:
            return call()
        with pytest.raises(PoolExhausted) as caught:
            call()
        assert (caught.value.needed, caught.value.free) == (needed, before[2])
        assert state(self.forest) == before
        return None

    @precondition(lambda self: len(self.rows) < 8)
    @rule(length=st.integers(0, 13), base=st.integers(0, 9), copies=st.integers(1, 4))
    def insert(self, length, base, copies):
        call = lambda: self.forest.insert(length, base, copies)  # noqa: E731
        slots = self.attempt(-(-length // 4), call)
        if slots is not None:
            values = self.write(slots)
            self.rows += [(base, len(values), values)] * copies

    @rule(data=st.data(), seal=st.booleans())
    def append(self, data, seal):
        size = len(self.rows)
        counts = data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
        if seal:  # only what has not grown
            whole = [sealed == len(values) for _, sealed, values in self.rows]
            counts = [count * may for count, may in zip(counts, whole, strict=True)]
        version, free = self.forest.version, self.forest.free_pages
        needed = self.forest.pages_needed(counts, seal)
        slots = self.attempt(needed, lambda: self.forest.append(counts, seal))
        if slots is None:
            return
        assert self.forest.free_pages == free - needed
        assert (self.forest.version > version) == (needed > 0)
        values = self.write(slots)
        for row, (base, sealed, old) in enumerate(self.rows):
            new = old + values[: counts[row]]
            self.rows[row] = (base, len(new) if seal and counts[row] else sealed, new)
            values = values[counts[row] :]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), copy=st.booleans())
    def gather(self, data, copy):
        index = data.draw(st.lists(st.integers(0, len(self.rows) - 1), max_size=12))
        free = self.forest.free_pages
        needed = self.forest.gather_pages_needed(index) if copy else 0
        pages = self.attempt(needed, lambda: self.forest.gather(index, copy))
        if pages is None:
            return
        assert not needed or self.forest.free_pages == free - needed
        src, dst = (page.tolist() for page in pages)
        assert not set(src) & set(dst) and len(set(dst)) == len(dst)
        assert copy or not src
        for s, d in zip(src, dst, strict=True):
            for slot in range(4):
                self.memory[d * 4 + slot] = self.memory.get(s * 4 + slot)
        self.rows = [self.rows[i] for i in index]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def crop(self, data):
        lengths = [data.draw(st.integers(0, len(values))) for _, _, values in self.rows]
        free = self.forest.free_pages
        self.forest.crop(lengths)
        assert self.forest.free_pages >= free
        for row, length in enumerate(lengths):
            base, sealed, values = self.rows[row]
            self.rows[row] = (base, min(sealed, length), values[:length])

    @precondition(lambda self: self.forest.num_pages < 60)
    @rule(more=st.integers(0, 6))
    def grow(self, more):
        free = self.forest.free_pages
        self.forest.grow(self.forest.num_pages + more)
        assert self.forest.free_pages == free + more

    def check_cover(self, counts, tile=0, chunk=0):
        plan = self.forest.plan(counts, tile, chunk)
        paths = slots(self.forest)
        read = attended(plan, 4, tile, chunk)
        for token, row in enumerate(np.repeat(np.arange(len(paths)), counts)):
            base = self.rows[row][0]
            assert read.get(token, []) == [(base + i, slot) for i, slot in enumerate(paths[row])]
        return plan, paths

    @invariant()
    def rows_read_what_they_wrote(self):
        self.forest.check()
        read = [[self.memory[slot] for slot in row] for row in slots(self.forest)]
        assert read == [values for _, _, values in self.rows]
        assert self.forest.lengths().tolist() == [len(values) for values in read]
        own = [len(values) - sealed for _, sealed, values in self.rows]
        assert self.forest.own_lengths().tolist() == own
        self.check_cover([1] * len(self.rows))

    @rule(data=st.data(), tile=st.integers(0, 4), chunk=st.sampled_from([0, 4, 8, 12]))
    def plan(self, data, tile, chunk):
        size = len(self.rows)
        counts = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
        plan, paths = self.check_cover(counts, tile, chunk)
        sealed = {value for _, n, values in self.rows for value in values[:n]}
        for node, own in enumerate(plan["own"]):
            page, first = plan["page"][plan["page_indptr"][node]], plan["first"][node]
            slot = page * 4 + first
            users = sum(slot in path for path in paths)
            assert own == (users == 1 and self.memory[slot] not in sealed)
        for row, leaf in enumerate(plan["leaf"]):
            needed = self.forest.pages_needed(np.eye(size, dtype=int)[row])
            if leaf >= 0:
                used = plan["first"][leaf] + plan["length"][leaf]
                page = plan["page"][plan["page_indptr"][leaf + 1] - 1]
                assert plan["own"][leaf] and paths[row][-1] == page * 4 + (used - 1) % 4
                assert needed == (used % 4 == 0)
            elif counts[row]:
                assert needed == 1

    def teardown(self):
        self.forest.gather([])
        self.forest.check()
        assert self.forest.free_pages == self.forest.num_pages
        assert self.forest.num_nodes == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@settings(deadline=None)
@given(st.data())
def test_crop_does_not_depend_on_the_order_of_rows(data):
    def ints(size, most):
        return data.draw(st.lists(st.integers(0, most), min_size=size, max_size=size))

    counts, index, more = ints(2, 9), ints(5, 1), ints(5, 3)
    order = data.draw(st.permutations(range(5)))
    forests = [Forest(40, 4), Forest(40, 4)]
    for forest in forests:
        forest.insert(6, copies=2)
        forest.append(counts)
        forest.gather(index)
        forest.append(more)
    lengths = np.array([data.draw(st.integers(0, n)) for n in forests[0].lengths()])
    forests[0].crop(lengths)
    forests[0].gather(order)
    forests[1].gather(order)
    forests[1].crop(lengths[order])
    first, second = forests
    assert slots(first) == slots(second)
    assert (first.free_pages, first.num_nodes) == (second.free_pages, second.num_nodes)
    ones = np.ones(5, int)
    assert attended(first.plan(ones), 4) == attended(second.plan(ones), 4)
    assert first.pages_needed(ones) == second.pages_needed(ones)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(0, 4), st.sampled_from([0, 2, 6]))
def test_plan_from_block_table(data, tile, chunk):
    # Three blocks to choose from at each depth: rows share much, and no block is at two depths.
    rows = data.draw(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=7))
    tails = [data.draw(st.integers(0, 1)) if row else 0 for row in rows]
    counts = [data.draw(st.integers(0, 3)) for _ in rows]
    table = np.full((len(rows), 6), GARBAGE, np.int64)
    for r, row in enumerate(rows):
        table[r, : len(row)] = 10 * np.arange(len(row)) + row
    lengths = np.array([2 * len(row) - tail for row, tail in zip(rows, tails, strict=True)], int)
    plan = plan_from_block_table(table, lengths, 2, counts, tile, chunk)

    read = attended(plan, 2, tile, chunk)
    for token, r in enumerate(np.repeat(np.arange(len(rows)), counts)):
        at = np.arange(lengths[r])
        slot = table[r, at // 2] * 2 + at % 2
        assert read.get(token, []) == list(zip(at.tolist(), slot.tolist(), strict=True))

    live = [r for r, count in enumerate(counts) if count]
    full = {tuple(rows[r][: i + 1]) for r in live for i in range(lengths[r] // 2)}
    assert plan["length"].sum() == 2 * len(full) + sum(tails[r] for r in live)
    for r, leaf in enumerate(plan["leaf"]):
        shared = not tails[r] and any(
            rows[other][: len(rows[r])] == rows[r] and lengths[other] >= lengths[r]
            for other in range(len(rows))
            if other != r
        )
        assert (leaf >= 0) == (counts[r] > 0 and lengths[r] > 0 and not shared)
        if leaf >= 0:
            assert plan["own"][leaf]
            assert plan["base"][leaf] + plan["length"][leaf] == lengths[r]
