"""Models that lie on several ranks (tensor parallel): they say what whole ones say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")  # without which transformers takes no tp_plan

import parallel_worker
import torch
from models import COMMON, CONFIGS, scaled
from test_prm import parts
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import kvtools

RANKS = 2


def save(model, folder):
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What ranks load: a rank reads its part of each file."""
    folder = tmp_path_factory.mktemp("parallel")
    configs = {name: CONFIGS[name] for name in ("llama", "qwen3", "gemma3", "gptoss")}
    configs["mixtral"] = lambda: MixtralConfig(**COMMON, num_local_experts=4)
    configs["odd"] = lambda: LlamaConfig(**COMMON | dict(vocab_size=251))
    configs["one head"] = lambda: LlamaConfig(**COMMON | dict(num_key_value_heads=1))
    for name, config in configs.items():
        torch.manual_seed(0)
        save(scaled(AutoModelForCausalLM.from_config(config()).float()), folder / name)
    tokenizer, model, _ = parts("versa")
    tokenizer.save_pretrained(folder / "prm")
    save(model, folder / "prm")
    return folder


def run(folder, *names):
    """Cases on all ranks at once."""
    script = Path(parallel_worker.__file__)
    paths = [str(Path(kvtools.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    for path in (folder / "rendezvous", *folder.glob("failed*")):
        path.unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, folder, str(rank), str(RANKS), *names],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=500)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [json.loads(path.read_text()) for path in sorted(folder.glob("failed*"))]
    assert len(failed) == RANKS and not any(failed), "\n".join([*filter(None, failed), *said])
    print(*said)


def test_two_ranks_say_what_one_does(folder):
    run(folder, *parallel_worker.CASES)


@pytest.mark.long
def test_two_ranks_in_other_ways(folder):
    run(folder, *parallel_worker.LONG)
