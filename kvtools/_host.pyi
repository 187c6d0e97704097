"""Pages, tree and plan of a paged KV store, on the host (C++, csrc/host).

A *page* is `page_size` token slots. A *node* is a run of consecutive tokens with its own pages:
`length` slots from slot `first` of its first page on, the first of them at true position `base`.
Nodes form a forest. A *row* is a leaf node and the path above it. The flat id
of a slot is `page * page_size + slot`.

Arguments annotated `Ints` are one-dimensional arrays, tensors or lists of integers that fit int32
(`TypeError` or `ValueError` otherwise, naming the argument). All arrays returned are int32. A call
that raises has changed nothing.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = ArrayLike
Int32 = NDArray[np.int32]

class PoolExhausted(RuntimeError):
    """The pool has too few free pages. `grow` by at least `needed - free` and repeat the call."""

    needed: int
    free: int

class Plan(TypedDict):
    """What one attention call reads: M nodes, parents before children, and I work items.

    Query tokens are numbered 0..T-1 in row order. Only nodes that hold slots and are attended by a
    token appear. A plan holds until `Forest.version` changes, but for `length`, which the caller
    may advance.
    """

    page_indptr: Int32
    """[M + 1]: node i has `page[page_indptr[i] : page_indptr[i + 1]]`."""
    page: Int32
    first: Int32
    """[M]: offset of the node's first slot in its first page."""
    length: Int32
    base: Int32
    own: Int32
    """[M]: 1 where the node is on the path of exactly one row, with or without tokens, and is not
    sealed."""
    token_indptr: Int32
    """[M + 1]: node i is attended by `token[token_indptr[i] : token_indptr[i + 1]]`, ascending."""
    token: Int32
    item: Int32
    """[I, 6]: node, token begin and end (into `token`), slot begin and end (from the node's first
    slot), and the number of its first partial result, of which it has one per token.

    Slots reach up to the node's capacity, which exceeds its length where it can still grow inside
    its last page."""
    part_indptr: Int32
    """[T + 1]: token t has the partial results `part[part_indptr[t] : part_indptr[t + 1]]`."""
    part: Int32
    leaf: Int32
    """[rows]: the node that the row's next slots go to in place, or -1 where `append` would make a
    new one."""
    page_size: int
    """What it was made for."""

class Forest:
    """A pool of `num_pages` pages, all free at first, and the forest of nodes that hold them."""

    def __init__(self, num_pages: int, page_size: int) -> None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def version(self) -> int:
        """Increases when page lists, tree or rows change; not when a length grows inside a page
        already held."""

    def copy(self) -> Forest:
        """A forest of its own, equal to this one."""

    def table(self) -> tuple[Int32, Int32, Int32]:
        """What it is made of, for `of`: of each node, parents before children, the number of its
        parent or -1, the offset of its first slot, its length, its base, and whether it is sealed,
        [nodes * 5]; the pages of one node after another; the node that is each row's leaf."""

    @staticmethod
    def of(num_pages: int, page_size: int, node: Ints, page: Ints, row: Ints) -> Forest:
        """The forest of a table.

        Raises:
            ValueError: it is that of no forest.
        """

    def grow(self, num_pages: int) -> None:
        """Enlarge the pool to `num_pages`, no fewer than there are. Page ids in use stay."""

    def insert(self, length: int, base: int = 0, copies: int = 1) -> Int32:
        """Add a root that holds `length` slots from true position `base` on, and `copies` rows at
        the end.

        The root is sealed: it never grows, its rows grow by children of their own.

        Returns:
            The flat ids of the slots, [length].

        Raises:
            PoolExhausted: too few free pages.
        """

    def append(self, counts: Ints, seal: bool = False) -> Int32:
        """Extend each row by `counts[row]` >= 0 slots.

        The row's leaf grows in place if no other row uses it, it is not sealed, and its last page
        is full or held by it alone. Otherwise a new child on fresh pages becomes the leaf.

        With `seal` it is a new child, which is sealed as a root is: more of a prompt, whose rows
        are to part here.

        Returns:
            The flat ids of the new slots, in row order, [sum(counts)].

        Raises:
            PoolExhausted: `pages_needed(counts, seal) > free_pages`.
            ValueError: with `seal`, a row that grows has grown without.
        """

    def pages_needed(self, counts: Ints, seal: bool = False) -> int:
        """Pages that `append(counts, seal)` would take."""

    def gather(self, index: Ints, copy: bool = False) -> tuple[Int32, Int32]:
        """Make the rows `rows[index]`, repeats allowed. Nodes that no row reaches any more are
        freed.

        With `copy`, an unsealed leaf goes to the first of the rows that would share it and is
        duplicated on fresh pages for each of the others, so that all go on growing in place.

        Returns:
            Source and destination pages, [c] each, for the caller to copy before the next write;
            empty without `copy`. No page is both. Pages that the call frees are among the
            destinations only if fewer than `c` were free before.

        Raises:
            IndexError: a value of `index` is not a row.
            PoolExhausted: `gather_pages_needed(index) > free_pages`, with `copy`.
        """

    def gather_pages_needed(self, index: Ints) -> int:
        """Pages that `gather(index, copy=True)` takes beyond those it frees itself; never
        negative."""

    def crop(self, lengths: Ints) -> None:
        """Cut each row back to its own number of slots. Nothing is copied.

        A node used by others is split in two that share the page of the cut; sealed nodes have
        sealed halves. A row cut to 0 keeps its empty root, and with it the root's `base`.

        Raises:
            ValueError: a length is negative or more than the row holds.
        """

    def lengths(self) -> Int32:
        """Slots of each row, over its whole path, [rows]."""

    def own_lengths(self) -> Int32:
        """Slots of each row outside sealed nodes, [rows]."""

    def row_slots(self, row: int) -> Int32:
        """The flat ids of a row's slots, in path order."""

    def root_of(self, row: int) -> int:
        """Id of the row's root: equal for rows of one `insert`, and kept for as long as one of them
        lives."""

    def prefix_pages(self) -> int:
        """Distinct pages held by sealed nodes."""

    def plan(self, counts: Ints, tile: int = 0, chunk: int = 0, items: int = 0) -> Plan:
        """Plan the attention of `counts[row]` query tokens of each row over the slots of its path.

        Args:
            counts: 0 for rows that attend nothing.
            tile: most query tokens of one work item; 0 is no limit.
            chunk: most slots of one work item, a multiple of `page_size`; 0 is no limit. Cuts lie
                on page borders.
            items: without a `chunk`, cut such that the last of the work ends soonest where so many
                items of a KV head run at once; no item is shorter than 128 slots but a node's last.
                The longest comes first. See `kvtools.ops.attention.limits`.
        """

    def check(self) -> None:
        """Raise RuntimeError if the forest contradicts itself. For tests."""

def plan_from_block_table(
    block_table: ArrayLike,
    seq_lens: Ints,
    page_size: int,
    counts: Ints | None = None,
    tile: int = 0,
    chunk: int = 0,
    items: int = 0,
    share: bool = True,
    rows: Ints | None = None,
) -> Plan:
    """Plan attention over a server's block table: rows that share leading full blocks share nodes.

    A partly filled last block is private to its row. A row of length 0 has no nodes.

    Args:
        block_table: [rows, max blocks] page ids in the order of the positions they hold, from 0 on.
            What lies beyond a row's length is never read.
        seq_lens: slots that each row holds, [rows].
        page_size: slots per block.
        counts: query tokens of each row; 1 each by default.
        tile, chunk, items: as in `Forest.plan`.
        share: False for a node of each row, whatever it shares.
        rows: which row of the table each row is; all of them, in order, by default.

    Returns:
        The plan. `own` marks nodes of one row; `leaf` is the node with a row's last slot if only
        that row has it.
    """

def plan_pages(plan: Plan, page_size: int) -> int:
    """How many pages kernels need in order to follow `plan`, whoever made it.

    Raises:
        IndexError: an id or an offset points nowhere: at a page below 0, a slot outside of its
            node's pages, or a node, a token or a partial result that the plan does not have.
        ValueError: sizes do not fit one another, or the partial results of tokens are not those
            that the items leave.
    """
