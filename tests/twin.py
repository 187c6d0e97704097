"""A cache beside plain copies of what its rows should hold."""

import numpy as np
import torch

import kvtools


class Twin:
    """A KVCache driven with random tokens, and what every row has seen beside it.

    The token of a row at a position is a function of the row's seed then, the layer and the
    position, so that a row meets the same tokens in any batch. `rows[i][p]` is the seed of row i at
    position p, `seeds[i]` the one of its next tokens.
    """

    def __init__(self, config, *, layers=1, heads=2, group=2, d=8, dtype=torch.float64, pages=None,
                 longest=500, **options):  # fmt: skip
        self.cache = kvtools.KVCache(config, layers, pages=pages)
        self.layers, self.heads, self.group, self.d = layers, heads, group, d
        self.options = options
        generator = torch.Generator().manual_seed(0)
        shape = (6, layers, longest, heads * (group + 2), d)  # seed, layer, position
        self.tokens = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.rows, self.seeds = [], []
        self.prompts = []  # seed and length of each row's prompt
        self.recent = []  # first position of each row that is held among its recent tokens

    def qkv(self, layer, row, begin=0, end=None):
        """q [s, Hq, D], k and v [s, H, D] of a row."""
        seeds = np.array(self.rows[row][begin:end], int)
        x = self.tokens[seeds, layer, begin + np.arange(len(seeds))]
        return x.split([self.heads * self.group, self.heads, self.heads], 1)

    def add(self, length, copies=1, seed=0):
        self.cache.add_prompt(length, copies)
        self.rows += [[seed] * length for _ in range(copies)]
        self.seeds += [seed] * copies
        first = max(length - self.cache.config.recent, self.cache.config.sinks)
        self.recent += [min(length, first)] * copies
        self.prompts += [(seed, length)] * copies
        for layer in range(self.layers):
            qkv = (x.transpose(0, 1) for x in self.qkv(layer, -1))
            self.cache.fill(layer, *qkv, **self.options)

    def settle(self):
        ends = [len(row) - self.cache.config.recent for row in self.rows]
        self.recent = list(map(max, self.recent, ends))

    def step(self, counts=None, **how):
        """New tokens for every row; their attention [T, Hq, D] by layer."""
        self.settle()
        counts = [1] * len(self.rows) if counts is None else counts
        position = self.cache.extend(counts, **how)
        starts = [len(row) for row in self.rows]
        for row, seed, count in zip(self.rows, self.seeds, counts, strict=True):
            row += [seed] * count
        spans = list(zip(range(len(starts)), starts, strict=True))
        assert position.tolist() == [p for i, s in spans for p in range(s, len(self.rows[i]))]
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]
        outs = []
        for layer in range(self.layers):
            parts = zip(*(self.qkv(layer, i, start) for i, start in spans), strict=True)
            outs.append(self.cache.attend(layer, *map(torch.cat, parts), **self.options))
        return outs

    def gather(self, index, seeds=None):
        self.settle()
        self.cache.gather(index)
        self.rows = [list(self.rows[i]) for i in index]
        self.recent = [self.recent[i] for i in index]
        self.prompts = [self.prompts[i] for i in index]
        self.seeds = [self.seeds[i] for i in index] if seeds is None else seeds

    def crop(self, lengths):
        self.settle()
        self.cache.crop(lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        self.recent = list(map(min, self.recent, lengths))

    def read(self, layer, row, k, v, recent):
        """Keys and values of a row once they went through the formats: sinks and, from position
        `recent` on, recent tokens finer."""
        config, (seed, length) = self.cache.config, self.prompts[row]
        sinks = min(config.sinks, length)
        finer = config.recent_formats or (config.k_format, config.v_format)

        def back(x, format, finer):
            if format == "none":
                return x
            fine, coarse = (
                x if f == "none"
                else kvtools.dequantize_kv(*kvtools.quantize_kv(x, f), self.d, dtype=x.dtype)
                for f in (finer, format)
            )  # fmt: skip
            first = max(recent, sinks)
            return torch.cat([x[:sinks], coarse[sinks:first], fine[first:]])

        v = back(v, config.v_format, finer[1])
        if config.k_format == "none":
            return k, v
        q, keys, _ = self.tokens[seed, layer, :length].split(
            [self.heads * self.group, self.heads, self.heads], 1
        )
        keys = keys[sinks:]
        center = keys.mean(0) if len(keys) else 0
        q2 = q.square().mean(0).unflatten(0, (self.heads, -1)).mean(1)
        k2 = (keys - center).square().sum(0) / max(len(keys), 1)
        gain = torch.where(k2 > 0, torch.exp2(torch.round(torch.log2(q2 / k2) / 4)), 1)
        gain = gain.clamp(2.0**-6, 2.0**6)
        return back((k - center) * gain, config.k_format, finer[0]) / gain, v

    def dense(self, layer, row, at=-1, kept=None):
        """Attention [Hq, D] of a token over the positions `kept` by head, default all, in fp64."""
        q, k, v = (x.double() for x in self.qkv(layer, row))
        at %= len(q)
        k, v = self.read(layer, row, k, v, max(self.recent[row], at - self.cache.config.recent + 1))
        options = dict(softcap=0.0, sliding=0, sink_h=None) | self.options
        out = torch.zeros_like(q[0])
        for h in range(self.heads):
            seen = torch.tensor(
                [p for p in (range(at + 1) if kept is None else kept[h]) if p <= at]
            )
            if options["sliding"]:
                seen = seen[seen > at - options["sliding"]]
            for g in range(h * self.group, (h + 1) * self.group):
                x = k[seen, h] @ q[at, g] * self.d**-0.5
                if options["softcap"]:
                    x = options["softcap"] * torch.tanh(x / options["softcap"])
                if options["sink_h"] is not None:
                    x = torch.cat([x, options["sink_h"][g, None].double()])
                out[g] = x.softmax(0)[: len(seen)] @ v[seen, h]
        return out

    def check_step(self, counts=None, **how):
        """A step whose attention must be that of the tokens read; rows that lose tokens in it may
        take one each."""
        starts = [len(row) for row in self.rows]
        for layer, out in enumerate(self.step(counts, **how)):
            expected = [
                self.dense(layer, row, at, self.cache.kept(layer, row))
                for row, start in enumerate(starts)
                for at in range(start, len(self.rows[row]))
            ]
            expected = torch.stack(expected) if expected else out.double()
            torch.testing.assert_close(out.double(), expected, rtol=1e-9, atol=1e-9)
