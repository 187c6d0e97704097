"""Faults that the tests must catch: each is planted in a copy of the tree, and its tests must fail.

python tests/faults.py [--only REGEX] [--jobs N]        or: make faults ARGS=...

Entry: what is wrong, the file, the text there and what stands in its place, tests that must turn
red. The text must occur once, so that an entry which no longer fits the code is an error, too; and
with no fault all these tests must pass in such a copy.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TREE = (
    "kvtools",
    "csrc",
    "tests",
    "bench",
    "docs",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "build",
)


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments


(
    DOOR, ATTENTION, QUANT, EVICT, SAMPLING, SCORING, CACHE, PREFILL, ROLLOUTS, DECODE, PRM, SEARCH,
    CLI, COMPILE, RECORDER, STEP, PREFIXES, TURNS, SAMPLES, LIKELIHOOD, SAVED, CONTINUATION,
    PARALLEL,
) = (
    f"tests/test_{name}.py -k "
    for name in ("door", "attention", "quant", "evict", "sampling", "scoring", "cache", "prefill",
                 "rollouts", "decode", "prm", "search", "cli", "compile", "recorder", "bench_step",
                 "prefixes", "turns", "samples", "likelihood", "saved", "continuation",
                 "parallel")
)  # fmt: skip
HYBRID = "tests/test_hybrid.py -k "
FAULTS = [
    Fault("a rewound row goes on from a state that has seen more", "kvtools/hf/states.py",
          "        return self._seen != lengths", "        return self._seen < 0",
          HYBRID + "'alone and lfm2'"),
    Fault("rows of all lengths go into states together", "kvtools/hf/door.py",
          "        if self.counted or self.recurrent:", "        if self.counted:",
          HYBRID + "'alone and lfm2'"),
    Fault("layers write to the states that rows have", "kvtools/hf/states.py",
          "            return x.index_select(0, index)", "            return x",
          HYBRID + "'peek or error'"),
    Fault("a transaction leaves states out", "kvtools/cache.py",
          "for x in (self._recent, self.states) if x]", "for x in (self._recent,) if x]",
          HYBRID + "'peek or error'"),
    Fault("a prefill begins with what the layers held", "kvtools/hf/plug.py",
          "            self._hold(begin)\n", "            if not forward.filling:\n"
          "                self._hold(begin)\n", HYBRID + "'left_in_layers'"),
    Fault("the probe believes that all go on with several tokens", "kvtools/hf/probe.py",
          "    singles = (False, True) if plain is not None else (True,)",
          "    singles = (False,)", HYBRID + "'alone and jamba'"),
    Fault("unseen models are believed to", "kvtools/hf/door.py",
          "    door.single = bool(stateful)\n", "", HYBRID + "unseen"),
    Fault("prompts' ends of all lengths share a forward", "kvtools/hf/session.py",
          "                fits &= (long == long[0]).cumprod().astype(bool)",
          "                pass",
          HYBRID + "'beginnings and lfm2'"),
    Fault("dropped rows keep their states", "kvtools/hf/states.py",
          "            if 2 * len(named) <= part.size:", "            if False:",
          HYBRID + "shared_until"),
    Fault("policies are shown the heads of one rank alone", "kvtools/hf/parallel.py",
          "if not policy.across or held == self.heads:", "if True:", PARALLEL + "one_does"),
    Fault("ranks take each other's parts of logits for others'", "kvtools/hf/parallel.py",
          "parts = got.split([mine * n for n in tokens])",
          "parts = got.split([mine * n for n in tokens])[::-1]", PARALLEL + "one_does"),
    Fault("ranks do not compare what they draw of", "kvtools/hf/parallel.py",
          '        self._same("seeds, positions or filters", every[:, -1])\n', "",
          PARALLEL + "one_does"),
    Fault("frequencies of the calls before are kept", "kvtools/hf/door.py",
          "        for module in self.dynamic:", "        for module in ():",
          DOOR + "'dynamic and alone'"),
    Fault("rows of all lengths share frequencies", "kvtools/hf/door.py",
          "        if not keys or not len(rows):", "        if True:",
          DOOR + "'rope and alone'"),
    Fault("a text that outgrows its frequencies is not encoded again", "kvtools/hf/door.py",
          "        return (counts > 0) & (self.past_switch(after) != switched)",
          "        return (counts > 0) & False", DOOR + "switch"),
    Fault("windows of masks are not seen", "kvtools/hf/plug.py",
          "        window = forward.door.mask_window(kwargs)", "        window = 0",
          DOOR + "'window or causal'"),
    Fault("padding is stored", "kvtools/hf/plug.py",
          "                    q, k, v = (x[:, forward.tokens] for x in (q, k, v))",
          "                    n = forward.kv._filling.length\n"
          "                    q, k, v = (x[:, :n] for x in (q, k, v))",
          PREFILL + "'one_forward or compressed'"),
    Fault("padding is seen", "kvtools/hf/session.py",
          "tokens, mask = torch.from_numpy(tokens).to(ids.device), mask.long()",
          "tokens, mask = torch.from_numpy(tokens), torch.ones_like(mask).long()",
          PREFILL + "'one_forward or compressed'"),
    Fault("prompts of all lengths share a forward", "kvtools/hf/session.py",
          "                least = (1 - PADDING) * width if self.door.masks else width",
          "                least = 0", PREFILL + "'bounded or share'"),
    Fault("turns run layers that share keys for last tokens alone", "kvtools/hf/session.py",
          "        shared = self.door.shared and longest > 1", "        shared = False",
          "tests/test_turns.py -k last_tokens_alone"),
    Fault("prompts that share a forward share a frame", "kvtools/cache.py",
          "        self.prompt = first + np.repeat(np.arange(len(lengths)), lengths)",
          "        self.prompt = first + np.repeat(0 * lengths, lengths)",
          PREFILL + "'together or compressed'"),
    Fault("positions are always believed in", "kvtools/hf/probe.py",
          "    for counted in [False, True] if door.positions else [True]:",
          "    for counted in [False]:", DOOR + "counted"),
    Fault("the probe believes everything", "kvtools/hf/probe.py",
          "    return int(wrong.min()) if len(wrong) else None", "    return None",
          DOOR + "probe"),
    Fault("lengths are part of a compiled graph", "kvtools/hf/session.py",
          "            forward.past = positions.max()\n", "", COMPILE + "any_rows"),
    Fault("the compiler may replay attention without the host", "kvtools/hf/plug.py",
          "    tags=(torch.Tag.cudagraph_unsafe,),\n", "", COMPILE + "told"),
    Fault("prompts come to the compiler", "kvtools/hf/session.py",
          "        run = self._runner if forward.filling or ids.shape[1] > 1 else self._decode",
          "        run = self._decode", COMPILE + "eagerly"),
    Fault("values smaller than keys", "kvtools/hf/plug.py",
          "[..., :d], None", "[..., :wide], None", DOOR + "smaller"),
    Fault("autocast is not seen", "kvtools/hf/plug.py",
          "    if autocast:", "    if False:",
          DOOR + "'autocast or mixed'"),
    Fault("masks are left out for all threads", "kvtools/hf/plug.py",
          "_here = threading.local()", "_here = type('Here', (), {})()",
          DOOR + "beside"),
    Fault("the first to leave unplugs", "kvtools/hf/plug.py",
          "                if uses > 1:", "                if False:", DOOR + "beside"),
    Fault("layers keep their cache alive", "kvtools/hf/plug.py",
          "        self.kv, self.door = kv, door\n", "        self._flow.cache = self\n"
          "        self.kv, self.door = kv, door\n", DOOR + "behind"),
    Fault("greedy draws a seed", "kvtools/hf/generate.py",
          "    if config.do_sample:\n        seeds", "    if True:\n        seeds",
          DOOR + "behind"),
    Fault("copies inside patch are of our class", "kvtools/hf/generate.py",
          "        if reduced[0] is copyreg.__newobj__:", "        if False:",
          DOOR + "inside_patch"),
    Fault("patches end in order only", "kvtools/hf/generate.py",
          "            del patches[next(i for i, x in enumerate(patches) if x is entry)]",
          "            patches.pop()", DOOR + "overlapping"),
    Fault("NaN wins a greedy step", "kvtools/hf/generate.py",
          "torch.where(best.isfinite(), chosen, -1)", "chosen",
          DOOR + "bad_logits"),
    Fault("no look at what could not be drawn", "kvtools/hf/generate.py",
          "            drawn(chosen.cpu(), step, active.cpu())\n", "",
          DOOR + "bad_logits"),
    Fault("another's attention function", "kvtools/hf/door.py",
          "        if (stock != \"eager\" and function is None) or not own:",
          "        if False:", DOOR + "refused"),
    Fault("own prepare_inputs_for_generation is not asked", "kvtools/hf/door.py",
          "            if not same:", "            if False:", DOOR + "refused"),
    Fault("windows of the cache are not seen", "kvtools/hf/door.py",
          "        if held and held != window:", "        if False:", DOOR + "refused"),
    Fault("Triton: off by one in the tail", "kvtools/kernels/attention.py",
          "tl.load(work.length + node))\n    lse_ptr",
          "tl.load(work.length + node)) - 1\n    lse_ptr",
          ATTENTION + "'equals_expanded and triton'"),
    Fault("Triton: wrong nibble", "kvtools/kernels/format.py",
          "shift = (tl.arange(0, 8 // BITS) * BITS)",
          "shift = ((8 // BITS - 1 - tl.arange(0, 8 // BITS)) * BITS)",
          ATTENTION + "'tree_attention_formats and triton'"),
    Fault("Triton: dropped merge term", "kvtools/kernels/attention.py",
          "    for start in range(begin, end, BLOCK_P):",
          "    for start in range(begin, tl.minimum(end, begin + BLOCK_P), BLOCK_P):",
          ATTENTION + "'merges_many_parts and triton'"),
    Fault("Triton: a scale on the wrong axis", "kvtools/kernels/attention.py",
          "x *= (k_scale * scale)[None, :]", "x *= (k_scale * scale)[:, None]",
          ATTENTION + "'tree_attention_formats and triton'"),
    Fault("Triton: accumulator not rescaled", "kvtools/kernels/attention.py",
          "dot(p.to(V_DTYPE), x_v[i], acc[i] * alpha[:, None])",
          "dot(p.to(V_DTYPE), x_v[i], acc[i])", ATTENTION + "'equals_expanded and triton'"),
    Fault("Triton: value scale not divided", "kvtools/kernels/attention.py",
          "        if V_FORMAT != 0:\n            x *= unit_v * unit(V_FORMAT, V_WORDS)\n", "",
          ATTENTION + "'tree_attention_formats and triton'"),
    Fault("Triton: halves of bytes swapped in a word", "kvtools/kernels/format.py",
          "element = word * 2 + field // HALF + field % HALF * (D // HALF)",
          "element = word * 2 + (1 - field // HALF) + field % HALF * (D // HALF)",
          ATTENTION + "'tree_attention_formats and triton'"),
    Fault("Triton: nibbles swapped by PTX", "kvtools/kernels/format.py",
          "4: ((4, 4), (0, 4), (-6, 2), (-6, 6)),", "4: ((0, 4), (4, 4), (-6, 2), (-6, 6)),",
          ATTENTION + "ptx"),
    Fault("Triton: scales of a slot swapped", "kvtools/kernels/format.py",
          "return k_scale.to(tl.float32), v_scale.to(tl.float32)",
          "return v_scale.to(tl.float32), k_scale.to(tl.float32)",
          ATTENTION + "'lie_does_not_show and triton'"),
    Fault("Triton: pages looked up one tile late", "kvtools/kernels/attention.py",
          "first + tl.minimum(slot, end - 1), live",
          "first + tl.maximum(tl.minimum(slot, end - 1) - BLOCK_N, begin), live",
          ATTENTION + "'equals_expanded and triton'"),
    Fault("Triton: padding of keys is multiplied", "kvtools/kernels/attention.py",
          "tile = tl.where((element < D)[None, :], tile, 0)", "pass",
          ATTENTION + "'tree_attention_formats and triton'"),
    Fault("Triton: slots behind the end are seen", "kvtools/kernels/attention.py",
          "page, head, offset, slot < end)[None, :]", "page, head, offset, live)[None, :]",
          ATTENTION + "'equals_expanded and triton'"),
    Fault("items are not the longest first", "csrc/host/plan.cpp",
          "return x != y ? x > y :", "return x != y ? x < y :",
          "tests/test_host.py -k is_cut"),
    Fault("Triton: what is nearly a tie goes up", "kvtools/kernels/quant.py",
          "over = tl.fma(tl.fma(r * r, CUBIC, 1 + 0.75 * CUBIC), r, -v)",
          "over = tl.fma(tl.fma(r * r, CUBIC, 1 + 0.75 * CUBIC), r, -v - 0.01)",
          QUANT + "'gives_the_codes and triton'"),
    Fault("Triton: history of a slot stays", "kvtools/kernels/quant.py",
          "            for word in range(WORDS):", "            for word in range(WORDS - 1):",
          QUANT + "'append_kv and triton'"),
    Fault("Triton: ties of victims go to the later", "kvtools/kernels/evict.py",
          "_precede(other, key, j[None, :] < i[:, None])",
          "_precede(other, key, j[None, :] > i[:, None])",
          EVICT + "'select_victims and triton'"),
    Fault("Triton: a candidate's neighbour's noise", "kvtools/kernels/sampling.py",
          "even, odd = tl.where(token % 4 == 0, w0, w2)",
          "even, odd = tl.where(token % 4 == 0, w2, w0)",
          SAMPLING + "'implementations_agree and triton'"),
    Fault("Triton: the third class is left out", "kvtools/kernels/scoring.py",
          "b += hidden * (third - first)[None, :]", "b += hidden * (second - first)[None, :]",
          SCORING + "'step_scores and triton'"),
    Fault("Triton: the last of an odd number of steps is left out", "kvtools/kernels/scoring.py",
          "[(triton.cdiv(s, STEPS),)]", "[(s // STEPS,)]", SCORING + "'step_scores and triton'"),
    Fault("Triton: a range is judged by a scale that is not stored", "kvtools/kernels/quant.py",
          "more = tl.fma(scale, inverse, -1.0)", "more = tl.fma(scale, inverse, 0.0)",
          QUANT + "'codes_of_the_reference and triton and int4'"),
    Fault("C++: dropped merge term", "csrc/cpu/attention.cpp",
          "        partial_.next[at] = first;",
          "        partial_.next[at] = first < 0 ? first : partial_.next[first];",
          ATTENTION + "'equals_expanded or splits_over'"),
    Fault("C++: scales side by side change places", "csrc/cpu/piece.h",
          "split_words(pages.k.scale.at(page, head, offset), count, k_scale + s, v_scale + s);",
          "split_words(pages.k.scale.at(page, head, offset), count, v_scale + s, k_scale + s);",
          ATTENTION + "'side_by_side and cpu'"),
    Fault("C++: sums of whole weights overflow", "csrc/cpu/packed.h",
          "INT32_MAX / kGreatest - kChunk;", "INT32_MAX / 2;",
          ATTENTION + "'of_values and cpu-avx512 and greatest'"),
    Fault("C++: weights of fp32 are rounded to 16 bits", "csrc/cpu/packed.h",
          "x = (x - f32(", "x = 0 * (x - f32(",
          ATTENTION + "'of_values and cpu-avx512 and uneven'"),
    Fault("C++: queries are rounded to 16 bits", "csrc/cpu/packed.h",
          "of[r][shift * kPieces + p]", "of[r][shift * kPieces + p] * (1 - p)",
          ATTENTION + "'of_values and cpu-avx512 and queries'"),
    Fault("C++: halves of a pair of a query's elements are alike", "csrc/cpu/packed.h",
          "_MM_PERM_DCDC", "_MM_PERM_DCBA", ATTENTION + "'formats and cpu-avx512'"),
    Fault("C++: of four slots the last two have the weights of the first", "csrc/cpu/packed.h",
          "0xff00, later", "0x0000, later", ATTENTION + "'formats and cpu-avx512'"),
    Fault("C++: older results stay where the greatest score moves", "csrc/cpu/piece.h",
          "store(shrink_ + v, exp2((old - base) * octave));", "store(shrink_ + v, splat(1));",
          ATTENTION + "'of_values and cpu and queries'"),
    Fault("C++: the first slot's position does not count", "csrc/cpu/piece.h",
          "for (int s = 0; pages.position.data", "for (int s = 1; pages.position.data",
          ATTENTION + "'stores_of_16_bits and cpu'"),
    Fault("C++: a border between levels is an integer", "csrc/cpu/quant.cpp",
          "t.border[i] = here ? border(below) : kInfinity;",
          "t.border[i] = here ? below : kInfinity;",
          "tests/test_quant.py -k 'codes_of_the_reference and cpu-avx512'"),
    Fault("C++: the halves of a pair of slots are swapped", "csrc/cpu/packed.h",
          "put(to, order), put(to + kLanes, later);", "put(to, later), put(to + kLanes, order);",
          ATTENTION + "'formats and cpu-avx512'"),
    Fault("CUDA: halves of a pair of codes swapped", "csrc/cuda/pieces.h",
          "byte ? x >> 6 : x << 2", "byte ? x << 2 : x >> 6", ATTENTION + "'pieces and int4'"),
    Fault("CUDA: a base that does not follow the peak", "csrc/cuda/pieces.h",
          "kMargin = 8;", "kMargin = 1000;", ATTENTION + "'pieces and int4'"),
    Fault("CUDA: a page is looked up one piece late", "csrc/cuda/pieces.h",
          "      if (offset_ == page_size(o, number)) offset_ = 0, ++table_;\n      look_up(o);",
          "      look_up(o);\n      if (offset_ == page_size(o, number)) offset_ = 0, ++table_;",
          ATTENTION + "'pieces and int4'"),
    Fault("CUDA: slots outside of an item are added", "csrc/cuda/attention_few.cu",
          "for (int w = j; w < L::kRow / 4; w += 4) row[w] = 0;", ";",
          ATTENTION + "'pieces and none'"),
    Fault("C++: sinks count in the mean", "csrc/cpu/evict.cpp",
          "if (s + j >= p.sinks) mean += e;", "mean += e;", EVICT + "'test_key_scores and cpu'"),
    Fault("C++: top-k keeps one more", "csrc/cpu/sampling.cpp",
          "const bool lower = greater < wanted;", "const bool lower = greater <= wanted;",
          SAMPLING + "'(test_sample or agree) and cpu'"),
    Fault("C++: a shared page counts once", "csrc/host/forest.cpp",
          "  if (upper.pages.size() > static_cast<size_t>(page)) ++refs_[lower.pages.front()];\n",
          "", "tests/test_host.py tests/test_host_random.py -k 'crop or operations'"),
    Fault("C++: rows with children grow in place", "csrc/host/forest.cpp",
          "if (node.sealed || node.rows != 1 || node.children > 0) return false;",
          "if (node.sealed || node.rows != 1) return false;",
          "tests/test_host.py tests/test_host_random.py -k 'append or crop or operations'"),
    Fault("planes of codes are not shifted", "kvtools/reference/quant.py",
          "codes | part << low", "codes | part", QUANT + "'planes or (budget and reference)'"),
    Fault("scales are those of the range", "kvtools/reference/quant.py",
          "scale = to_scale((x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True))",
          "scale = to_scale(step)", QUANT + "'gives_the_codes and cpu'"),
    Fault("codes hold a NaN as a number", "kvtools/reference/quant.py",
          "return codes, scale.masked_fill(~finite[..., 0], torch.nan)", "return codes, scale",
          QUANT + "'infinity and reference'"),
    Fault("the second place gets no frame", "kvtools/reference/quant.py",
          "k_thd = (k_thd.to(dtype) - center) * gain", "k_thd = k_thd.to(dtype) * gain",
          QUANT + "'append_kv and reference'"),
    Fault("older tokens are seen among the newest", "kvtools/reference/attention.py",
          "age.masked_fill(~newer if recent >> number & 1 else newer, -1)",
          "age.masked_fill(newer, -1) if not recent >> number & 1 else age",
          ATTENTION + "'stores and reference'"),
    Fault("values of one store are not turned back", "kvtools/reference/attention.py",
          'if v_format != "none":\n            out',
          'if number == 0 and v_format != "none":\n            out',
          ATTENTION + "'stores and reference'"),
    Fault("other stores count in the mean", "kvtools/reference/attention.py",
          "            mass_here.index_add_(0, index, weight)\n            seen",
          "            mass_here = mass\n            seen", ATTENTION + "'stores and reference'"),
    Fault("importance of a slot stays", "kvtools/reference/quant.py",
          "                    signal[where] = 0\n", "                    pass\n",
          QUANT + "'append_kv and reference'"),
    Fault("empty slots are the last victims", "kvtools/reference/evict.py",
          "rank = protected.to(torch.int8) - empty.to(torch.int8)",
          "rank = protected.to(torch.int8)", EVICT + "'select_victims and reference'"),
    Fault("sinks count in the mean", "kvtools/reference/evict.py",
          "mean = p[..., sinks:].sum(-1, keepdim=True) / seen",
          "mean = p.sum(-1, keepdim=True) / seen", EVICT + "'test_key_scores and reference'"),
    Fault("history does not move", "kvtools/reference/evict.py",
          "    for pages in (k, v, k_scale, v_scale, position, importance, history):",
          "    for pages in (k, v, k_scale, v_scale, position, importance):",
          EVICT + "'compact_kv and reference'"),
    Fault("the token that crosses top-p is left out", "kvtools/reference/sampling.py",
          "before_bk = own_bk.cumsum(-1) - own_bk", "before_bk = own_bk.cumsum(-1)",
          SAMPLING + "'transformers or (test_sample and reference)'"),
    Fault("filters split ties", "kvtools/reference/sampling.py",
          "kept_bv = z_bv >= floor_b.unsqueeze(1)",
          "kept_bv = z_bv > floor_b.unsqueeze(1)", SAMPLING + "'ties and reference'"),
    Fault("half of the seed is ignored", "kvtools/reference/sampling.py",
          "key = seed_b1 & LOW_WORD, (seed_b1 >> 32) & LOW_WORD",
          "key = seed_b1 & LOW_WORD, seed_b1 & LOW_WORD",
          SAMPLING + "'documented or (noise and reference)'"),
    Fault("two classes the wrong way round", "kvtools/reference/scoring.py",
          "margin_s = logits_sk[:, 0] - logits_sk[:, 1]",
          "margin_s = logits_sk[:, 1] - logits_sk[:, 0]", SCORING + "'step_scores and reference'"),
    Fault("a rollout without steps has its neighbour's score", "kvtools/reference/scoring.py",
          "last_r = torch.where(cu_steps.diff() > 0, cu_steps[1:] - 1, len(linked_s))",
          "last_r = cu_steps[1:] - 1", SCORING + "'step_scores and reference'"),
    Fault("parts of the vocabulary weigh the same in an entropy", "kvtools/reference/scoring.py",
          "old_t * entropy_t[rows] + new_t * own_t", "entropy_t[rows] + own_t",
          SCORING + "'entropies and reference'"),
    Fault("ignored tokens count", "kvtools/reference/scoring.py",
          "    logprob_t.masked_fill_(ignored_t, 0)\n", "",
          SCORING + "'token_logprobs and reference'"),
    Fault("victims are not noted", "kvtools/store.py",
          "        self.journal.note(pages, CONTENT, where)\n        return slot",
          "        return slot",
          CACHE + "undone"),
    Fault("positions that a crop empties are not noted", "kvtools/store.py",
          '            self.journal.note(pages, ("position",), where)\n', "", CACHE + "undone"),
    Fault("signals are not noted", "kvtools/cache.py",
          "        self._journal.note(pages, SIGNALS)\n", "", CACHE + "undone"),
    Fault("recent tokens are not noted", "kvtools/recent.py",
          "        self.journal.note(pages, CONTENT[:4], where)\n", "", CACHE + "undone"),
    Fault("a second step is not noted", "kvtools/transaction.py",
          "again = any(x.stepped for x in self.open)", "again = False", CACHE + "undone"),
    Fault("lengths stay where pages do", "kvtools/store.py",
          "            np.add.at(length, leaf[leaf >= 0], grow[leaf >= 0])", "            pass",
          ROLLOUTS + "greedy"),
    Fault("the ring without its slot more", "kvtools/recent.py",
          "self.size, self.slots, self.journal = size, size + 1, journal",
          "self.size, self.slots, self.journal = size, size, journal", CACHE + "undone"),
    Fault("oldest changes are undone first", "kvtools/transaction.py",
          "in reversed(self.overwritten):", "in self.overwritten:", CACHE + "undone"),
    Fault("no recovery", "kvtools/transaction.py",
          "        else:\n            self.undo()", "        else:\n            self.close()",
          CACHE + "midway"),
    Fault("copies of rows with a budget share tokens", "kvtools/store.py",
          "copy = self.budget is not None", "copy = False", CACHE + "'evict or forked'"),
    Fault("the newest tokens are not protected", "kvtools/cache.py",
          "protect_from_n=now - recent", "protect_from_n=now",
          CACHE + "'prompt or protected'"),
    Fault("copies of a row draw the same", "kvtools/rollouts.py",
          "            seeds[copies] = row_seeds(self._seed, len(copies), self._seeded)\n", "",
          ROLLOUTS + "diverge"),
    Fault("a cut row stays finished", "kvtools/rollouts.py",
          "finished=self.finished & ~cut", "finished=self.finished", ROLLOUTS + "revives"),
    Fault("what the states do not hold is undone in tensors of now", "kvtools/transaction.py",
          "            if x is written or (x is not None and id(part) not in kept):",
          "            if x is not None:", ROLLOUTS + "'changes_nothing and ring'"),
    Fault("more of a prompt is evicted as a row's own", "kvtools/store.py",
          "            prompt\n            or self.budget is None\n",
          "            self.budget is None\n",
          PREFIXES + "'compressed or go_on'"),
    Fault("more of a prompt is a row's own", "kvtools/store.py",
          "slot_t = self.forest.append(grow, seal)", "slot_t = self.forest.append(grow)",
          PREFIXES + "'compressed or only_what'"),
    Fault("all prompts part at the same place", "kvtools/hf/prefixes.py",
          "end = min(shared[first : last - 1], default=len(prompts[order[first]]))",
          "end = max(shared[first : last - 1], default=len(prompts[order[first]]))",
          PREFIXES + "'branches or plain'"),
    Fault("prompts part where lengths count", "kvtools/hf/door.py",
          "        return self.counted or self.single or bool(np.any(changed))",
          "        return False",
          PREFIXES + "apart"),
    Fault("a prompt budget sees a stretch alone", "kvtools/hf/session.py",
          "apart = self._config.prompt_budget not in (None, 1.0) or ", "apart = ",
          PREFIXES + "apart"),
    Fault("rows of a branch stay where they were", "kvtools/hf/session.py",
          "                    index[row[x.prompts]] = row[x.prompts[0]]",
          "                    pass",
          PREFIXES + "plain"),
    Fault("a text's first token is judged by its second place", "kvtools/hf/session.py",
          "texts[i][0] for i in first]", "texts[i][-1] for i in first]",
          LIKELIHOOD + "itself"),
    Fault("an entropy is the difference of large numbers", "kvtools/hf/heads.py",
          "-p_tv.mul_(logp_tv).sum(-1)", "logits_tv.logsumexp(-1) - p_tv.mul_(logits_tv).sum(-1)",
          LIKELIHOOD + "near_to_the_truth"),
    Fault("a head is believed to look at hidden states alone", "kvtools/hf/heads.py",
          "            if torch.allclose(", "            if True or torch.allclose(",
          LIKELIHOOD + "cannot"),
    Fault("what comes after a product is not seen", "kvtools/hf/heads.py",
          "logits is self.out and not self.out._version", "True",
          LIKELIHOOD + "product_is_last"),
    Fault("logits that are written to are taken for a product", "kvtools/hf/heads.py",
          " and not self.out._version", "", LIKELIHOOD + "product_is_last"),
    Fault("a head's hooks are forgotten", "kvtools/hf/heads.py",
          '"forward" in vars(last) or last._forward_hooks or', '"forward" in vars(last) or',
          LIKELIHOOD + "product_is_last"),
    Fault("a head is taken for a product, unseen", "kvtools/hf/heads.py",
          "return found if self._door.product else None", "return found",
          LIKELIHOOD + "looks_like"),
    Fault("hooks around all modules are forgotten", "kvtools/hf/heads.py",
          "torch.nn.modules.module._has_any_global_hook() or ", "",
          LIKELIHOOD + "around_all"),
    Fault("logits of all tokens are made at once", "kvtools/hf/session.py",
          "zip(x.split(piece), target.split(piece), strict=True)", "[(x, target)]",
          LIKELIHOOD + "few_tokens"),
    Fault("rows that come with a cache feed their last token twice", "kvtools/hf/generate.py",
          "[text(row)[: end + 1] for row", "[text(row)[:end] for row", CONTINUATION + "lengths"),
    Fault("a cache can be taken twice", "kvtools/rollouts.py",
          "        cache.texts = None\n", "", CONTINUATION + "gone_on"),
    Fault("a file has all pages of a pool", "kvtools/store.py",
          "used, page = np.unique(page, return_inverse=True)",
          "used = np.arange(self.forest.num_pages)", SAVED + "goes_on_as"),
    Fault("victims that were chosen are forgotten in a file", "kvtools/store.py",
          'parts["victims"] = self.victims.cpu()', "pass", SAVED + "goes_on_as"),
    Fault("a file does not know windows", "kvtools/hf/saved.py",
          "    door.windows = windows | door.windows\n", "",
          SAVED + "generate_goes_on"),
    Fault("a file's forest is believed in", "csrc/host/forest.cpp",
          "hold(x >= 0 && x < this->num_pages(), \"page of node\", id);", "",
          "tests/test_host.py -k table"),
    Fault("options are read after a cache is taken", "kvtools/rollouts.py",
          "        check_filters(**self.filters)\n", "", CONTINUATION + "before_a_cache"),
    Fault("a cache that failed half-way is believed", "kvtools/hf/generate.py",
          "    session.cache.texts = None  #", "    pass  #", CONTINUATION + "used_up"),
    Fault("adapters that are off are in a file's model", "kvtools/hf/saved.py",
          "off = part.disable_adapters and not merged", "off = False", SAVED + "adapters"),
    Fault("weights of a cache in a file may be any", "kvtools/hf/saved.py",
          "            found.update(some.view(torch.uint8).numpy().tobytes())", "            pass",
          SAVED + "cannot_be_loaded"),
    Fault("rows that wait are in the cache", "kvtools/hf/generate.py",
          "first = 0 if keeps or most == rows else len(prompts)", "first = 0", SAMPLES + "bound"),
    Fault("rows of a wave go on from the first ones' prompts", "kvtools/hf/generate.py",
          "session.kv.gather([*range(first), *row_prompt[wave]])",
          "session.kv.gather([*range(first), *row_prompt[: len(wave)]])", SAMPLES + "waves"),
    Fault("scores of a wave hide those before", "kvtools/hf/generate.py",
          "    kept[step][active] = x_av\n    return kept",
          "    return (*kept[:step], _spread(x_av, active, rows, pad), *kept[step + 1 :])",
          SAMPLES + "asked_for"),
    Fault("texts pass a switch in one piece", "kvtools/hf/session.py",
          "                width = self.door.at_once(self.kv.lengths.numpy()[rows[live]], width)\n",
          "",
          TURNS + "middle_of_a_text"),
    Fault("appended tokens are judged without the row's temperature", "kvtools/rollouts.py",
          'temperature = self.filters["temperature"] or 1.0', "temperature = 1.0",
          TURNS + "random"),
    Fault("rows that finished stay so when they are given tokens", "kvtools/rollouts.py",
          "ready[row], finished[row] = None, False", "ready[row] = None", TURNS + "finished"),
    Fault("logits of before follow what was appended", "kvtools/rollouts.py",
          "ready[row], finished[row] = None, False", "finished[row] = False", TURNS + "row_by_row"),
    Fault("samples have the seeds of their rows", "kvtools/samples.py",
          "            r.seeds[fresh:] = [self.seeds[job] for job in new]\n", "            pass\n",
          SAMPLES + "whatever"),
    Fault("free rows wait", "kvtools/samples.py",
          "min(len(self.jobs), self.most - len(self.live))", "len(self.jobs) * (not self.live)",
          SAMPLES + "refilled"),
    Fault("prompts come one after the other", "kvtools/samples.py",
          "self.jobs = [job for turn in turns for job in turn if job is not None][::-1]",
          "self.jobs = sorted(x for turn in turns for x in turn if x is not None)[::-1]",
          SAMPLES + "turns"),
    Fault("a run that goes on draws all again", "kvtools/cli/sample.py",
          '        skip.add((i, record.get("number")))\n', "", CLI + "sample_goes_on"),
    Fault("a peek is kept", "kvtools/rollouts.py",
          "            change.undo()\n            self._commit()", "            self._commit()",
          ROLLOUTS + "peek"),
    Fault("rows that hold other texts share what comes", "kvtools/prm/session.py",
          "same.setdefault((job.keep, *job.ids[: job.keep]), [])",
          "same.setdefault(job.keep, [])", PRM + "by_all"),
    Fault("rows do not take what is run for several", "kvtools/prm/session.py",
          "                alike[rows] = job.row", "                pass", PRM + "begin_alike"),
    Fault("one token too many is kept", "kvtools/prm/session.py",
          "keep = min(old.held, _agree(old.ids, new.ids) - self._lag, need)",
          "keep = min(old.held, _agree(old.ids, new.ids) + 1 - self._lag, need)",
          PRM + "'moving or merged or growing'"),
    Fault("the target's row of the head is not turned round", "kvtools/prm/heads.py",
          "return margin_s * self.sign", "return margin_s", PRM + "redundancy"),
    Fault("control tokens in a step are control tokens", "kvtools/prm/layouts.py",
          "            text = text.replace(control, chr(HIDDEN + i))\n", "            pass\n",
          PRM + "control"),
    Fault("beam: of equal scores the first is kept", "kvtools/search/trees.py",
          'best = np.argsort([values[i] for i in live], kind="stable")[-width:]',
          'best = np.argsort([-values[i] for i in live], kind="stable")[:width]',
          SEARCH + "beam"),
    Fault("REBASE: shares are rounded down", "kvtools/search/trees.py",
          "math.ceil(width * weight / rest)", "math.floor(width * weight / rest)",
          SEARCH + "rebase"),
    Fault("weights multiply up after a draw", "kvtools/search/particles.py",
          "                c.log_weight = 0.0\n", "                pass\n",
          SEARCH + "'particle or evidence'"),
    Fault("the reference is resampled", "kvtools/search/particles.py",
          "rows, _ = particles.sweep(particles.restart(rows), n - 1)",
          "rows, _ = particles.sweep(particles.restart(rows), n)", SEARCH + "gibbs"),
    Fault("wrong use and failure have one exit code", "kvtools/cli/__init__.py",
          "return 2 if isinstance(error, Usage) else 1", "return 1", CLI + "'wrong or model'"),
    Fault("code that merely comes before counts as a loop", "bench/sass.py",
          "            if dominators[n] >> head & 1:", "            if True:",
          "tests/test_bench_model.py -k loop"),
    Fault("a branch that nothing decides is taken", "bench/sass.py",
          "                if not live:", "                if live is False:",
          "tests/test_bench_model.py -k lane"),
    Fault("fp32 products are NVIDIA's on AMD, too", "kvtools/kernels/format.py",
          'input_precision="tf32x3" if is_cuda() else "ieee"', 'input_precision="tf32x3"',
          "tests/test_bench.py -k test_resources"),
    Fault("nobody waits for copies", "bench/model.py",
          "            while len(warp.groups) > left:", "            while False:",
          "tests/test_bench_model.py -k awaited"),
    Fault("pipes of a scheduler have no end", "bench/model.py",
          "            free[pipe, warp.scheduler] = now + spent",
          "            free[pipe, warp.scheduler] = now", "tests/test_bench_model.py -k played"),
    Fault("a graph is replayed though what it read lies elsewhere", "kvtools/hf/decode.py",
          "        if step.addresses != addresses:", "        if not step.addresses:",
          DECODE + "'pools or moves'"),
    Fault("a model that changed is replayed", "kvtools/hf/decode.py",
          "        if model != self._model:", "        if False:", DECODE + "changes"),
    Fault("stop tokens are not seen on the device", "kvtools/hf/decode.py",
          "skip_t | (drawn[:, None] == self._stops).any(1)", "skip_t",
          DECODE + "'test_rollouts or until'"),
    Fault("rows that stand still write", "kvtools/store.py",
          "            first.slots = torch.where(skip, -1, first.slots)", "            pass",
          DECODE + "until"),
    Fault("rows that stand still note", "kvtools/store.py",
          '            tensors["own"] = torch.where(skip_t[first.long()], 0, self.own)',
          "            pass", DECODE + "until"),
    Fault("what a pass took back is looked up where it was", "kvtools/store.py",
          "        self.forest.crop(self.forest.lengths() - grown)\n        self._in_table = None",
          "        self.forest.crop(self.forest.lengths() - grown)", DECODE + "gives_back"),
    Fault("victims are chosen before it is known who stopped", "kvtools/rollouts.py",
          "            if len(rows) and not (before and self.kv.selects(counts)):",
          "            if len(rows):", DECODE + "rows_that_evict"),
    Fault("a boolean index is recorded", "kvtools/testing.py",
          "x.dtype in (torch.bool, torch.uint8) for x in args[1]", "False for x in args[1]",
          RECORDER + "refused"),
    Fault("what others hold is taken for the step's own", "kvtools/testing.py",
          "        if storage._cdata in self._own:", "        if True:", RECORDER + "elsewhere"),
    Fault("an upload is not counted", "bench/step_worker.py",
          "            self.uploads[line()] += 1\n", "            pass\n", STEP + "crosses"),
]  # fmt: skip


def copy(tree: Path) -> None:
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True)
        elif source.exists():
            shutil.copy2(source, tree / name)


def plant(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its text occurs {text.count(fault.old)} times in {path}")
    path.write_text(text.replace(fault.old, fault.new))


def part_of(fault: Fault) -> str:
    """What is compiled for it: nothing, the extension, or that with csrc/cuda for this CPU."""
    return "host" if "csrc/cuda" in fault.file else fault.file.partition("/")[0]


def run(tests: str, tree: Path, *, part: str = "") -> tuple[bool, str]:
    """Whether the tests pass, and what pytest says. It is an error if there are none."""
    place = tree / "build/host/lib" if part == "host" else tree  # as make host
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    build = {
        "csrc": ["build_ext", "--inplace"],
        "host": ["build", "--build-base", "build/host", "--build-lib", "build/host/lib"],
    }
    if part in build:
        env["KVTOOLS_CUDA"] = "host" if part == "host" else os.environ.get("KVTOOLS_CUDA", "auto")
        command = [sys.executable, "setup.py", "-q", *build[part]]
        subprocess.run(command, cwd=tree, check=True, capture_output=True, env=env)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    file, *options = shlex.split(tests)
    done = subprocess.run(
        [*command, f"--rootdir={tree}", tree / file, *options],
        cwd=place, capture_output=True, text=True, env=env,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0, done.stdout[-2000:]


def check(faults: list[Fault]) -> None:
    """Every entry fits the code, and its tests pass without it."""
    wanted = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy(tree)
        for fault in faults:
            original = (tree / fault.file).read_text()
            plant(fault, tree)
            (tree / fault.file).write_text(original)
            files, _, cases = fault.tests.partition(" -k ")
            part = part_of(fault)
            wanted[files, part if part == "host" else ""].add(" ".join(shlex.split(cases)))
        for (files, part), cases in wanted.items():
            cases = shlex.quote(" or ".join(f"({x})" for x in sorted(cases)))
            passed, said = run(f"{files} -k {cases}", tree, part=part)
            if not passed:
                raise SystemExit(f"{files} fails without a fault\n{said}")


def caught(fault: Fault) -> tuple[bool, float]:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy(tree)
        plant(fault, tree)
        passed, _ = run(fault.tests, tree, part=part_of(fault))
    return not passed, time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file matches")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    options = parser.parse_args()
    chosen = [x for x in FAULTS if re.search(options.only, f"{x.name} {x.file}")]
    check(chosen)
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for i, (red, seconds) in enumerate(pool.map(caught, chosen)):
            missed += not red
            state = "caught" if red else "MISSED"
            said = f"[{i + 1}/{len(chosen)}] {state}: {chosen[i].name} ({seconds:.0f} s)"
            print(said, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
