"""A small engine over SGLang's pools and kvtools' backend; its layers are a transformers model's.

Radix cache over pages, requests by row, chunks of prompts, mixed batches, retraction, windows whose
pages are freed, and decode steps captured for some numbers of requests, by the recorder in place of
CUDA graphs.
"""

import contextlib
import copy
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvtools.testing import Recorder

NAME = "sglang_small"


def runner_of(layers, pool, table):
    """What a backend is made of."""
    return SimpleNamespace(
        model=torch.nn.ModuleList(layers), device="cpu", req_to_token_pool=table,
        token_to_kv_pool=pool, use_mla_backend=False, is_draft_worker=False, enable_hisparse=False,
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
        model_config=SimpleNamespace(is_encoder_decoder=False, attention_chunk_size=None),
        server_args=SimpleNamespace(dllm_algorithm=None),
    )  # fmt: skip


@dataclass(eq=False)
class Request:
    prompt: list[int]
    new: int
    rid: str = ""
    sampling: dict = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    done: int = 0  # tokens whose keys are in the pool
    row: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def drawn(self):
        return self.tokens[len(self.prompt) :]


class Engine:
    """Give `srt`, SGLang's names; `run` gives each request's new tokens."""

    def __init__(self, model, srt, backend, *, page=1, slots=512, chunk=48, most=12,
                 windows=False, choose=None, dtype=torch.float32, graphs=()):  # fmt: skip
        self.srt, self.page, self.chunk, self.most, self.choose = srt, page, chunk, most, choose
        self.model = copy.deepcopy(model)
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        self.model.set_attn_implementation(NAME)
        modules = [x.self_attn for x in self.model.model.layers]
        heads, kv_heads = (
            self.model.config.num_attention_heads,
            self.model.config.num_key_value_heads,
        )
        d = modules[0].head_dim
        window = [getattr(x, "sliding_window", None) or 0 for x in modules]
        self.layers = [
            srt.RadixAttention(
                heads, d, x.scaling, kv_heads, i, sliding_window_size=window[i] - 1,
                logit_cap=getattr(x, "attn_logit_softcapping", None) or 0.0,
            )
            for i, x in enumerate(modules)
        ]  # fmt: skip
        sizes = dict(page_size=page, dtype=dtype, head_num=kv_heads, head_dim=d, device="cpu")
        self.window = max(window) if windows else 0
        if windows:
            pool = srt.SWAKVPool(
                size=slots, size_swa=slots,
                swa_attention_layer_ids=[i for i, x in enumerate(window) if x],
                full_attention_layer_ids=[i for i, x in enumerate(window) if not x], **sizes,
            )  # fmt: skip
            self.there = torch.zeros(slots + page + 1, dtype=torch.int64)
            pool.register_mapping(self.there)
            self.window_pages = list(range(1, slots // page + 1))
        else:
            pool = srt.MHATokenToKVPool(
                size=slots, layer_num=len(modules), enable_memory_saver=False, **sizes
            )
        self.pool = pool
        self.table = srt.ReqToTokenPool(most, 256, "cpu", False)
        self.backend = backend(runner_of(self.layers, pool, self.table))
        self.free = list(range(1, slots // page + 1))[::-1]
        self.used = {}  # page: how many hold it
        self.cache = {}  # tokens of whole pages: the last of these pages
        self.waiting, self.running = deque(), []
        self.counts = dict(retractions=0, hits=0, modes=set())
        self.graphs = {}
        self.counts["replays"] = dict.fromkeys(graphs, 0)
        if graphs:
            with torch.no_grad():
                self._capture(sorted(graphs, reverse=True))

    def run(self, requests):
        self.waiting.extend(requests)
        for x in requests:
            x.tokens = list(x.prompt)
        with torch.no_grad():
            while self.waiting or self.running:
                self._step()
        return [x.drawn for x in requests]

    def _step(self):
        while self.waiting and len(self.running) < self.most and self.table.free_slots:
            self._admit(self.waiting.popleft())
        taken, budget = {}, self.chunk
        for x in list(self.running):
            left = len(x.tokens) - x.done
            count = left if left == 1 else min(left, budget)
            if count and x in self.running and self._room(x, x.done + count):
                budget -= count if left > 1 else 0
                taken[x] = count
        taken = {x: count for x, count in taken.items() if x in self.running}
        self._forward(taken)
        for x in taken:
            self._remember(x, len(x.prompt))
            # What no later query sees goes; what the cache holds stays whole.
            for i in range((x.done - self.window) // self.page if self.window else 0):
                if self.used.get(x.pages[i]) == 1:
                    self._drop_window(x.pages[i])
            if len(x.drawn) == x.new:
                self.running.remove(x)
                if not self.window:
                    self._remember(x, x.done)
                self._release(x)

    def _admit(self, x):
        while (key := tuple(x.tokens[: (len(x.pages) + 1) * self.page])) in self.cache:
            if len(key) >= len(x.tokens):  # one token is left to run
                break
            self._hold(self.cache[key])
            x.pages.append(self.cache[key])
        x.done = len(x.pages) * self.page
        self.counts["hits"] += x.done
        x.row = self.table.alloc_rows(1)[0]
        self._write(x)
        self.running.append(x)

    def _room(self, x, length):
        """Pages for so many tokens: of the cache, or of who came last."""
        while len(x.pages) * self.page < length:
            if not self.free and not self._evict():
                last = self.running.pop()
                self.counts["retractions"] += 1
                self._release(last)
                self.waiting.appendleft(last)
                if last is x:
                    return False
                continue
            page = self.free.pop()
            self._hold(page)
            x.pages.append(page)
            if self.window:
                there = self.window_pages.pop() * self.page
                self.there[page * self.page : (page + 1) * self.page] = torch.arange(
                    there, there + self.page
                )
        self._write(x)
        return True

    def _evict(self):
        for key, page in self.cache.items():
            if self.used[page] == 1:
                del self.cache[key]
                self._drop(page)
                return True
        return False

    def _remember(self, x, length):
        """Whole pages go into the cache; who has another copy takes the cache's."""
        for i in range(length // self.page):
            if (i + 1) * self.page > x.done or not x.pages[i]:
                break
            key = tuple(x.tokens[: (i + 1) * self.page])
            page = self.cache.setdefault(key, x.pages[i])
            if page != x.pages[i] or self.used[page] == 1:
                self._hold(page)
            if page != x.pages[i]:
                self._drop(x.pages[i])
                x.pages[i] = page
        self._write(x)

    def _release(self, x):
        for page in filter(None, x.pages):
            self._drop(page)
        self.table.free_rows([x.row])
        x.pages, x.done = [], 0

    def _hold(self, page):
        self.used[page] = self.used.get(page, 0) + 1

    def _drop(self, page):
        self.used[page] -= 1
        if not self.used[page]:
            del self.used[page]
            self.free.append(page)
            self._drop_window(page)

    def _drop_window(self, page):
        if self.window and self.there[page * self.page]:
            self.window_pages.append(int(self.there[page * self.page]) // self.page)
            self.there[page * self.page : (page + 1) * self.page] = 0

    def _write(self, x):
        slots = torch.tensor(x.pages, dtype=torch.int32)[:, None] * self.page + torch.arange(
            self.page
        )
        self.table.req_to_token[x.row, : slots.numel()] = slots.flatten().int()

    def _forward(self, taken):
        if not taken:
            return
        srt, rows, counts = self.srt, list(taken), list(taken.values())
        lens = torch.tensor([x.done + n for x, n in taken.items()])
        decodes = [n == 1 and x.done >= len(x.prompt) for x, n in taken.items()]
        mode = srt.ForwardMode.DECODE if all(decodes) else (
            srt.ForwardMode.MIXED if any(decodes) else srt.ForwardMode.EXTEND
        )  # fmt: skip
        self.counts["modes"].add(mode.name)
        at = torch.cat([torch.arange(x.done, x.done + n) for x, n in taken.items()])
        table = self.table.req_to_token
        loc = torch.cat([table[x.row, x.done : x.done + n] for x, n in taken.items()]).long()
        batch = srt.ForwardBatch(
            mode, len(rows), torch.tensor([t for x, n in taken.items()
                                           for t in x.tokens[x.done : x.done + n]]),
            torch.tensor([x.row for x in rows]), lens, loc, int(lens.sum()),
        )  # fmt: skip
        batch.seq_lens_cpu = lens
        if mode != srt.ForwardMode.DECODE:
            batch.extend_seq_lens, batch.extend_seq_lens_cpu = torch.tensor(counts), counts
        if mode == srt.ForwardMode.DECODE and self.graphs:
            logits = self._replay(batch)
        else:
            self.backend.init_forward_metadata(batch)
            logits = self._logits(batch, at, torch.tensor(counts).cumsum(0) - 1)
        ends = [x.done + n == len(x.tokens) for x, n in taken.items()]
        token = logits.argmax(-1) if self.choose is None else self.choose(logits, rows, lens)
        for x, n, is_end, t in zip(rows, counts, ends, token.tolist(), strict=True):
            x.done += n
            if is_end:
                x.tokens.append(t)

    def _logits(self, batch, at, last):
        self.batch = batch
        # Nobody reads the mask; without one transformers looks at positions.
        out = self.model(
            batch.input_ids[None], position_ids=at[None], use_cache=False, logits_to_keep=last,
            attention_mask=at.new_zeros(1, 1, 1, 1),
        )  # fmt: skip
        return out.logits[0]

    def _capture(self, sizes):
        """In SGLang's order: all rows of a graph are what fills up a batch."""
        self.backend.init_cuda_graph_state(sizes[0], sizes[0])
        names = ("input_ids", "positions", "req_pool_indices", "out_cache_loc")
        self.held = {name: torch.zeros(sizes[0], dtype=torch.int64) for name in names}
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        self.held |= {x: torch.full((sizes[0],), fill) for x in ("seq_lens", "seq_lens_cpu")}
        for n in sizes:
            ids, at, requests, loc, lens, lens_cpu = (x[:n] for x in self.held.values())
            batch = self.srt.ForwardBatch(
                self.srt.ForwardMode.DECODE, n, ids, requests, lens, loc, n * fill
            )
            batch.seq_lens_cpu, last = lens_cpu, torch.arange(n)
            self.backend.init_forward_metadata_out_graph(batch, in_capture=True)
            for recorder in (contextlib.nullcontext(), Recorder()):  # the first run warms up
                with recorder:
                    self.backend.init_forward_metadata_in_graph(batch)
                    logits = self._logits(batch, at, last)
            self.graphs[n] = recorder, logits, last

    def _replay(self, batch):
        rows = batch.batch_size
        size = min(n for n in self.graphs if n >= rows)
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        at = batch.seq_lens - 1
        for name, x in self.held.items():
            x.fill_(fill if name.startswith("seq_lens") else 0)
            x[:rows] = at if name == "positions" else getattr(batch, name)
        view = SimpleNamespace(
            batch_size=size, forward_mode=batch.forward_mode, out_cache_loc=batch.out_cache_loc,
            **{name: self.held[name][:size]
               for name in ("seq_lens", "seq_lens_cpu", "req_pool_indices")},
        )  # fmt: skip
        self.backend.init_forward_metadata_out_graph(view)
        recorder, logits, _ = self.graphs[size]
        recorder.replay()
        self.counts["replays"][size] += 1
        return logits[:rows].clone()

    def _attend(self, module, query, key, value, attention_mask, **given):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        extra = {} if given.get("s_aux") is None else dict(sinks=given["s_aux"])
        out = self.backend.forward(
            q.flatten(1), k, v, self.layers[module.layer_idx], self.batch, **extra
        )
        return out.view(1, len(q), -1, q.shape[-1]), None
