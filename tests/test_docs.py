"""README and docs: their code runs, their commands exist, their links lead somewhere, and their
tables are those of the committed results."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402
from models import scaled  # noqa: E402
from tokenizers import Tokenizer, decoders, pre_tokenizers  # noqa: E402
from tokenizers.models import BPE  # noqa: E402

import kvtools  # noqa: E402
from kvtools import cli, prm  # noqa: E402
from kvtools.ops import COMPILED  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
# Long runs in small: enough for every line to be reached.
SHORT = re.compile(r"\b(max_new_tokens|tokens)=\d+")
pytestmark = pytest.mark.skipif(not COMPILED, reason="kvtools was built without its C++ kernels")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The code blocks of a page: the line that each begins at, and its text."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, x.start(1)), x[1]) for x in found]


@pytest.fixture(scope="module")
def hub():
    """What stands in for a hub: a tokenizer of bytes, a random policy and a random reward model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {x: i for i, x in enumerate([*special, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0],
        additional_special_tokens=special[1:],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = scaled(transformers.LlamaForCausalLM(config))
    reward = transformers.LlamaForTokenClassification(config).eval()
    with pytest.MonkeyPatch.context() as patch:
        for kind, x in (("AutoModelForCausalLM", policy), ("AutoTokenizer", tokenizer)):
            patch.setattr(getattr(transformers, kind), "from_pretrained", lambda name, x=x, **_: x)
        patch.setattr(prm, "from_pretrained", lambda name: prm.load(reward, tokenizer, "trl"))
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, hub, capsys):
    space: dict = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        code = "\n" * line + SHORT.sub(r"\1=12", code)  # so that tracebacks name the page's lines
        exec(compile(code, str(page), "exec"), space)


def test_names_are_there_after_import_kvtools():
    """In a fresh interpreter, where nothing else has imported a part of the package."""
    text = "".join(x.read_text(encoding="utf-8") for x in [*PAGES, *EXAMPLES])
    names = set(re.findall(r"\bkvtools((?:\.[A-Za-z_]\w*)+)(?!\.?\w|:\w)", text))
    # Modules for other packages are imported by name.
    names = sorted(x for x in names if not x.startswith(".integrations"))
    assert {".models.smollm2", ".prm.from_pretrained", ".quality.compare"} <= {*names}
    code = "import sys, operator, kvtools\n"
    code += "for x in sys.argv[1:]: operator.attrgetter(x[1:])(kvtools)"
    said = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-300:]


def test_names_for_other_programs_are_there():
    """module:name, which they import; it may need packages that are not here."""
    text = "".join(x.read_text(encoding="utf-8") for x in PAGES)
    found = re.findall(r"\b(kvtools(?:\.\w+)+):(\w+)", text)
    assert ("kvtools.serve.vllm_sampler", "Sampler") in found
    for module, name in found:
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert re.search(rf"^(class|def) {name}\b", file.read_text(), re.MULTILINE), (module, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page):
    """`kvtools` lines are parsed; targets, modules and files of other lines must be there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`make ([a-z-]+)", text):
        assert name in targets, f"{page.name}: make {name}"
    for name in re.findall(r"`python -m ([a-z._]+)", text):
        assert importlib.util.find_spec(name), f"{page.name}: python -m {name}"
    for _, code in blocks(page, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            command = [x for x in shlex.split(line, comments=True) if "=" not in x.split("-")[0]]
            if command[:1] == ["kvtools"]:
                cli.parser().parse_args(command[1:])
            elif command[:1] == ["make"]:
                assert command[1] in targets, line
            elif command[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(command[2]), line
            elif command[:1] in (["python"], ["torchrun"]):
                assert any((ROOT / x).is_file() for x in command[1:]), line
            else:
                assert command[:1] in ([], ["pip"]), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    if page.parent == DOCS:
        assert f"docs/{page.name}" in (ROOT / "README.md").read_text(), "no way from the README"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_options_and_families_are_all_there():
    scoring = (DOCS / "scoring.md").read_text()
    assert not [name for name in prm.FAMILIES if f"| `{name}` |" not in scoring]
    kernels = (DOCS / "kernels.md").read_text()
    assert not [name for name in kvtools.ops.OPS if f"`{name}`" not in kernels]


TABLES = {  # marker: page, module of bench, results
    "quality": ("docs/compression.md", "quality", "quality-cpu.json"),
    "search": ("docs/search.md", "search", "search-cpu.json"),
    "cpu": ("docs/cpu.md", "cpu", "cpu.json"),
    "prm": ("docs/scoring.md", "prm", "prm-cpu.json"),
    "demo": ("README.md", None, "demo-cpu.json"),
    "step": ("docs/kernels.md", "step", "step.json"),
    "engines": ("docs/engines.md", "engines", "engines.json"),
    "forest": ("docs/samples.md", "forest", "forest.json"),
    "model": ("docs/kernels.md", "model", "model.json"),
    "model-times": ("docs/kernels.md", "model", "model.json"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_results(name, tmp_path):
    """To the letter, and make writes them where they are."""
    demo = pytest.importorskip("kvtools.cli.demo")
    page, module, results = TABLES[name]
    result = json.loads((ROOT / "bench/results" / results).read_text())
    if module is None:
        rows, caption = [demo.COLUMNS, *demo.lines(result)], demo.caption(result)
    else:
        bench = pytest.importorskip(f"bench.{module}", exc_type=ImportError)
        data = result["cells"] if "cells" in result and name != "prm" else result
        table = bench.times_table if name == "model-times" else bench.table
        rows = table(data, 8) if name == "search" else table(data)
        caption = bench.caption(result)
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / page).read_text())
    demo.rewrite(copy, name, rows, caption)
    assert copy.read_text() == (ROOT / page).read_text()
    assert f"bench/results/{results} --readme {page}" in re.sub(
        r"(?<=demo-cpu.json) --readme README.md.*", " --readme README.md",
        (ROOT / "Makefile").read_text() + (DOCS / "kernels.md").read_text(),
    )  # fmt: skip


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run():
    others = sorted((ROOT / "tests/ecosystem").glob("test_*.py"))  # make ecosystem
    tested = "".join(path.read_text() for path in [Path(__file__), *others])
    assert not [x.stem for x in EXAMPLES if f'example("{x.stem}")' not in tested]


def test_best_of_n(hub, capsys):
    best = example("best_of_n").main("policy", "reward", "What is 2 + 3?", n=4, tokens=40)
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert len(scores) == 4 and best.score("min") == pytest.approx(max(scores), abs=1e-3)


def test_pass_at_k(hub):
    module = example("pass_at_k")
    assert module.main("policy", n=4, tokens=8) == {1: 0.0, 4: 0.0}
    assert module.pass_at_k(4, 1, 1) == 0.25 and module.pass_at_k(4, 1, 4) == 1


def test_tensor_parallel(hub, capsys):
    """By itself; on ranks in tests/test_parallel.py."""
    samples, memory = example("tensor_parallel").main("policy", n=2, tokens=8)
    assert [len(x) for x in samples] == [8, 8] and memory["total"]
    assert capsys.readouterr().out.count("---") == 2


def test_policy(hub):
    found = example("policy").main("policy", prompt=48, tokens=48, budget=24)
    assert found.keys() == {"mean attention", "h2o", "scissorhands"}
    assert all(0 < kl < 10 for kl in found.values())


@torch.no_grad()
def test_server():
    """Logits of each step are those of dense attention over the row's text; blocks are shared."""
    module = example("server")
    server = module.main(prompt=37, n=3, new=3, format="none")
    server.fork(1)  # in the middle of a block, which is copied when it is written to
    logits_bv = server.step(seed=9)
    assert server.text[1][:-1] == server.text[3][:-1]
    assert len({table[0] for table in server.table}) == 1
    assert len({table[-1] for table in server.table}) == 4
    model = server.model
    for text, logits_v in zip(server.text, logits_bv, strict=True):
        x = model.embedding(torch.tensor(text[:-1]))
        for layer in range(module.LAYERS):
            q, k, v = model.heads(layer, x, torch.arange(len(x)).int())
            q, k, v = (y.transpose(0, 1) for y in (q, k, v))
            attend = torch.nn.functional.scaled_dot_product_attention
            out = attend(q, k, v, is_causal=True, enable_gqa=True)
            x = x + model.out[layer](out.transpose(0, 1).flatten(1))
        torch.testing.assert_close(x[-1] @ model.embedding.weight.T, logits_v, rtol=1e-4, atol=1e-4)
