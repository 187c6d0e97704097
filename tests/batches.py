"""Decode steps of a server, as its block table has them."""

import random

import torch

PAGE, WIDTH, BLOCKS = 4, 12, 160


class Batches:
    """Rows that grow, finish, begin, and fork from one another, as a block table has them."""

    def __init__(self, rows, seed, deep=False):
        self.draw, self.most, self.deep = random.Random(seed), rows, deep
        self.rows, self.used = [], {}

    def take(self):
        return self.draw.choice([x for x in range(1, BLOCKS) if x not in self.used])

    def step(self):
        self.rows = [x for x in self.rows if len(x[0]) < WIDTH and self.draw.random() > 0.1]
        while not self.rows or (len(self.rows) < self.most and self.draw.random() < 0.7):
            stem, n = self.rows[-1 if self.deep else 0] if self.rows else ([], 0)
            whole = min(n // PAGE, WIDTH - 2)
            if not self.deep:
                whole = self.draw.randint(0, whole)
            self.rows.append((stem[:whole], whole * PAGE + self.draw.randint(0, PAGE)))
        for i, (pages, n) in enumerate(self.rows):
            pages = list(pages)
            self.used = {x for each, _ in self.rows for x in each} | set(pages)
            while len(pages) * PAGE < n + 1:
                pages.append(self.take())
                self.used.add(pages[-1])
            self.rows[i] = pages, n + 1
        table = torch.full((self.most, WIDTH), 2**31 - 1, dtype=torch.int32)
        lens = torch.zeros(self.most, dtype=torch.int32)
        for i, (pages, n) in enumerate(self.rows):
            table[i, : len(pages)], lens[i] = torch.tensor(pages, dtype=torch.int32), n
        start = torch.arange(self.most + 1).clamp(max=len(self.rows))
        return table, lens, start
