"""A server's loop over kvtools' operators: its own blocks and block tables, no transformers.

Rows that fork share blocks; a block that is only partly filled is copied when one of its rows
writes to it. kvtools sees a block table and lengths, and finds there what rows have in common.
"""

import torch
from torch import Tensor, nn

from kvtools import KVPages, append_kv, plan_from_block_table, sample, tree_attention

BLOCK, LAYERS, HEADS, KV_HEADS, D, VOCAB = 16, 2, 4, 2, 32, 512


class Model(nn.Module):
    """A small random decoder, in the pieces that a server runs."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * D
        self.embedding = nn.Embedding(VOCAB, width)
        self.qkv = nn.ModuleList(
            nn.Linear(width, (HEADS + 2 * KV_HEADS) * D) for _ in range(LAYERS)
        )
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def heads(self, layer: int, x_tm: Tensor, position_t: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys, rotated, and values: [tokens, heads, D] each."""
        heads = self.qkv[layer](nn.functional.layer_norm(x_tm, x_tm.shape[-1:])).unflatten(
            1, (-1, D)
        )
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
        angle = position_t[:, None] / 10000 ** (torch.arange(D // 2, device=x_tm.device) * 2 / D)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return rotated(q), rotated(k), v


class Server:
    """Rows of token ids over `blocks` blocks of each layer's keys and values."""

    def __init__(self, model: Model, blocks: int, format: str = "int4") -> None:
        self.model, self.free, self.holders = model, list(range(blocks)), [0] * blocks
        self.pages = [
            KVPages.empty(blocks, KV_HEADS, BLOCK, D, k_format=format, v_format=format)
            for _ in range(LAYERS)
        ]
        self.table: list[list[int]] = []  # of each row
        self.text: list[list[int]] = []  # the last token is not in the blocks yet

    def add(self, prompt: list[int], n: int) -> None:
        """Prefill a prompt, and begin `n` rows over it."""
        self.table.append([])
        self.text.append(list(prompt))
        if len(prompt) > 1:
            self.forward([len(self.table) - 1], [prompt[:-1]], [0])
        for _ in range(n - 1):
            self.fork(len(self.table) - 1)

    def fork(self, row: int) -> None:
        for block in self.table[row]:
            self.holders[block] += 1
        self.table.append(list(self.table[row]))
        self.text.append(list(self.text[row]))

    def step(self, seed: int = 0) -> Tensor:
        """A token for each row; returns the logits that they were drawn from."""
        rows = range(len(self.text))
        past = [len(text) - 1 for text in self.text]
        logits_bv = self.forward(rows, [[text[-1]] for text in self.text], past)
        seeds = torch.arange(len(rows)) + seed
        token_b, _, _ = sample(
            logits_bv, seeds, torch.tensor(past) + 1, temperature=0.8, top_p=0.95
        )
        for text, token in zip(self.text, token_b.tolist(), strict=True):
            text.append(token)
        return logits_bv

    @torch.no_grad()
    def forward(self, rows, new: list[list[int]], past: list[int]) -> Tensor:
        """Feed `new` tokens of `rows`, which have `past` in their blocks: logits after the last."""
        slots = [self.reserve(r, p, len(x)) for r, p, x in zip(rows, past, new, strict=True)]
        counts = torch.tensor([len(x) for x in new], dtype=torch.int32)
        widest = max(len(self.table[row]) for row in rows)
        table = [self.table[row] + [0] * (widest - len(self.table[row])) for row in rows]
        lengths = torch.tensor(past, dtype=torch.int32) + counts
        plan = plan_from_block_table(torch.tensor(table), lengths, BLOCK, query_lens=counts)
        slot_t = torch.tensor(sum(slots, []))
        position_t = torch.cat(
            [torch.arange(p, p + len(x)) for p, x in zip(past, new, strict=True)]
        )
        position_t = position_t.int()
        x_tm = self.model.embedding(torch.tensor(sum(new, [])))
        for layer, pages in enumerate(self.pages):
            q_thd, k_thd, v_thd = self.model.heads(layer, x_tm, position_t)
            append_kv(k_thd, v_thd, slot_t, pages)
            out_thd, _ = tree_attention(q_thd, position_t, pages, plan)
            x_tm = x_tm + self.model.out[layer](out_thd.flatten(1))
        return x_tm[counts.cumsum(0) - 1] @ self.model.embedding.weight.T

    def reserve(self, row: int, past: int, count: int) -> list[int]:
        """Flat slots of a row's next tokens, in blocks of its own from the first of them on."""
        table = self.table[row]
        if past % BLOCK and self.holders[table[-1]] > 1:  # copy on write
            shared, table[-1] = table[-1], self.take()
            self.holders[shared] -= 1
            for pages in self.pages:
                for x in filter(lambda x: x is not None, pages.tensors()):
                    x[table[-1]] = x[shared]
        while len(table) * BLOCK < past + count:
            table.append(self.take())
        return [table[i // BLOCK] * BLOCK + i % BLOCK for i in range(past, past + count)]

    def take(self) -> int:
        block = self.free.pop()
        self.holders[block] = 1
        return block


def main(prompt: int = 200, n: int = 8, new: int = 64, format: str = "int4") -> Server:
    torch.manual_seed(0)
    server = Server(Model().eval(), blocks=512, format=format)
    server.add(torch.randint(VOCAB, (prompt,)).tolist(), n)
    for _ in range(new):
        server.step()
    used = 512 - len(server.free)
    alone = n * -(-(prompt + new - 1) // BLOCK)
    print(f"{n} rows of {prompt + new} tokens take {used} blocks; apart they would take {alone}")
    return server


if __name__ == "__main__":
    main()
