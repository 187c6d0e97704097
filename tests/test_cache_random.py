"""The cache against plain Python, by random operations."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twin import Twin

from kvtools import CacheConfig

MOST = 6  # rows


class Machine(RuleBasedStateMachine):
    """Each row of a Twin is the list of tokens it has seen; every token's attention is checked."""

    config: CacheConfig

    def __init__(self):
        super().__init__()
        self.twin = Twin(self.config)

    @property
    def rows(self):
        return len(self.twin.rows)

    def lists(self, least, most):
        return st.lists(st.integers(least, most), min_size=self.rows, max_size=self.rows)

    @precondition(lambda self: self.rows < MOST)
    @rule(length=st.integers(1, 20), copies=st.integers(1, 3), seed=st.integers(0, 5))
    def add_prompt(self, length, copies, seed):
        self.twin.add(length, copies, seed)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def append(self, data):
        self.twin.seeds = data.draw(self.lists(0, 5))
        self.twin.check_step(data.draw(self.lists(0, 5)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def append_to_prompts(self, data):
        """More of the prompt, where a row has nothing else yet."""
        cache = self.twin.cache
        whole = cache.lengths.numpy() == cache.prompt_lengths
        counts = [n * int(may) for n, may in zip(data.draw(self.lists(0, 9)), whole, strict=True)]
        self.twin.check_step(counts, prompt=True)
        assert (cache.prompt_lengths == cache.lengths.numpy())[whole].all()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def gather(self, data):
        """Fork, permute or drop."""
        self.twin.gather(data.draw(st.lists(st.integers(0, self.rows - 1), max_size=MOST)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def crop(self, data):
        least = 1 if self.config.exact else self.config.sinks
        rows = self.twin.rows
        self.twin.crop([data.draw(st.integers(min(least, len(row)), len(row))) for row in rows])

    @invariant()
    def consistent(self):
        cache = self.twin.cache
        cache.stores[0].forest.check()
        assert cache.lengths.tolist() == [len(row) for row in self.twin.rows]
        for row, seen in enumerate(self.twin.rows):
            assert cache.kept(0, row) == [list(range(len(seen)))] * 2

    def teardown(self):
        self.twin.gather([])
        forest = self.twin.cache.stores[0].forest
        forest.check()
        assert (forest.free_pages, forest.num_nodes) == (forest.num_pages, 0)


@pytest.mark.parametrize("examples", [6, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("config", [
    *(CacheConfig(page_size=size) for size in (1, 3, 16)),
    CacheConfig(k_bits=4, v_bits=3, recent=4, sinks=2, page_size=3),
    CacheConfig(k_bits=8, v_bits=4, recent=7, recent_bits=16, sinks=1),
], ids=lambda c: f"{c.k_bits or 16} bits, pages of {c.page_size}")  # fmt: skip
def test_cache_under_random_operations(config, examples):
    run_state_machine_as_test(
        type("Machine", (Machine,), {"config": config}),
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
