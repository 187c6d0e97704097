"""What the tests of other packages share. They run in an environment of their own:
`make ecosystem`."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
import transformers
from models import scaled
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvtools import results
from kvtools.cli import demo


@pytest.fixture(scope="session")
def tokenizer():
    """Of bytes: id i is byte i. Byte 0 pads and ends."""
    vocabulary = {char: byte for byte, char in bytes_to_unicode().items()}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    end = bytes_to_unicode()[0]
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=end, eos_token=end, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return found


def llama(hidden=64, layers=2):
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return scaled(transformers.LlamaForCausalLM(config))


@pytest.fixture
def model():
    """A new one for each test, since trainers change theirs."""
    return llama()


@pytest.fixture
def larger():
    """One large enough for its arithmetic to be what takes time."""
    return llama(384, 4)


@pytest.fixture(scope="session")
def words():
    """Prompts of these lengths, in bytes that are letters."""

    def prompts(*lengths, seed=0):
        rng = torch.Generator().manual_seed(seed)
        draw = lambda n: torch.randint(97, 123, (n,), generator=rng).tolist()  # noqa: E731
        return [bytes(draw(n)).decode() for n in lengths]

    return prompts


def pytest_addoption(parser):
    parser.addoption("--record", metavar="JSON", help="write what was run to this file")
    parser.addoption("--page", metavar="MD", help="and as a table to this page")


def pytest_configure(config):
    config.rows, config.targets = [], []


@pytest.fixture
def record(request):
    """record(package, what was run, what came of it): a row of the matrix in docs/ecosystem.md.
    What goes on after a colon shares a row. `value` and `target`, what it should be at least, are
    kept too."""

    def add(package, what, result, value=None, target=None):
        config = request.config
        config.rows.append([package, importlib.metadata.version(package), what, result])
        if target is not None:
            ok = value >= target
            config.targets.append(dict(name=what, value=value, target=target, ok=ok))

    return add


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if not config.getoption("--record") or exitstatus:
        return
    merged = {}
    for package, version, what, result in sorted(config.rows):
        kind, _, detail = what.partition(": ")
        merged.setdefault((package, version, kind, result), []).append(detail)
    rows = [
        [package, version, ": ".join(filter(None, [kind, "; ".join(details)])), result]
        for (package, version, kind, result), details in merged.items()
    ]
    found = dict(where=demo.where("cpu"), rows=rows, targets=config.targets)
    results.write(Path(config.getoption("--record")), json.dumps(found, indent=1) + "\n")
    if config.getoption("--page"):
        page = Path(config.getoption("--page"))
        head, tail = demo.parts(page, "ecosystem")
        lines = [["package", "version", "what was run", "result"], ["---"] * 4, *rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        results.write(page, f"{head}\n{table}\n\n{caption(found['where'])}\n{tail}")


def caption(where):
    return (
        "Tiny random models on a CPU, torch {torch}, transformers {transformers}, {date}.".format(
            **where
        )
    )
