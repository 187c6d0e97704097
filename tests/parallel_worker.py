"""One of the ranks of tests/test_parallel.py: runs cases, one after another, on models that lie on
all ranks and on whole ones, and writes what failed.

A case is called with what it may need, a `Rank`. All ranks run it at once.
"""

import copy
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.distributed import DistributedConfig

import kvtools
from kvtools import CacheConfig, Rollouts, prm
from kvtools.hf import Unsupported, load_cache, save_cache

NEW = 12
PROMPTS = [list(range(3, 40)), [*range(3, 20), *range(90, 110)], list(range(120, 160))]
EVICTS = dict(bits=8, budget=12, prompt_budget=24, recent=4, sinks=2)


@dataclass
class Rank:
    folder: Path
    number: int

    def load(self, name, **options):
        return AutoModelForCausalLM.from_pretrained(self.folder / name, **options).eval()

    def pair(self, name):
        """A whole model, and one that lies on all ranks."""
        return self.load(name), self.load(name, tp_plan="auto")

    @cached_property
    def llama(self):
        return self.pair("llama")


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
    return dict(input_ids=ids, attention_mask=mask)


def generated(model, config=None, seed=0, **options):
    torch.manual_seed(seed)
    return model.generate(
        **padded(PROMPTS), max_new_tokens=NEW, return_dict_in_generate=True,
        custom_generate=kvtools.generate, kv_config=config, **options,
    )  # fmt: skip


def played(model, config=None, **options):
    """Rows that are sampled, forked, given tokens, cropped and sampled again."""
    r = Rollouts(model, config, seed=3, **options)
    r.prefill(PROMPTS, n=2)
    r.generate(NEW)
    r.fork(1, 2)
    r.append([[5, 6, 7], [9]], [0, 7], logprobs=True)
    r.generate(4, until=lambda new: new[-1] % 3 == 0)
    if r.kv.config.exact:
        r.crop([len(x) - 2 for x in r.tokens])
    r.generate(NEW)
    return r


def same_rows(whole, part):
    assert whole.tokens == part.tokens
    near = 1e-4 if whole.kv.config.exact else 0.05  # a sum's last bit may be another code
    for a, b in zip(whole.logprobs, part.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=near, rtol=near)


def holds(rank, whole, part, share=2):
    """A rank holds its own heads, and nothing of the others'."""
    a, b = whole.memory(), part.memory()
    for name in ("prefix", "suffix"):
        assert a[name] == share * b[name], (name, a, b)
    assert a["total"] > 0.95 * share * b["total"], (a, b)
    for row in range(whole.rows):
        heads = whole.kept(1, row)
        each = len(heads) // share
        first = rank.number * each if share > 1 else 0
        assert heads[first : first + each] == part.kept(1, row)


def architecture(name, share=2):
    def case(rank):
        whole, part = rank.llama if name == "llama" else rank.pair(name)
        a, b = (generated(x, do_sample=False) for x in (whole, part))
        assert torch.equal(a.sequences, b.sequences), (a.sequences, b.sequences)
        holds(rank, a[kvtools.hf.CACHE].kv, b[kvtools.hf.CACHE].kv, share)
        balanced = CacheConfig.preset("balanced")
        a, b = (played(x, balanced, top_p=0.9) for x in (whole, part))
        same_rows(a, b)
        holds(rank, a.kv, b.kv, share)

    return case


def raises(kind, words, call, *args, **options):
    try:
        call(*args, **options)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{kind.__name__} with {words!r} was not raised")


def eviction(rank):
    """Policies that look at one head, at all of them, and at which they are."""
    evicts(rank, "scissorhands", "tova")


def evicts(rank, *policies):
    for policy in policies:
        config = CacheConfig(**EVICTS, policy=policy)
        a, b = (played(x, config) for x in rank.llama)
        same_rows(a, b)
        holds(rank, a.kv, b.kv)


def own_generators(rank):
    """Seeds are the first rank's; processors and scores see whole rows."""
    whole, part = rank.llama
    for options in (dict(top_k=20), dict(repetition_penalty=1.3, output_scores=True)):
        a = generated(whole, seed=7, do_sample=True, num_return_sequences=2, **options)
        b = generated(part, seed=7 + rank.number, do_sample=True, num_return_sequences=2, **options)
        assert torch.equal(a.sequences, b.sequences)
        for x, y in zip(a.scores or (), b.scores or (), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    with kvtools.patch(part):
        out = part.generate(**padded(PROMPTS), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, generated(whole, do_sample=False).sequences)


def own_logits(rank):
    """A rank makes those of its tokens alone; who looks at them is shown all."""
    seen = []

    def processor(tokens, logits):
        seen.append(logits.shape[1])
        return logits / 2

    found = []
    for model, width in zip(rank.llama, (256, 128), strict=True):
        r = Rollouts(model, temperature=0.0, processor=processor)
        r.prefill(PROMPTS)
        assert {len(x) for x in r._first} == {width}
        r.generate(NEW)
        found.append((r.tokens, r.peek([7, 8], [2, 0, 1])))
    assert set(seen) == {256} and found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    greedy = [Rollouts(x, temperature=0.0) for x in rank.llama]
    for r in greedy:
        r.prefill(PROMPTS[:1])  # one row: the second rank has none to draw for
        r.generate(NEW)
    same_rows(*greedy)


class Late(StoppingCriteria):
    """Ends rows by what is another on each rank, as clocks are."""

    def __init__(self, steps):
        self.length = max(map(len, PROMPTS)) + steps

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def own_clocks(rank):
    _, part = rank.llama
    out = generated(part, do_sample=False, stopping_criteria=[Late(4 + 3 * rank.number)])
    assert out.sequences.shape[1] == max(map(len, PROMPTS)) + 4
    r = Rollouts(part)
    seconds = 0 if rank.number == 0 else 600
    found = list(r.sample(PROMPTS, 2, max_new_tokens=NEW, max_seconds=seconds))
    assert {x.why for x in found} == {"budget"}


def other_calls(rank):
    """Ranks that are called otherwise say so, all of them, and go on."""
    whole, part = rank.llama
    other = [x[rank.number :] for x in PROMPTS]
    raises(RuntimeError, "different tokens or rows", Rollouts(part).prefill, other)
    config = CacheConfig(bits=8 if rank.number else 4)
    raises(RuntimeError, "different cache options", Rollouts, part, config)
    raises(RuntimeError, "different options of generate", generated, part,
           do_sample=bool(rank.number))  # fmt: skip
    r = Rollouts(part, seed=rank.number)
    r.prefill(PROMPTS)
    raises(RuntimeError, "different seeds", r.step)
    r.seeds[:] = [4, 5, 6]
    raises(RuntimeError, "different rows to grow", r.generate, [3, 3, rank.number])
    one = Rollouts(whole)
    one.prefill(PROMPTS)
    one.seeds[:] = [4, 5, 6]
    assert r.generate(3) == one.generate(3)
    r.gather([0, 1 + rank.number])
    raises(RuntimeError, "different tokens or rows", r.step)
    alike = Rollouts(part)
    alike.prefill(PROMPTS[:1], n=3)
    alike.gather([0, 1 + rank.number])  # other rows, of the same tokens
    alike.seeds[:] = [1, 2]
    alike.step()
    raises(RuntimeError, "different tokens or rows", alike.step)


def likelihoods(rank):
    completions = [[[5, 6, 7], [8]], [], [list(range(30))]]
    a, b = (kvtools.logprobs(x, PROMPTS, completions) for x in rank.llama)
    for x, y in zip(a.logprobs + a.entropies, b.logprobs + b.entropies, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def rewards(rank):
    tokenizer = AutoTokenizer.from_pretrained(rank.folder / "prm")
    whole, part = rank.pair("prm")
    solutions = [["Step 1: 5 + 7 = 12.", "The answer is 12!"], ["So 13"]]
    a, b = (
        prm.load(x, tokenizer, "versa").score("Tom has 5 coins and gets 7 more.", solutions)
        for x in (whole, part)
    )
    for x, y in zip(a.margins, b.margins, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    raises(ValueError, "whole vocabulary, of which each rank", prm.load, part, tokenizer,
           "implicit", reference=whole)  # fmt: skip


def refusals(rank):
    _, part = rank.llama
    raises(Unsupported, "its 1 KV heads cannot be shared out among 2", Rollouts,
           rank.load("one head", tp_plan="auto"))  # fmt: skip
    raises(Unsupported, "colwise_gather_output", kvtools.logprobs,
           rank.load("llama", tp_plan={"lm_head": "colwise"}), [], [])  # fmt: skip
    cache = generated(part)[kvtools.hf.CACHE]
    path = rank.folder / "cache.safetensors"
    raises(ValueError, "lies on 2 ranks", save_cache, part, cache, path)
    raises(ValueError, "lies on 2 ranks", load_cache, part, path)
    part.config.distributed_config.pp_size = 2  # as if it had been loaded so
    try:
        raises(Unsupported, "pipeline", Rollouts, copy.copy(part))
    finally:
        part.config.distributed_config.pp_size = 1


def example(rank):
    path = Path(kvtools.__file__).parent.parent / "docs" / "examples" / "tensor_parallel.py"
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokens, memory = module.main(rank.folder / "prm", n=2, tokens=NEW)
    whole = Rollouts(rank.load("prm"), CacheConfig.preset("balanced"), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(rank.folder / "prm")
    whole.prefill([tokenizer.encode(module.PROMPT)], n=2)
    assert whole.generate(NEW) == tokens
    assert whole.kv.memory()["prefix"] == 2 * memory["prefix"]


def other_policies(rank):
    evicts(rank, "random", lambda c: c.mass_nhs - c.mass_nhs.mean(1, keepdim=True))


def layouts(rank):
    """Ways to lay a model out that are not transformers' plan."""
    whole, part = rank.llama
    same_rows(played(whole), played(torch.compile(part, backend="eager", dynamic=True)))
    colwise, rowwise = ColwiseParallel(), RowwiseParallel()
    plan = {f"model.layers.*.self_attn.{x}_proj": colwise for x in "qkv"}
    plan |= {f"model.layers.*.mlp.{x}_proj": colwise for x in ("gate", "up")}
    plan |= {"model.layers.*.self_attn.o_proj": rowwise, "model.layers.*.mlp.down_proj": rowwise}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    same_rows(played(whole), played(parallelize_module(rank.load("llama"), mesh, plan)))
    sharded = rank.load("llama")
    for layer in sharded.model.layers:
        fully_shard(layer)
    same_rows(played(whole), played(fully_shard(sharded)))
    other = [x[rank.number :] for x in PROMPTS]
    raises(RuntimeError, "load a whole model there", Rollouts(sharded).prefill, other)


def experts(rank):
    """Expert parallel, on the ranks that share out attention too."""
    config = DistributedConfig(tp_size=2, ep_size=2)
    part = rank.load("mixtral", distributed_config=config)
    same_rows(played(rank.load("mixtral")), played(part))


CASES = {name: architecture(name) for name in ("llama", "qwen3", "gemma3", "mixtral")}
OTHERS = [
    own_logits, eviction, own_generators, own_clocks, other_calls, likelihoods, rewards, refusals,
    example,
]  # fmt: skip
CASES |= {x.__name__.replace("_", " "): x for x in OTHERS}
LONG = {"gptoss": architecture("gptoss", share=1), "layouts": layouts}
LONG |= {"other policies": other_policies}
if hasattr(DistributedConfig, "ep_size"):  # and vocabularies that do not divide: 5.24, not 5.17
    LONG |= {"odd": architecture("odd"), "experts": experts}


def main(folder, number, size, *names):
    os.environ |= dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=size)
    warnings.simplefilter("ignore", FutureWarning)  # tp_plan= is deprecated in 5.24, not in 5.17
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, rank, failed = Path(folder), int(number), None
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=int(size),
        timeout=timedelta(seconds=180),
    )  # fmt: skip
    given = Rank(folder, rank)
    for name in names:
        begin = time.perf_counter()
        try:
            (CASES | LONG)[name](given)
        except BaseException:
            failed = f"{name}, rank {number}: {traceback.format_exc()}"
            break  # the other ranks wait for this one: the end of the process tells them
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    (folder / f"failed{number}.json").write_text(json.dumps(failed))
    if failed is None:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(failed is not None)


if __name__ == "__main__":
    main(*sys.argv[1:])
