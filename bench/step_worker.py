"""What bench.step measures of one build of kvtools, the first on PYTHONPATH.

Run by its path. It imports nothing of `bench`, so that it measures builds of other commits, too.
Each line of its input is the name of a method of `Build` and its arguments, as JSON; it answers
each by a line.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache

import kvtools
import kvtools.cache
from kvtools import CacheConfig, Rollouts, ops
from kvtools.hf import CACHE

SAMPLING = {"temperature": 0.8, "top_k": 50}
VOCAB, WIDTH, PROMPT = 512, 64, 64
POOL = 1024  # pages, more than any run takes


def config_of(name: str, **options: Any) -> CacheConfig:
    return CacheConfig(**options) if name == "16-bit" else CacheConfig.preset(name, **options)


def model_of(layers: int, dtype: str = "float32") -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt() -> list[int]:
    return torch.randint(1, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


def rollouts_of(
    model: Any, name: str, rows: int, pages: int | None = None, **options: Any
) -> Rollouts:
    rollouts = Rollouts(
        model, config_of(name, **options), eos_token_id=(), probe=False, pages=pages, **SAMPLING
    )
    rollouts.prefill([prompt()], rows)
    return rollouts


class Build:
    """Methods give what is JSON; seconds and counts are per step."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.runs: dict[str, Rollouts] = {}

    def where(self) -> str:
        return str(Path(kvtools.__file__).parent.parent)

    def model(self, layers: int) -> Any:
        if layers not in self.models:
            self.models[layers] = model_of(layers)
        return self.models[layers]

    def operators(self, name: str, dtype: str, layers: list[int], steps: int) -> dict:
        """Calls of operators in a layer and in a step besides, of kvtools ("ours") and of the model
        with its own cache, by kind; and those of each operator that is no view. Two models tell
        layers from the rest."""
        found = []
        for n in layers:
            model = model_of(n, dtype)
            rollouts = rollouts_of(model, name, 4)
            rollouts.generate(2)
            found.append({
                "ours": counted(partial(rollouts.generate, steps), steps),
                "model": counted(partial(plain(model, 4), steps), steps),
            })  # fmt: skip
        few, many = found
        result: dict[str, dict] = {"layer": {"names": {}}, "step": {"names": {}}}
        for whose in few:
            for key in few[whose] | many[whose]:
                one, other = few[whose][key], many[whose][key]
                layer = (other - one) / (layers[1] - layers[0])
                for where, n in (("layer", layer), ("step", one - layers[0] * layer)):
                    kinds = result[where].setdefault(whose, dict.fromkeys(KINDS, 0))
                    kinds[key[0]] += n
                    if key[0] != "views":
                        result[where]["names"].setdefault(whose, {})[key[1]] = n
        return result

    def start(self, name: str, layers: int, rows: int, own: int) -> None:
        """Rows with `own` tokens of their own, for `round`."""
        self.runs[name] = rollouts_of(self.model(layers), name, rows)
        self.runs[name].generate(own)

    def round(self, name: str, layers: int, rows: int, steps: int) -> dict:
        """Seconds of a step of `Rollouts.generate`, of kvtools' operators in it, and of the model's
        forward of as many tokens without context."""
        forward, call, ops_s = self._forward(layers, rows, steps), ops.Op.__call__, 0.0

        def clocked(op: Any, *args: Any) -> Any:
            nonlocal ops_s
            begin = time.process_time()
            out = call(op, *args)
            ops_s += time.process_time() - begin
            return out

        with mock.patch.object(ops.Op, "__call__", clocked):
            step = timed(partial(self.runs[name].generate, steps), steps)
        return {"forward": forward, "step": step, "operators": ops_s / steps}

    def generate(self, name: str, layers: int, rows: int, new: int) -> dict:
        """The same of a step of `kvtools.generate`: what more a call takes for `new` tokens than
        for one."""
        model = self.model(layers)
        loop = partial(kvtools.generate, kv_config=config_of(name))

        def generate(new: int) -> None:
            model.generate(
                torch.tensor([prompt()]), custom_generate=loop, do_sample=True, **SAMPLING,
                max_new_tokens=new, num_return_sequences=rows,
            )  # fmt: skip

        before = self._forward(layers, rows, 8)
        one, all_of_them = (timed(partial(generate, n)) for n in (1, new))
        after = self._forward(layers, rows, 8)
        return {"forward": (before + after) / 2, "step": (all_of_them - one) / (new - 1)}

    def compiled(self, name: str, layers: int, rows: int, steps: int, batches: int) -> dict:
        """Milliseconds of a step of `Rollouts.generate`, and of a model given to torch.compile,
        as the compiler's default makes it; and seconds until its first steps are done."""

        def best(run: Rollouts) -> float:
            return 1e3 * min(timed(lambda: run.generate(steps), steps) for _ in range(batches))

        model = model_of(layers)
        run = rollouts_of(model, name, rows)
        run.generate(4)
        eager, begin = best(run), time.perf_counter()
        model.forward = torch.compile(model.forward, fullgraph=True)
        run = rollouts_of(model, name, rows)
        run.generate(4)
        until = time.perf_counter() - begin
        return {"eager ms": eager, "compiled ms": best(run), "compiling s": until}

    def _forward(self, layers: int, rows: int, steps: int) -> float:
        model, ids = self.model(layers), torch.ones(rows, 1, dtype=torch.long)

        @torch.no_grad()
        def forward() -> None:
            for _ in range(steps):
                model(input_ids=ids, use_cache=False)

        return timed(forward, steps)

    def copies(self, name: str, layers: int, rows: int, steps: int, replay: bool) -> dict:
        """Copies between host and device, and waits of the host, on tensors without data as the
        device's, in steps of eager calls or ahead of the host, as `replays` has them. Of a prompt
        without a budget, whose kept tokens the host would have to know."""
        as_a_gpu()
        if replay:
            replays()
        model = model_of(layers).to("meta")
        rollouts = Rollouts(model, config_of(name), eos_token_id=(), **SAMPLING)
        with Boundary():
            rollouts.prefill([prompt()], rows)
            rollouts.generate(4)
        with Boundary() as crossed:
            rollouts.generate(steps)
        return {
            "uploads": sum(crossed.uploads.values()) / steps,
            "waits": sum(crossed.waits.values()) / steps,
            "by line": {x: n / steps for x, n in (crossed.uploads + crossed.waits).most_common()},
        }

    def launches(self, name: str, layers: int, rows: int, steps: int, batches: int) -> dict:
        """Kernels that Triton launches in a step, and the host's milliseconds, over a stand-in for
        CUDA's driver. Nothing can be computed after it."""
        count = over_a_stand_in()
        # Prefill, which is not measured, computes: NaN of kernels that do not run stays out.
        rollouts = rollouts_of(self.model(layers), name, rows, impl="triton")
        rollouts.generate(4)
        count.clear()
        rollouts.generate(steps)
        kernels = {kernel: n / steps for kernel, n in count.items()}
        seconds = min(timed(lambda: rollouts.generate(4), 4) for _ in range(batches))
        return {"launches": sum(kernels.values()), "ms": 1e3 * seconds, "kernels": kernels}

    def replayed(self, name: str, layers: int, rows: int, steps: int, batches: int) -> dict:
        """The host's milliseconds of a step ahead of the host, once graphs do what it launches:
        over the same stand-in, and with replays that do nothing. The pool is fixed, and in the
        steps of a batch each row takes a page. Nothing can be computed after it."""
        count = over_a_stand_in()
        replays()
        rollouts = rollouts_of(self.model(layers), name, rows, pages=POOL, impl="triton")
        rollouts.generate(4)
        count.clear()
        seconds = min(timed(lambda: rollouts.generate(steps), steps) for _ in range(batches))
        return {"launches": sum(count.values()) / steps / batches, "ms": 1e3 * seconds}


def timed(run: Callable[[], Any], per: int = 1) -> float:
    """Seconds of the processor: with one thread, what a run takes while nothing else runs."""
    begin = time.process_time()
    run()
    return (time.process_time() - begin) / per


def plain(model: Any, rows: int) -> Callable[[int], None]:
    """Decodes so many steps of the model with its own cache."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt()]).expand(rows, -1)

    @torch.no_grad()
    def forward(ids: Tensor) -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})

    def decode(steps: int) -> None:
        for _ in range(steps):
            forward(ids[:, :1])

    forward(ids)
    return decode


KINDS = ("kvtools", "others", "views")


class Count(TorchDispatchMode):
    """Counts calls by kind and name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        returns = [x.alias_info for x in func._schema.returns]
        view = bool(returns) and all(x is not None and not x.is_write for x in returns)
        kind = "kvtools" if func.namespace == "kvtools" else "views" if view else "others"
        self.calls[kind, func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any], steps: int) -> Counter:
    with Count() as count:
        run()
    return Counter({key: n / steps for key, n in count.calls.items()})


def as_a_gpu() -> None:
    """Plans are cut as for a GPU of 132 processors, and Triton's kernels take tensors on a CPU."""

    def limits(device: Any, heads: int, group: int, impl: str = "auto") -> dict[str, int]:
        return dict(tile=max(1, 64 // group), items=-(-264 // heads))

    for module in (ops.attention, kvtools.cache):
        if hasattr(module, "limits"):
            module.limits = limits
    runs_on = ops._runs_on
    ops._runs_on = lambda impl, place: impl == "triton" or runs_on(impl, place)


def over_a_stand_in() -> Counter:
    """Triton launches at a stand-in for CUDA's driver from here on; by kernel, how often."""
    sys.path.insert(0, str(Path(__file__).parent))
    from stand_in import use
    from triton.runtime.jit import JITFunction

    as_a_gpu()
    use()
    count, run, call = Counter(), JITFunction.run, ops.Op.__call__

    def launch(kernel: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        count[kernel.fn.__name__] += not warmup
        return run(kernel, *args, warmup=warmup, **kwargs)

    def first(op: Any, impl: str, *args: Any) -> Any:  # a token that there is
        out = call(op, impl, *args)
        if op.name == "sample":
            for x in out:
                x.zero_()
        return out

    JITFunction.run, ops.Op.__call__ = launch, first
    return count


def replays() -> None:
    """Steps run ahead of the host from here on, as over CUDA graphs; replaying one does nothing."""
    from kvtools.hf import decode  # which builds of other commits do not have

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: None

    decode.capturer = lambda device: capture


class Boundary(TorchDispatchMode):
    """Counts what crosses between the host and tensors on meta, by line; what is read is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads, self.waits = Counter(), Counter()
        self.reads = Reads(self)

    def __enter__(self) -> "Boundary":
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is aten._local_scalar_dense.default and first.is_meta:
            self.waits[line()] += 1
            return 0
        if func is aten._to_copy.default:
            there = torch.device(kwargs.get("device") or first.device).type
            if first.is_meta and there == "cpu":
                self.waits[line()] += 1
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            self.uploads[line()] += there == "meta" and not first.is_meta
        elif func is aten.copy_.default and first.is_meta != args[1].is_meta:
            if args[1].is_meta:
                self.waits[line()] += 1
                return first.zero_()
            self.uploads[line()] += 1
        elif func in (aten.index.Tensor, aten.index_put_.default):  # a mask's places are counted
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            self.waits[line()] += any(x.is_meta for x in masks)
        return func(*args, **kwargs)


class Reads(TorchFunctionMode):
    """Reads that torch refuses, or that do not come to a TorchDispatchMode."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy) and args[0].is_meta:
            self.boundary.waits[line()] += 1
            x = torch.zeros(args[0].shape, dtype=args[0].dtype)
            return getattr(x, func.__name__)()
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and out.is_meta:
            self.boundary.uploads[line()] += not isinstance(args[-1], Tensor)
        return out


def line() -> str:
    """The innermost line of kvtools or transformers."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if f"{os.sep}kvtools{os.sep}" in file or f"{os.sep}transformers{os.sep}" in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def main() -> None:
    torch.set_num_threads(1)  # the host's time is asked for, and other processes may run
    build, answers = Build(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for request in sys.stdin:
        name, *args = json.loads(request)
        try:
            answer = {"answer": getattr(build, name)(*args)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
