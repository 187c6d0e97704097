"""Prompts that begin alike, as a radix forest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Branch(NamedTuple):
    """Tokens [begin, end) that prompts have in common with all that is before them."""

    begin: int
    end: int
    prompts: list[int]  # their numbers


def branches(prompts: Sequence[np.ndarray], least: int) -> list[list[Branch]]:
    """The forest of `prompts`, level by level: a branch continues one of a level before, and every
    prompt ends with a branch.

    Args:
        prompts: token ids of each, at least one; the same may come more than once.
        least: tokens below which a stretch is not worth a branch of its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tolist())
    shared = [alike(prompts[i], prompts[j]) for i, j in zip(order, order[1:], strict=False)]
    levels: list[list[Branch]] = []
    todo = [(0, len(order), 0, 0)] if order else []
    while todo:
        first, last, begin, depth = todo.pop()
        end = min(shared[first : last - 1], default=len(prompts[order[first]]))
        if last - first == 1 or end - begin >= least:
            levels += [[]] if depth == len(levels) else []
            levels[depth].append(Branch(begin, end, order[first:last]))
            while first < last and len(prompts[order[first]]) == end:
                first += 1
            begin, depth = end, depth + 1
        cuts = [i + 1 for i in range(first, last - 1) if shared[i] == end]
        groups = zip([first, *cuts], [*cuts, last], strict=True)
        todo += [(*group, begin, depth) for group in groups if first < last]
    return levels


def alike(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens with which both begin."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
