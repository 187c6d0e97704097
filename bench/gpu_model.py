"""The part of bench.gpu that times a whole model."""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import gpu_rivals
from bench.gpu_kernels import DTYPE, Cells, Entry, cell, close
from bench.timing import Skip


def end_to_end(bench) -> Cells:
    """Steps of a model with random weights, all layers and the sampler; and whole `generate`s."""
    from bench.bench_end_to_end import CONFIGS, RIVALS

    for n, prompt in bench.scale.decoded:
        yield cell(f"decode {n} x {prompt}", decode, bench, n, prompt)
    n, prompt, new = bench.scale.generated
    for name in RIVALS:
        yield cell(f"generate {n} x {prompt}, {new} new, {name}", generate, bench,
                   CONFIGS.get(name), n, prompt, new)  # fmt: skip


@cache
def llm(device: str, sizes: tuple) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**dict(sizes)), dtype=DTYPE)
    model.generation_config.eos_token_id = None
    return model.eval()


def decode(bench, name: str, n: int, prompt: int) -> dict:
    from bench.bench_end_to_end import OURS, RIVALS, STEPS
    from kvtools.quality import elements

    model = llm(bench.device, tuple(bench.scale.model.items()))
    weights = sum(x.numel() for x in model.parameters())
    per_token = elements(model) * DTYPE.itemsize
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    plain, made = RIVALS["plain"](model, ids), {}
    expected = plain.next(ids[0])

    def make(contender: str) -> Callable[[], Any]:
        rival = plain
        if contender != "plain":
            rival = RIVALS[contender](model, ids)
            close(rival.next(ids[0]), expected, 0.05 if contender == OURS else 0.5)
        elif n * prompt * per_token > gpu_rivals.LIMIT:
            raise Skip(f"its cache would take {n * prompt * per_token / 2**30:.0f} GiB")
        made[contender] = partial(rival.rows(n), STEPS)
        return made[contender]

    entries = {}
    for contender in sorted(RIVALS, key=lambda x: x != OURS):
        entries[contender] = Entry(
            partial(make, contender), lambda out: None,
            weights * DTYPE.itemsize + (prompt + n * STEPS) * per_token, 2 * weights * n,
            package="transformers" if contender == "plain" else "", graph=False, per=STEPS,
        )  # fmt: skip
    rows = bench.race(name, entries)
    for contender, row in rows.items():
        if "ms" in row:
            row["tokens/s"] = 1e3 * n / row["ms"]
            row |= profiled(made[contender], STEPS)
    return rows


def profiled(run: Callable[[], Any], steps: int) -> dict:
    """Of a step: milliseconds of the host without its waits for the device, and with those of the
    profiler; of all kernels; and how many were launched."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
    kernels, launches, waits = 0.0, 0, 0.0
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            kernels += event.device_time_total
            launches += 1
        elif event.name.startswith("cuda") and event.name.endswith("Synchronize"):
            waits += event.cpu_time_total
    return {"host ms": (1e3 * seconds - waits / 1e3) / steps, "kernel ms": kernels / 1e3 / steps,
            "launches": launches / steps}  # fmt: skip


def generate(bench, name: str, config: Any, n: int, prompt: int, new: int) -> dict:
    from bench.cpu import once

    model = llm(bench.device, tuple(bench.scale.model.items()))
    ids = torch.randint(model.config.vocab_size, (prompt,)).tolist()
    once(model, ids[:16], config, n, 2)  # the first pass is slow, whoever makes it
    return once(model, ids, config, n, new)
