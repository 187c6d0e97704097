"""What the host does between two decode steps of 512 rows under one prompt of 2,048 tokens."""

import numpy as np
import pytest

from kvtools._host import Forest, plan_from_block_table

ROWS, PROMPT, PAGE_SIZE = 512, 2048, 16
ONE = np.ones(ROWS, np.int32)
REPEATED = np.repeat(np.arange(ROWS // 2, dtype=np.int32), 2)  # half of the rows replaced


@pytest.mark.parametrize("copy", [False, True], ids=["share", "copy"])
def test_gather_append_plan(benchmark, copy):
    def forest():
        forest = Forest(1 << 16, PAGE_SIZE)
        forest.insert(PROMPT, copies=ROWS)
        forest.append(np.full(ROWS, 200, np.int32))
        return (forest,), {}

    def step(forest):
        forest.gather(REPEATED, copy)
        forest.append(ONE)
        return forest.plan(ONE, tile=64, chunk=512)

    plan = benchmark.pedantic(step, setup=forest, rounds=200, warmup_rounds=5)
    assert plan["token_indptr"][-1] == ROWS * (2 if copy else 3)


def test_plan_unchanged_tree(benchmark):
    forest = Forest(1 << 16, PAGE_SIZE)
    forest.insert(PROMPT, copies=ROWS)
    forest.append(ONE)
    benchmark(forest.plan, ONE, tile=64, chunk=512)


@pytest.mark.parametrize("shared", [0, 96, 127], ids="shared={}".format)
def test_plan_from_block_table(benchmark, shared):
    blocks = 128
    table = np.random.default_rng(0).permutation(ROWS * blocks).astype(np.int32)
    table = table.reshape(ROWS, blocks)
    table[:, :shared] = table[0, :shared]
    lengths = np.full(ROWS, blocks * PAGE_SIZE - 3, np.int32)
    plan = benchmark(plan_from_block_table, table, lengths, PAGE_SIZE, tile=64, chunk=512)
    assert len(plan["first"]) == ROWS + (shared > 0)
