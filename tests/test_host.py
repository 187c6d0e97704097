"""Pages, tree and plan on the host, by example; test_host_random.py does the same at random."""

from collections import defaultdict

import numpy as np
import pytest

from kvtools._host import Forest, PoolExhausted, plan_from_block_table

GARBAGE = 2**31 - 1


def slots(forest):
    return [forest.row_slots(row).tolist() for row in range(forest.num_rows)]


def state(forest):
    return slots(forest), forest.version, forest.free_pages, forest.num_nodes


def attended(plan, page_size, tile=0, chunk=0):
    """For each query token the (position, slot) pairs that the work items read, in node order."""
    read, parts = defaultdict(list), defaultdict(list)
    for node, token_begin, token_end, begin, end, part in plan["item"]:
        first, length = plan["first"][node], plan["length"][node]
        page = plan["page"][plan["page_indptr"][node] : plan["page_indptr"][node + 1]]
        lowest, highest = plan["token_indptr"][node : node + 2]
        assert (np.diff(plan["token"][lowest:highest]) > 0).all()
        assert lowest <= token_begin < token_end <= highest
        assert 0 <= begin < end <= len(page) * page_size - first
        assert not tile or token_end - token_begin <= tile
        assert not chunk or end - begin <= chunk
        assert begin == 0 or (first + begin) % page_size == 0
        offset = np.arange(begin, min(end, length))
        at = first + offset
        slot = page[at // page_size] * page_size + at % page_size
        pairs = list(zip((plan["base"][node] + offset).tolist(), slot.tolist(), strict=True))
        for t in plan["token"][token_begin:token_end].tolist():
            read[t].append((node, pairs))
            parts[t].append(part)
            part += 1
    listed = np.split(plan["part"], plan["part_indptr"][1:-1])
    assert {t: x.tolist() for t, x in enumerate(listed) if len(x)} == parts
    # Parents come before children, so a stable sort by node is path order.
    return {
        t: [pair for _, pairs in sorted(parts, key=lambda part: part[0]) for pair in pairs]
        for t, parts in read.items()
    }


def test_insert():
    forest = Forest(8, 4)
    assert (forest.num_pages, forest.page_size, forest.free_pages, forest.version) == (8, 4, 8, 0)
    out = forest.insert(6, base=10, copies=3)
    assert out.dtype == np.int32 and out.tolist() == [0, 1, 2, 3, 4, 5]
    assert forest.insert(0).tolist() == []
    assert slots(forest) == [out.tolist()] * 3 + [[]]
    assert (forest.num_rows, forest.num_nodes, forest.free_pages) == (4, 2, 6)
    assert forest.lengths().tolist() == [6, 6, 6, 0]
    assert forest.own_lengths().tolist() == [0, 0, 0, 0]
    assert forest.prefix_pages() == 2
    assert forest.plan([1, 0, 0, 1])["base"].tolist() == [10]
    assert forest.root_of(0) == forest.root_of(2) != forest.root_of(3)
    assert forest.version == 2


def test_append_never_in_place_of_a_sealed_node():
    forest = Forest(8, 4)
    forest.insert(3)
    assert forest.append([2]).tolist() == [4, 5]
    assert slots(forest) == [[0, 1, 2, 4, 5]]
    assert forest.own_lengths().tolist() == [2]


def test_append_sealed_is_a_node_of_its_own():
    forest = Forest(9, 4)
    forest.insert(3, copies=2)
    assert forest.pages_needed([1, 0], seal=True) == 1
    forest.append([1, 0], seal=True)
    forest.append([5, 0], seal=True)
    forest.gather([0, 0, 1])
    assert forest.append([1, 1, 2]).tolist() == [16, 20, 24, 25]
    assert forest.own_lengths().tolist() == [1, 1, 2]
    assert forest.prefix_pages() == 4
    plan = forest.plan([1, 1, 1])
    assert plan["length"].tolist() == [3, 1, 5, 1, 1, 2]
    assert plan["own"].tolist() == [0, 0, 0, 1, 1, 1]
    before = forest.lengths().tolist(), forest.free_pages
    with pytest.raises(ValueError, match="seal: row 1 has grown"):
        forest.append([0, 1, 0], seal=True)
    assert (forest.lengths().tolist(), forest.free_pages) == before


def test_append_in_place():
    forest = Forest(8, 4)
    forest.insert(1, copies=2)
    forest.append([3, 4])
    version = forest.version
    assert forest.pages_needed([1, 0]) == 0
    forest.append([1, 0])
    forest.append([0, 0])
    assert forest.version == version
    assert forest.pages_needed([1, 1]) == 2
    forest.append([1, 1])
    assert forest.version > version
    assert forest.num_nodes == 3


def test_append_to_a_shared_leaf():
    forest = Forest(8, 4)
    forest.insert(1)
    forest.append([2])
    forest.gather([0, 0])
    assert forest.pages_needed([1, 1]) == 2
    forest.append([1, 1])
    assert forest.num_nodes == 4
    assert slots(forest) == [[0, 4, 5, 8], [0, 4, 5, 12]]


def test_gather_frees_what_no_row_reaches():
    forest = Forest(8, 4)
    forest.insert(4)
    forest.insert(8)
    forest.append([1, 1])
    version = forest.version
    forest.gather([0, 1])
    assert forest.version == version
    forest.gather([1])
    assert forest.version > version
    assert (forest.num_rows, forest.num_nodes, forest.free_pages) == (1, 2, 5)
    forest.gather([])
    assert (forest.num_rows, forest.num_nodes, forest.free_pages) == (0, 0, 8)


def test_gather_copies_open_leaves():
    forest = Forest(8, 4)
    forest.insert(4, copies=2)
    forest.append([5, 1])
    assert forest.gather_pages_needed([0, 0, 0, 1]) == 4
    assert forest.gather_pages_needed([0, 0]) == 1  # the other row's page comes free
    kept = forest.row_slots(0).tolist()
    src, dst = forest.gather([0, 0], copy=True)
    assert src.tolist() == [1, 2] and not set(src.tolist()) & set(dst.tolist())
    assert slots(forest)[0] == kept
    assert forest.pages_needed([1, 1]) == 0
    src, dst = forest.gather([1, 0], copy=True)
    assert src.size == dst.size == 0


def test_gather_takes_freed_pages_only_where_no_others_are():
    """So that a copy of the forest from before finds what its pages held."""
    for pages, reused in ((8, False), (4, True)):
        forest = Forest(pages, 4)
        forest.insert(4, copies=2)
        forest.append([5, 1])
        gone = {s // 4 for s in forest.row_slots(0)[4:].tolist()}
        before, copy = state(forest), forest.copy()
        _, dst = forest.gather([1, 1], copy=True)
        assert bool(gone & set(dst.tolist())) == reused, pages
        forest.check()
        forest.append([1, 1])
        assert state(copy) == before
        copy.check()


def test_gather_does_not_copy_sealed_leaves():
    forest = Forest(1, 4)
    forest.insert(4)
    src, _ = forest.gather([0, 0, 0], copy=True)
    assert src.size == 0 and forest.num_nodes == 1


def test_crop_alone_returns_pages():
    forest = Forest(8, 4)
    forest.insert(4)
    forest.append([9])
    forest.crop([4 + 4])
    assert (forest.free_pages, forest.lengths().tolist()) == (6, [8])
    version = forest.version
    forest.crop([8])
    assert forest.version == version
    forest.crop([4])
    assert (forest.free_pages, forest.num_nodes, forest.own_lengths().tolist()) == (7, 1, [0])


def test_crop_splits_a_shared_node():
    forest = Forest(8, 4)
    prompt = forest.insert(10, base=5, copies=3).tolist()
    root = forest.root_of(0)
    forest.crop([6, 3, 10])
    assert slots(forest) == [prompt[:6], prompt[:3], prompt]
    assert (forest.num_nodes, forest.free_pages, forest.prefix_pages()) == (3, 5, 3)
    assert {forest.root_of(row) for row in range(3)} == {root}
    plan = forest.plan([1, 1, 1])
    assert plan["first"].tolist() == [0, 3, 2]
    assert plan["length"].tolist() == [3, 3, 4]
    assert plan["base"].tolist() == [5, 8, 11]
    item = forest.plan([1, 1, 1], chunk=4)["item"]
    assert item[:, 3:5].tolist() == [[0, 3], [0, 1], [1, 3], [0, 2], [2, 4]]
    forest.gather([1])
    assert forest.free_pages == 7


def test_crop_to_nothing_keeps_the_base():
    forest = Forest(8, 4)
    forest.insert(6, base=7, copies=2)
    forest.crop([0, 6])
    assert forest.lengths().tolist() == [0, 6]
    forest.append([2, 0])
    assert attended(forest.plan([1, 0]), 4) == {0: [(7, 8), (8, 9)]}
    assert forest.plan([1, 0])["own"].tolist() == [1]


def test_crop_below_a_shared_page_is_not_grown_in_place():
    forest = Forest(8, 4)
    forest.insert(0)
    forest.append([7])
    forest.gather([0, 0])
    forest.crop([2, 3])  # [0, 2) and [2, 3) share a page
    assert forest.plan([1, 1])["leaf"].tolist() == [-1, -1]
    forest.append([1, 1])
    assert slots(forest) == [[0, 1, 4], [0, 1, 2, 8]]


def test_full_shared_page_does_not_hinder_growth():
    forest = Forest(8, 4)
    forest.insert(0)
    forest.append([7])
    forest.gather([0, 0])
    forest.crop([2, 4])  # [2, 4) ends where its page ends
    assert forest.plan([1, 1])["leaf"].tolist() == [-1, 1]
    forest.append([0, 1])
    assert forest.num_nodes == 3


def test_gather_pages_needed_counts_a_shared_page_as_kept():
    forest = Forest(8, 4)
    forest.insert(0)
    forest.append([6])
    forest.gather([0, 0])
    forest.crop([2, 6])  # the second row holds half of the first row's page, and one more
    assert forest.gather_pages_needed([0, 0, 0]) == 1
    forest.gather([0, 0, 0], copy=True)
    assert forest.free_pages == 5


def test_plan():
    forest = Forest(16, 4)
    forest.insert(6, copies=3)
    forest.append([1, 5, 0])
    plan = forest.plan([2, 1, 0], tile=2, chunk=4)
    assert plan.pop("page_size") == 4
    assert all(array.dtype == np.int32 for array in plan.values())
    assert plan["page_indptr"].tolist() == [0, 2, 3, 5]
    assert plan["own"].tolist() == [0, 1, 1]
    assert plan["token_indptr"].tolist() == [0, 3, 5, 6]
    assert plan["token"].tolist() == [0, 1, 2, 0, 1, 2]
    assert plan["leaf"].tolist() == [1, 2, -1]
    assert plan["item"].tolist() == [
        [0, 0, 2, 0, 4, 0], [0, 2, 3, 0, 4, 2], [0, 0, 2, 4, 6, 3], [0, 2, 3, 4, 6, 5],
        [1, 3, 5, 0, 4, 6],
        [2, 5, 6, 0, 4, 8], [2, 5, 6, 4, 8, 9],
    ]  # fmt: skip
    assert plan["part_indptr"].tolist() == [0, 3, 6, 10]
    assert plan["part"].tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8, 9]
    # A row without tokens still shares its nodes.
    assert forest.plan([1, 0, 0])["own"].tolist() == [0, 1]
    assert forest.plan([0, 0, 0])["item"].shape == (0, 6)


@pytest.mark.parametrize(
    ("rows", "shared", "own", "items"),
    [(8, 1000, 100, 9), (64, 8192, 256, 33), (8, 3000, 700, 20), (64, 2048, 128, 67)],
)
def test_plan_is_cut_into_items(rows, shared, own, items):
    forest = Forest(7000, 4)
    forest.insert(shared, copies=rows)
    forest.append([own] * rows)
    # Two tiles of the shared node, and what each row has: kernels of two launches may take them.
    item = forest.plan([1] * rows, tile=rows // 2, items=items)["item"]
    slots = item[:, 4] - item[:, 3]
    assert slots.tolist() == sorted(slots, reverse=True)
    several = item[:, 2] - item[:, 1] > 1
    for of in (slots[several], slots[~several]):
        ends = [0] * items
        for n in of:
            ends[np.argmin(ends)] += n
        even = max(sum(of) / items, min(128, max(of)))
        assert max(ends) <= 1.15 * even


@pytest.mark.parametrize("items", [1, 2, 2**31 // 3 * 2, 2**31 - 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_number_of_items_covers_all(rows, items):
    forest = Forest(3000, 4)
    forest.insert(3000, copies=rows)
    forest.insert(0)
    forest.append([700] * rows + [0])
    plan = forest.plan([1] * rows + [0], items=items)
    for row, pairs in attended(plan, 4).items():
        assert [slot for _, slot in pairs] == forest.row_slots(row).tolist()


def test_items_have_least_slots():
    forest = Forest(600, 4)
    forest.insert(1000, copies=8)
    forest.append([100] * 8)
    ones = [1] * 8
    # Cuts lie on page borders, and no item is shorter than 128 slots but a node's last.
    item = forest.plan(ones, tile=4, items=10**6)["item"]
    slots = item[:, 4] - item[:, 3]
    assert len(item) == 2 * 8 + 8 and set(slots) == {100, 104, 128}
    assert forest.plan(ones, tile=4, chunk=8, items=9)["item"].tolist() == (
        forest.plan(ones, tile=4, chunk=8)["item"].tolist()
    )


def test_plan_stays_valid_while_a_length_grows():
    forest = Forest(8, 4)
    forest.insert(4)
    forest.append([1])
    version, plan = forest.version, forest.plan([1])
    for _ in range(3):
        forest.append([1])
        plan["length"][plan["leaf"][0]] += 1
        assert forest.version == version
        assert [slot for _, slot in attended(plan, 4)[0]] == forest.row_slots(0).tolist()


def grown():
    """Forks, a node that was split inside a page, one without slots, and freed pages between."""
    forest = Forest(40, 4)
    forest.insert(9, base=4, copies=3)
    forest.insert(30)
    forest.insert(0)
    forest.append([3, 2, 7, 1, 1])
    forest.gather([0, 0, 1, 4, 2, 2])
    forest.crop([12, 10, 8, 1, 16, 11])
    return forest


def test_table():
    forest = grown()
    node, page, row = forest.table()
    again = Forest.of(40, 4, node, page, row)
    again.check()
    assert state(again)[0] == state(forest)[0] and state(again)[2:] == state(forest)[2:]
    for x in (forest, again):
        x.append([1, 2, 0, 5, 1, 1])
        x.gather([5, 2, 2, 0], copy=True)
        x.check()
    assert again.lengths().tolist() == forest.lengths().tolist()
    assert again.own_lengths().tolist() == forest.own_lengths().tolist()
    empty = Forest.of(3, 4, *Forest(3, 4).table())
    assert (empty.num_rows, empty.free_pages) == (0, 3)


def test_table_of_no_forest():
    """Whatever a number is made, it is refused, or makes another forest that is one."""
    tables, refused = grown().table(), 0
    for i, table in enumerate(tables):
        for at in range(len(table)):
            for x in (-1, 0, 1, 5, 39, 40, 2**31 - 1, -(2**31)):
                bad = [t.copy() for t in tables]
                bad[i][at] = x
                try:
                    Forest.of(40, 4, *bad).check()
                except ValueError as error:
                    assert "forest" in str(error)
                    refused += 1
    assert refused > 200
    for i in range(3):
        for wrong in (tables[i][:-1], np.append(tables[i], 1)):
            bad = [*tables[:i], wrong, *tables[i + 1 :]]
            if i < 2:
                with pytest.raises(ValueError, match="no forest"):
                    Forest.of(40, 4, *bad)


def test_pool_exhausted():
    forest = Forest(4, 4)
    forest.insert(5, copies=2)
    forest.append([4, 0])
    before = state(forest)
    message = "the page pool is exhausted: 7 more pages are needed, 1 of 4 are free"
    with pytest.raises(PoolExhausted, match=message) as caught:
        forest.insert(28)
    assert (caught.value.needed, caught.value.free) == (7, 1)
    with pytest.raises(PoolExhausted, match="2 more pages"):
        forest.append([1, 1])
    with pytest.raises(PoolExhausted, match="2 more pages"):
        forest.gather([0, 0, 0], copy=True)
    assert state(forest) == before
    forest.grow(11)
    forest.insert(28)
    assert (forest.num_pages, forest.free_pages) == (11, 1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda f: Forest(4, 0), ValueError, "page_size must be positive, not 0"),
        (lambda f: Forest(-1, 4), ValueError, "num_pages: -1 is less than the present 0"),
        (lambda f: Forest(2**29, 4), ValueError, "more than 2..31 - 1 slots"),
        (lambda f: f.grow(3), ValueError, "num_pages: 3 is less than the present 8"),
        (lambda f: f.insert(-1), ValueError, "length is negative: -1"),
        (lambda f: f.insert(1, base=-1), ValueError, "base: positions -1"),
        (lambda f: f.insert(1, copies=0), ValueError, "copies must be positive, not 0"),
        (lambda f: f.append([1, -2]), ValueError, "counts: row 1 has -2"),
        (lambda f: f.append([1]), ValueError, "counts must have one entry per row: 1 .* 2 rows"),
        (lambda f: f.append([[1, 1]]), ValueError, "counts must have 1 dimension"),
        (lambda f: f.append([0.5, 1]), TypeError, "counts must be an array of integers"),
        (lambda f: f.append([True, False]), TypeError, "counts must be an array of integers"),
        (lambda f: f.append(None), TypeError, "counts must be an array of integers"),
        (lambda f: f.append([2**31, 0]), ValueError, "counts holds 2147483648"),
        (lambda f: f.append([2**31 - 1, 0]), ValueError, "row 0 would pass position"),
        (lambda f: f.gather([0, 2]), IndexError, "row 2 is out of range, there are 2 rows"),
        (lambda f: f.gather([-1], copy=True), IndexError, "row -1 is out of range"),
        (lambda f: f.gather_pages_needed([9]), IndexError, "row 9 is out of range"),
        (lambda f: f.row_slots(2), IndexError, "row 2 is out of range"),
        (lambda f: f.root_of(-1), IndexError, "row -1 is out of range"),
        (lambda f: f.crop([6, 5]), ValueError, "row 1 cannot be cropped to 5 slots, it holds 4"),
        (lambda f: f.crop([-1, 4]), ValueError, "row 0 cannot be cropped to -1 slots"),
        (lambda f: f.plan([1, 1], chunk=6), ValueError, "chunk must be a multiple of page_size 4"),
        (lambda f: f.plan([1, 1], items=-1), ValueError, "items is negative: -1"),
        (lambda f: f.plan([1, 1], tile=-1), ValueError, "tile is negative: -1"),
        (lambda f: f.plan([2**31 - 1] * 2), ValueError, "tokens are more than"),
    ],
)
def test_errors_change_nothing(call, error, message):
    forest = Forest(8, 4)
    forest.insert(4, copies=2)
    forest.append([2, 0])
    before = state(forest)
    with pytest.raises(error, match=message):
        call(forest)
    assert state(forest) == before
    forest.check()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64])
def test_any_integer_type(dtype):
    forest = Forest(8, 4)
    forest.insert(1, copies=3)
    forest.append(np.array([1, 9, 2, 9, 3], dtype)[::2])
    assert forest.own_lengths().tolist() == [1, 2, 3]


def test_block_table():
    g = GARBAGE
    table = [[7, 3, 5, g], [7, 3, 5, 6], [9, g, g, g], [7, 3, 8, g], [g, g, g, g]]
    plan = plan_from_block_table(table, [12, 14, 3, 9, 0], 4)
    nodes = [
        plan["page"][begin:end].tolist()
        for begin, end in zip(plan["page_indptr"], plan["page_indptr"][1:], strict=False)
    ]
    assert nodes == [[9], [7, 3], [8], [5], [6]]
    assert plan["length"].tolist() == [3, 8, 1, 4, 2]
    assert plan["base"].tolist() == [0, 0, 8, 8, 12]
    assert plan["own"].tolist() == [1, 0, 1, 0, 1]
    assert plan["leaf"].tolist() == [-1, 4, 0, 2, -1]
    assert plan["token"].tolist() == [2, 0, 1, 3, 3, 0, 1, 1]
    # Private nodes can grow to the end of their last block.
    assert plan["item"][:, 4].tolist() == [4, 8, 4, 4, 4]


def test_block_table_of_rows_that_are_somewhere_in_it():
    """And which, by themselves, share nothing."""
    table = np.array([[-1, -1], [7, 3], [-1, -1], [7, 5]])
    given = dict(rows=[3, 1], counts=[1, 1])
    plan = plan_from_block_table(table, [8, 6], 4, **given)
    assert plan["page"].tolist() == [7, 3, 5]
    plan = plan_from_block_table(table, [8, 6], 4, share=False, **given)
    assert plan["page"].tolist() == [7, 5, 7, 3] and plan["own"].tolist() == [1, 1]
    assert plan["item"].tolist() == [[0, 0, 1, 0, 8, 0], [1, 1, 2, 0, 8, 1]]


def test_block_table_row_alone_is_one_node():
    plan = plan_from_block_table(np.array([[4, 2, 6, 0]], np.int64), [11], 4, counts=[2], chunk=8)
    assert plan["page"].tolist() == [4, 2, 6]
    assert plan["item"].tolist() == [[0, 0, 2, 0, 8, 0], [0, 0, 2, 8, 12, 2]]
    assert plan["leaf"].tolist() == [0]


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([[1]], [5], 4), ValueError, "seq_lens: row 0 has 5, a row of the table holds 4"),
        (([[1]], [-1], 4), ValueError, "seq_lens: row 0 has -1"),
        (([[1]], [1, 1], 4), ValueError, "seq_lens must have one entry per row"),
        (([[1]], [1], 4, [1, 1]), ValueError, "counts must have one entry per row"),
        (([[-1]], [1], 4), ValueError, "block_table: row 0 has a block within its length"),
        (([[5, -1], [5, 2]], [8, 4], 4), ValueError, "row 0 has a block within its length"),
        (([[-3, 1], [-3, 2]], [8, 8], 4), ValueError, "row 0 has a block within its length"),
        (([[1]], [1], 4, None, 0, 0, 0, True, [1]), IndexError, "rows holds 1; block_table has 1"),
        (([1], [1], 4), ValueError, "block_table must have 2 dimension"),
        (([[1.0]], [1], 4), TypeError, "block_table must be an array of integers"),
        (([[1]], [1], 0), ValueError, "page_size must be positive, not 0"),
        (([[1]], [1], 4, None, 0, 2), ValueError, "chunk must be a multiple of page_size 4"),
    ],
)
def test_block_table_errors(args, error, message):
    with pytest.raises(error, match=message):
        plan_from_block_table(*args)
