"""The command `kvtools env`: what is installed, and what can run here."""

import argparse
import importlib
import importlib.metadata
import json
import platform
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

import kvtools.ops

HELP = "what is installed, what can run"
EXAMPLE = "kvtools env --json"


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, version in found["versions"].items():
        facts.add_row(name, version or "not installed")
    facts.add_row("compiled part", found["compiled"])
    sets = (f"no {name}: {reason}" for name, reason in found["instructions"].items() if reason)
    facts.add_row("instruction set", "; ".join([found["isa"] or "none", *sets]))
    facts.add_row("CUDA", ", ".join(found["cuda"]) or "no device")
    console.print(facts)
    table = Table("operation", *next(iter(found["ops"].values())))
    for name, impls in found["ops"].items():
        table.add_row(name, *(reason or "yes" for reason in impls.values()))
    console.print(table)


def environment() -> dict:
    """What is installed; the instruction set that C++ kernels use, and why they cannot use another
    (or None); and, per operation and implementation, why it cannot run here (or None)."""
    versions = {"python": platform.python_version()}
    for package in ("kvtools", "torch", "triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["kvtools"] = versions["kvtools"] or getattr(kvtools, "__version__", "source tree")
    versions["torch"] = torch.__version__  # knows its build (+cpu, +cu130)
    try:
        importlib.import_module("kvtools._host")
        compiled = "built"
    except ImportError as error:
        compiled = f"not built ({error}); pip install . without KVTOOLS_EXT=0 builds it"
    impls = [impl for impl in get_args(kvtools.ops.Impl) if impl != "auto"]
    ops = {
        name: {impl: obstacle(op, impl) for impl in impls} for name, op in kvtools.ops.OPS.items()
    }
    isa, instructions = None, {}
    if kvtools.ops.COMPILED:
        isa = torch.ops.kvtools.cpu_isa("auto")
        torch.ops.kvtools.cpu_isa(isa)
        instructions = {x: torch.ops.kvtools.cpu_lacks(x) or None for x in kvtools.ops.ISAS}
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions, "compiled": compiled, "isa": isa, "instructions": instructions,
        "cuda": cuda, "ops": ops,
    }  # fmt: skip


def obstacle(op: Any, impl: str) -> str | None:
    """Why `impl` of `op` cannot run here, or None."""
    if impl == "triton" and not kvtools.ops.TRITON:
        return "pip install triton"
    if impl == "cpu" and not kvtools.ops.COMPILED:
        return "not built"
    if impl == "cuda" and op.name in kvtools.ops.IN_CUDA and not kvtools.ops.CUDA:
        return "built without CUDA"
    if impl not in op.impls:
        return "not written"
    if impl in ("triton", "cuda") and not torch.cuda.is_available():
        return "no CUDA device"
    return None
