"""The command line: what it prints, and one line for what the user can put right."""

import argparse
import collections
import dataclasses
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kvtools
from kvtools import CacheConfig, cli, models, results
from kvtools.cli import demo, env, options, sample, search


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of 2 layers and a tokenizer of 32 words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 30)}
    vocabulary |= {"yes": 30, "no": 31}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(capsys, *argv):
    """Exit code, standard output, lines of standard error."""
    try:
        code = cli.main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_env(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0
    assert "tree_attention" in out and "reference" in out


def test_env_json(capsys):
    code, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["versions"]) == {"python", "kvtools", "torch", "triton", "transformers"}
    for impls in found["ops"].values():
        assert impls["reference"] is None
        assert all(reason is None or reason for reason in impls.values())


def test_env_tells_the_instruction_set(capsys, monkeypatch):
    use, lacks = torch.ops.kvtools.cpu_isa, torch.ops.kvtools.cpu_lacks
    found = env.environment()
    able = [name for name, reason in found["instructions"].items() if reason is None]
    assert able == [name for name in kvtools.ops.ISAS if not lacks(name)]
    assert found["isa"] == use(able[-1]), "not the widest"
    for name, reason in (found["instructions"] | {"mmx": "there is no such"}).items():
        if reason:
            with pytest.raises(RuntimeError, match=f"isa='{name}': {reason}"):
                use(name)
    table = found | {"isa": "avx512", "instructions": {"avx512": None, "amx": "refused"}}
    monkeypatch.setattr(env, "environment", lambda: table)
    assert "avx512; no amx: refused" in run(capsys, "env")[1]


def test_generate(capsys, tiny):
    prompt = " ".join(f"w{i}" for i in range(2, 22))
    given = ["--prompt", prompt, "-n", 3, "--max-new-tokens", 6, "--bits", 8, "--compare", "--json"]
    code, out, err = run(capsys, "generate", tiny, *given)
    assert (code, err) == (0, [])
    result = json.loads(out)
    assert result["prompt_tokens"] == 20
    assert result["config"] == {"bits": 8}
    for row in (result, result["plain"]):
        assert len(row["texts"]) == len(row["tokens"]) == 3
        assert all(1 <= tokens <= 6 for tokens in row["tokens"])
        assert row["prefill_s"] > 0
        assert row["memory"]["total"] > 0
    assert set(result["memory"]) == {"prefix", "suffix", "metadata", "total"}


def test_generate_greedy_is_plain(capsys, tiny):
    given = ["--prompt", "w2 w3 w4", "--max-new-tokens", 5, "--greedy"]
    code, out, _ = run(capsys, "generate", tiny, *given, "--compare", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["texts"] == result["plain"]["texts"]


def test_generate_prints_texts_and_figures(capsys, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("w2 w3 w4"))
    file = tmp_path / "prompt.txt"
    file.write_text("w2 w3 w4")
    outputs = []
    for source in (["-"], ["--prompt-file", file]):
        code, out, _ = run(capsys, "generate", tiny, *source, "--max-new-tokens", 4, "--seed", 5)
        assert code == 0
        outputs.append(out.split("┏")[0])
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("--- 1\n")


PROMPT = ["--prompt", "w2 w3"]
# Of each command: its arguments, and what the message must say. Every one is refused before a model
# is loaded (exit code 2), but for those of LATER.
ERRORS = [
    ("generate", [], "required"),
    ("generate", [*PROMPT, "--prompt-file", "x"], "not allowed with"),
    ("generate", ["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file: no such file"),
    ("generate", ["--prompt-file", "LATIN"], "--prompt-file LATIN is not UTF-8"),
    ("generate", ["--prompt-file", "."], "--prompt-file .: no such file"),
    ("generate", ["--prompt", " "], "prompt is empty"),
    ("generate", [*PROMPT, "-n", 0], "-n: '0' is not an integer from 1"),
    ("generate", [*PROMPT, "-n", "9" * 30], "-n: "),
    ("generate", [*PROMPT, "-n", 3, "--greedy"], "-n 3 with --greedy"),
    ("generate", [*PROMPT, "-n", 3, "--temperature", 0], "-n 3 with --temperature 0"),
    ("generate", [*PROMPT, "--greedy", "--top-p", 0.5], "--greedy with --top-p"),
    ("generate", [*PROMPT, "--top-p", 2], "--top-p"),
    ("generate", [*PROMPT, "--temperature", "nan"], "--temperature: 'nan'"),
    ("generate", [*PROMPT, "--temperature", "inf"], "--temperature: 'inf'"),
    ("generate", [*PROMPT, "--seed", "-1"], "--seed: '-1'"),
    ("generate", [*PROMPT, "--seed", 2**64], "--seed"),
    ("generate", [*PROMPT, "--top-k", 2**40], "--top-k"),
    ("generate", [*PROMPT, "--bits", 5], "--bits: '5' is not one of 16, 8"),
    ("generate", [*PROMPT, "--bits", "4,4"], "--bits: '4,4'"),
    ("generate", [*PROMPT, "--bits", "none"], "--bits: 'none'"),
    ("generate", [*PROMPT, "--policy", "none-such"], "--policy: 'none-such' is not one of sciss"),
    ("generate", [*PROMPT, "--budget", 2], "--budget=2 must be"),
    ("generate", [*PROMPT, "--budget", 0.5], "--budget: '0.5' is not an integer"),
    ("generate", [*PROMPT, "--prompt-budget", "1.5"], "--prompt-budget: '1.5'"),
    ("generate", [*PROMPT, "--layer-budget", "a,b"], "--layer-budget: 'a'"),
    ("generate", [*PROMPT, "--layer-budget", ""], "--layer-budget: ''"),
    ("generate", [*PROMPT, "--page-size", 2147483648], "--page-size: '2147483648'"),
    ("generate", [*PROMPT, "--sinks", 10**9], "--sinks: '1000000000'"),
    ("generate", [*PROMPT, "--drop", 3], "--drop=3 needs a budget"),
    ("generate", [*PROMPT, "--impl", "gpu"], "--impl: 'gpu'"),
    ("generate", [*PROMPT, "--dtype", "float33"], "--dtype: invalid choice: 'float33'"),
    ("generate", [*PROMPT, "--dtype", "float8_e4m3fn"], "--dtype: invalid choice"),
    ("generate", [*PROMPT, "--device", "meta"], "--device: device 'meta': expected cpu, cuda"),
    ("generate", [*PROMPT, "--device", "bogus"], "--device: device 'bogus': expected cpu, cuda"),
    ("generate", [*PROMPT, "--device", "cuda:99"], "--device: device 'cuda:99': "),
    ("generate", [*PROMPT, "--beams", 2], "unrecognized argument: --beams"),
    ("generate", ["--promt", "w2 w3"], "unrecognized argument: --promt; did you mean --prompt?"),
    ("quality", ["--preset=max", "--prob"], "--probe measures on a prompt"),  # may be cut short
    ("quality", ["--lenght", 9], "unrecognized argument: --lenght; did you mean --length?"),
    ("score", ["--familly=trl"], "unrecognized argument: --familly; did you mean --family?"),
    ("quality", ["--probe"], "--probe measures on a prompt: give --prompt"),
    ("quality", ["--presets", "tiny"], "--presets: preset 'tiny' does not exist; expected loss"),
    ("quality", ["--presets", ","], "--presets: "),
    ("quality", ["--json", "."], "--json . is a folder"),
    ("quality", ["--json", "NOTES"], "--json NOTES holds something else"),
    ("quality", ["--json", "OBJECT"], "--json OBJECT holds something else"),
    ("demo", ["--json", "NOTES"], "--json NOTES holds something else"),
    ("demo", ["--json", "OBJECT"], "--json OBJECT holds something else"),
    ("demo", ["--readme", "NOTES"], "--readme NOTES has no <!-- demo:begin"),
    ("demo", ["--readme", "/no/such"], "--readme"),
    ("demo", ["--device", "meta"], "--device"),
    ("search", [], "required"),
    ("search", [*PROMPT, "--strategy", "mcts"], "--strategy: invalid choice: 'mcts'"),
    ("search", [*PROMPT, "--ess", 0.5], "--ess is not an option of --strategy beam"),
    ("search", [*PROMPT, "--strategy", "particle_filter", "--ess", 5], "--ess: '5' is not"),
    ("search", [*PROMPT, "--strategy", "rebase", "--weight-temperature", 0], "--weight-temperat"),
    ("search", [*PROMPT, "--strategy", "rebase", "--weight-temperature", 1e-9], "--weight-temp"),
    ("search", [*PROMPT, "--strategy", "particle_gibbs", "-n", 1], "-n 1: particle_gibbs"),
    ("search", [*PROMPT, "-n", 5], "-n 5 is not a multiple of --beam 4"),
    ("search", [*PROMPT, "--strategy", "allocate"], "--strategy allocate needs --tokens"),
    ("search", [*PROMPT, "--tokens", 9], "--tokens is not an option of --strategy beam"),
    (
        "search",
        [*PROMPT, "--strategy", "allocate", "--tokens", 9, "--table", "/no/such"],
        "--table /no/such: no such file",
    ),
    (
        "search",
        [*PROMPT, "--strategy", "allocate", "--tokens", 9, "--table", "EMPTY"],
        "is no table of",
    ),
    ("search", [*PROMPT, "--strategy", "deepen", "--depths", "2,1"], "--depths: '2,1' is not like"),
    (
        "search",
        [*PROMPT, "--strategy", "allocate", "--tokens", 9, "--table", "TABLE"],
        "--table TABLE: entries[0].options has n='x', no number of rows",
    ),
    (
        "search",
        [*PROMPT, "--strategy", "allocate", "--tokens", 9, "--table", "ALIEN"],
        "--table ALIEN: entries[0] has a strategy 'mine', which is none of none, best_of_n, beam",
    ),
    (
        "search",
        [*PROMPT, "--strategy", "allocate", "--tokens", 9, "-n", 4],
        "-n is not an option of --strategy allocate",
    ),
    (
        "search",
        [*PROMPT, "--strategy", "allocate", "--tokens", 9, "--temperature", 0],
        "--temperature 0 makes all 4 rows of --probes equal",
    ),
    (
        "search",
        [*PROMPT, "--strategy", "best_of_n", "--stop-verified", 0.5],
        "--stop-verified needs --stop-enough",
    ),
    ("search", [*PROMPT, "--stop-enough", 1], "--stop-enough is not an option of --strategy beam"),
    (
        "search",
        [*PROMPT, "--strategy", "best_of_n", "--stop-sure", 0.9],
        "--stop-sure needs --stop-votes",
    ),
    ("search", [*PROMPT, "--stop-votes"], "--stop-votes is not an option of --strategy beam"),
    ("search", [*PROMPT, "--plot", "tree.txt"], "--plot: 'tree.txt': end its name in .svg"),
    ("search", [*PROMPT, "--plot", "/no/such/tree.svg"], "there is no folder /no/such"),
    ("search", [*PROMPT, "--temperature", 0], "--temperature 0 makes all 16 rows"),
    ("search", [*PROMPT, "--reduce", "median"], "--reduce: 'median'"),
    ("search", [*PROMPT, "--delimiter", ""], "--delimiter: it is empty"),
    ("search", [*PROMPT, "--scorer", "arithmatic"], "--scorer: 'arithmatic' is no folder; did yo"),
    ("search", [*PROMPT, "--scorer", "nosuch"], "--scorer: 'nosuch' is neither arithmetic, nor"),
    ("search", [*PROMPT, "--scorer", "/nonexistent"], "--scorer: '/nonexistent' is neither"),
    ("search", ["--questions", "/no/such"], "--questions /no/such: no such file"),
    ("search", ["--questions", "EMPTY"], "--questions EMPTY: it holds no question"),
    ("search", ["--questions", "LATIN"], "--questions LATIN: line 2 is not UTF-8"),
    ("search", ["--questions", "DEEP"], "--questions DEEP: line 3 is nested too deeply"),
    ("search", ["--questions", "NUMBERS"], "--questions NUMBERS: line 3 is not {"),
    ("search", ["--questions", "TWICE"], "--questions TWICE: line 2: another answer"),
    ("search", ["--questions", "INFINITE"], "--questions INFINITE: line 1 is not {"),
    ("search", ["--questions", "WORDS"], "--questions WORDS: line 1: the answer 'ten'"),
    ("sample", ["/no/such"], "input /no/such: no such file"),
    ("sample", ["EMPTY"], "input EMPTY: it holds no prompt"),
    ("sample", ["LATIN"], "input LATIN: line 2 is not UTF-8"),
    ("sample", ["DEEP"], "input DEEP: line 3 is nested too deeply"),
    ("sample", ["NUMBERS"], "input NUMBERS: line 3 is not {"),
    ("sample", ["OBJECT"], "input OBJECT: line 1 is not {"),
    ("sample", ["WORDS"], "input WORDS: line 1: the answer 'ten'"),
    ("sample", ["TWICE", "-n", 0], "-n: '0' is not an integer from 1"),
    ("sample", ["TWICE", "--temperature", 0], "--temperature 0 makes all 16 samples"),
    ("sample", ["TWICE", "--until-correct", 0], "--until-correct: '0'"),
    ("sample", ["TWICE", "--stop", ""], "--stop: it is empty"),
    ("sample", ["TWICE", "--max-seconds", "nan"], "--max-seconds: 'nan'"),
    ("sample", ["TWICE", "--output", "NOTES"], "--output NOTES holds something else"),
    ("sample", ["TWICE", "--output", "OBJECT"], "--output OBJECT holds something else"),
    ("sample", ["TWICE", "--output", "TWICE"], "--output TWICE holds something else"),
    ("score", ["/no/such"], "input /no/such: no such file"),
    ("score", ["EMPTY", "--separator", "|"], "--separator is for --family trl"),
    ("score", ["EMPTY", "--separator", ""], "--separator: it is empty"),
    ("score", ["EMPTY", "--family", "eurus"], "--family eurus: expected qwen"),
    ("score", ["EMPTY", "--bits", 5], "--bits"),
    ("score", ["EMPTY", "--batch", 0], "--batch"),
    ("score", ["EMPTY", "--output", "NOTES"], "--output NOTES holds something else"),
    ("score", ["EMPTY", "--output", "."], "--output . is a folder"),
    ("score", ["EMPTY", "--output", "no/such/file"], "--output no/such/file: there is no folder"),
    ("score", ["EMPTY", "--dtype", "int8"], "--dtype"),
    ("nosuch", [], "invalid choice"),
    ("--verison", [], "unrecognized argument: --verison; did you mean --version?"),
]
FILES = {
    "NOTES": "remember the milk",
    "OBJECT": '{"mine": 1}',
    "EMPTY": "\n",
    "LATIN": '{"question": "w2"}\n\xe9\n'.encode("latin1"),
    "DEEP": '{"question": "w2"}\n\n' + "[" * 100_000,
    "NUMBERS": '{"question": "w2"}\n\n{"question": 5}',
    "TWICE": '{"question": "w2", "answer": 1}\n{"question": "w2", "answer": 2}',
    "ALIEN": '{"edges": [], "entries": [{"strategy": "mine", "options": {}, "tokens": [1], '
    '"success": [1]}]}',
    "TABLE": '{"edges": [], "entries": [{"strategy": "beam", "options": {"n": "x"}, '
    '"tokens": [1], "success": [1]}]}',
    "INFINITE": '{"question": "w2", "answer": Infinity}',
    "WORDS": '{"question": "w2", "answer": "ten"}',
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with some files that are the user's own."""
    for name, said in FILES.items():
        (tmp_path / name).write_bytes(said if isinstance(said, bytes) else said.encode())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name, said in FILES.items():
        assert (tmp_path / name).read_bytes() in (said, str(said).encode()), f"{name} was changed"
    left = {path.name for path in tmp_path.iterdir()} - FILES.keys()
    assert not {name for name in left if name.endswith(".part")}, left


def test_wrong_command_lines(capsys, files, monkeypatch):
    """One line that names the option, before a model is loaded."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("it loaded a model"))
    for command, given, words in ERRORS:
        model = [] if command in ("demo", "nosuch", "--verison") else ["tiny"]
        code, out, err = run(capsys, command, *model, *given)
        assert (code, out, len(err)) == (2, "", 1), (command, given, err)
        assert err[0].startswith("kvtools") and words in err[0], (command, given, err)


def test_every_option_of_the_cache_has_a_type():
    fields = {field.name for field in dataclasses.fields(CacheConfig)}
    assert options.CACHE.keys() == options.MEANING.keys() == fields
    for field in dataclasses.fields(CacheConfig):
        said = "none" if field.default is None else str(field.default)
        if (field.name, said) != ("drop", "none"):
            assert options.CACHE[field.name](said) == field.default
    assert options.CACHE["layer_budget"]("0.5,1.5") == [0.5, 1.5]
    assert options.CACHE["layer_budget"]("0.5") == [0.5]
    assert (
        options.CACHE["prompt_budget"]("0.13") == 0.13
        and options.CACHE["prompt_budget"]("64") == 64
    )


def test_options_of_search_are_those_of_the_library():
    from kvtools.search.result import REDUCE
    from kvtools.search.run import TEMPERATURES

    assert (*REDUCE,) == search.REDUCE and search.TEMPERATURES == TEMPERATURES
    for flag, (name, _, meaning) in search.OPTIONS.items():
        taken = {x: inspect.signature(getattr(kvtools.search, x)).parameters.get(name)
                 for x in search.STRATEGIES}  # fmt: skip
        taken = {x: parameter.default for x, parameter in taken.items() if parameter is not None}
        assert meaning.startswith(f"{', '.join(taken)}: "), flag
        for default in {*taken.values()} - {None, inspect.Parameter.empty}:
            if isinstance(default, str) and "\n" in default:
                continue
            said = f"{default:g}" if isinstance(default, float) else str(default)
            assert re.search(rf"{said} \(default\)|\(default .*\b{said}\b", meaning), flag


LATER = [
    ("generate", [*PROMPT, "--layer-budget", "0.5"], 1, "--layer-budget has 1 factors; the model"),
    ("generate", [*PROMPT, "--chat"], 2, "--chat"),
    ("generate", [*PROMPT, "--page-size", 65536, "-n", 2], 2, "--page-size 65536: so many tokens"),
    (
        "generate",
        [*PROMPT, "--sinks", 9999, "--bits", 8],
        2,
        "--sinks 9999: so many tokens in each",
    ),
    ("quality", ["--probe", *PROMPT], 1, "the prompt has 2 tokens; a probe needs 128"),
    ("quality", ["--length", 2**24, "--count", 1], 2, "--length 16777216: text 'debugger' has"),
]


@pytest.mark.parametrize("command,given,code,words", LATER)
def test_what_only_the_model_tells(capsys, tiny, files, monkeypatch, command, given, code, words):
    monkeypatch.setattr(options, "available", lambda device: 2**20)
    found, out, err = run(capsys, command, tiny, *given)
    assert (found, out, len(err)) == (code, "", 1), err
    assert err[0].startswith("kvtools: ") and words in err[0]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(capsys, name):
    """One that the command's own parser takes, the exit codes, and a word on every option."""
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "example:\n  kvtools " in out and "exit codes:\n  0  done" in out
    command = argparse.ArgumentParser()
    cli.COMMANDS[name].add(command)
    assert not [x.option_strings or x.dest for x in command._actions if not x.help]
    example = shlex.split(cli.COMMANDS[name].EXAMPLE)
    assert example[:2] == ["kvtools", name] and cli.COMMANDS[name].EXAMPLE in out
    assert cli.parser().parse_args(example[1:]).run is cli.COMMANDS[name].run


def test_module_runs():
    said = subprocess.run(
        [sys.executable, "-m", "kvtools.cli", "generate"], capture_output=True, text=True
    )
    assert said.returncode == 2 and said.stderr.startswith("kvtools generate: ")
    assert "Traceback" not in said.stderr


def test_available_memory():
    free = options.available(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"kvtools {kvtools.__version__}\n", [])


def test_what_nobody_foresaw_is_one_line(capsys, monkeypatch):
    for error in (KeyError("x"), RecursionError(), OverflowError("too large"), MemoryError()):
        monkeypatch.setattr(env, "environment", lambda error=error: (_ for _ in ()).throw(error))
        code, out, err = run(capsys, "env")
        assert (code, out, len(err)) == (1, "", 1)
        assert type(error).__name__ in err[0]


def test_unknown_model(capsys, tmp_path):
    pytest.importorskip("transformers")
    for folder, expected in ((tmp_path / "none", 2), (tmp_path, 1), ("path/to/model", 2)):
        code, _, err = run(capsys, "generate", folder, "--prompt", "w2")
        assert (code, len(err)) == (expected, 1), err
        assert str(folder) in err[0]


def test_misspelt_packaged_model(capsys, monkeypatch):
    """Said at once: without it the hub is asked, again and again where there is none."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "causal", lambda *_: pytest.fail("it went to the hub"))
    for name, meant in (("smolm2", "smollm2"), ("SmolLM-2", "smollm2"), ("gemma-3", "gemma3")):
        code, out, err = run(capsys, "generate", name, *PROMPT)
        assert (code, out, len(err)) == (2, "", 1), err
        assert f"model {name!r} is no folder; did you mean {meant}?" in err[0]


def test_no_hub(capsys, monkeypatch):
    pytest.importorskip("transformers")

    def causal(*_):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nSee")

    monkeypatch.setattr(models, "causal", causal)
    for name in ("owner/model", "gpt2"):
        code, _, err = run(capsys, "generate", name, *PROMPT)
        assert (code, len(err)) == (1, 1)
        assert err[0].endswith("load the files. Without the hub give a folder, or smollm2.")


@pytest.mark.parametrize("command", ["generate", "search"])
def test_a_prompt_longer_than_the_model_was_made_for(capsys, tiny, command):
    """It is warned of before the wait, and continued."""
    for tokens, lines in ((256, 0), (257, 1)):
        given = ["--prompt", "w2 " * tokens, "-n", 1, "--max-new-tokens", 2]
        given += ["--beam", 1, "--step-tokens", 1, "--depth", 1] if command == "search" else []
        code, _, err = run(capsys, command, tiny, *given)
        assert (code, len(err)) == (0, lines), err
        assert not lines or "has 257 tokens, but the model was made for 256" in err[0]


def test_missing_weights_of_a_model(capsys, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for given in (["generate", folder, *PROMPT], ["search", folder, *PROMPT]):
        code, out, err = run(capsys, *given)
        assert (code, out, len(err)) == (1, "", 1), err
        assert "has no lm_head.weight, which LlamaForCausalLM needs" in err[0]


def test_debug_shows_the_traceback():
    with pytest.raises(cli.Usage):
        cli.main(["generate", "/no/such", "--prompt", "w2", "--debug"])


def test_missing_package_names_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "generate", "smollm2", "--prompt", "w2")
    assert (code, err) == (1, ["kvtools: transformers is not installed: pip install 'kvtools[hf]'"])


def test_quality_probe(tiny, capsys, tmp_path):
    words = " ".join(f"w{2 + i * i % 27}" for i in range(140))
    path = tmp_path / "out.json"
    argv = [
        "quality",
        tiny,
        "--probe",
        "--prompt",
        words,
        "--presets",
        "lossless,max",
        "--json",
        path,
    ]
    argv += ["--bits", 2, "--recent-bits", "none"]
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, [])
    assert "lossless" in out and "bits=2" in out and "the same" in out
    cells = json.loads(path.read_text())["cells"]["your prompt"]
    assert set(cells) == {"exact", "lossless", "max", "bits=2 recent_bits=None"}
    assert cells["lossless"]["kl"] < cells["bits=2 recent_bits=None"]["kl"]


@pytest.mark.parametrize("strategy", search.STRATEGIES)
def test_search(tiny, capsys, tmp_path, strategy):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "w2 w3", "answer": 4}\n\n{"question": "w5 w6 w7"}\n')
    given = ["--questions", path, "--strategy", strategy, "--max-new-tokens", 12]
    given += ["-n", 4] if strategy != "allocate" else []
    given += ["--delimiter", "w9", "--delimiter", "w1", "--seed", 3, "--bits", 8]
    if strategy == "allocate":
        given += ["--tokens", 120, "--probes", 2, "--difficulty", "votes"]
    code, out, err = run(capsys, "search", tiny, *given, "--json")
    assert (code, err) == (0, [])
    result = json.loads(out)
    assert result["strategy"] == strategy and result["config"] == {"bits": 8}
    assert [row["question"] for row in result["questions"]] == ["w2 w3", "w5 w6 w7"]
    for row in result["questions"]:
        assert row["best"] in [c["text"] for c in row["candidates"]]
        assert all(c["scores"] for c in row["candidates"] if c["text"])
        assert all(c["finished"] for c in row["candidates"]) or strategy == "dvts"
        assert row["trace"] or strategy in ("best_of_n", "deepen", "revise")
    assert result["generated"] > 0 and result["policy_s"] <= result["all_s"]
    again = json.loads(run(capsys, "search", tiny, *given, "--json")[1])
    assert again["questions"] == result["questions"]
    code, out, _ = run(capsys, "search", tiny, *given, "--batch", 1)
    assert code == 0 and out.startswith("--- w2 w3\n") and "generated" in out


@pytest.mark.parametrize("reduce,reduced", [("min", min), ("last", lambda scores: scores[-1])])
def test_search_picks_by_what_it_kept_by(tiny, capsys, monkeypatch, reduce, reduced):
    def scored(question, solutions):
        return [[(len(step) * 7 % 10 + i % 3) / 12 for i, step in enumerate(x)] for x in solutions]

    monkeypatch.setattr("kvtools.cli.search.scorer_of", lambda args, answers: scored)
    given = ["--prompt", "w2 w3 w5", "--strategy", "rebase", "-n", 12, "--max-new-tokens", 24]
    given += ["--delimiter", "w9", "--step-tokens", 4, "--reduce", reduce, "--json"]
    (row,) = json.loads(run(capsys, "search", tiny, *given)[1])["questions"]
    values = {reduced(c["scores"]): c["text"] for c in reversed(row["candidates"])}
    assert len(values) > 2 and row["best"] == values[max(values)]


@pytest.mark.parametrize("strategy,more", [
    ("best_of_n", ["--stop-votes", "--stop-sure", 0.9, "--wave", 2, "--stop-enough", 1]),
    ("dvts", []),
    ("allocate", ["--tokens", 90]),
])  # fmt: skip
def test_search_is_drawn(tiny, capsys, tmp_path, strategy, more):
    pytest.importorskip("matplotlib.font_manager")  # says so if it has to look for fonts first
    capsys.readouterr()
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "w2 $w3"}\n{"question": "w5 w6 w7"}\n{"question": "w1"}\n')
    given = ["--questions", path, "--strategy", strategy, "--max-new-tokens", 8]
    given += ["-n", 4] if strategy != "allocate" else []
    given += ["--delimiter", "w9", "--batch", 2, "--plot", tmp_path / "a.svg", *more, "--json"]
    code, out, err = run(capsys, "search", tiny, *given)
    assert (code, err) == (0, [])
    assert ("saved" in json.loads(out)) == (strategy == "best_of_n")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<!-- score -->") == 3
    given[given.index(tmp_path / "a.svg")] = tmp_path / "b.svg"
    run(capsys, "search", tiny, *given)
    assert (tmp_path / "b.svg").read_text() == text, "the same result gives the same picture"


def test_what_was_found_is_told_before_it_is_drawn(tiny, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib.font_manager")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **how: 1 / 0)
    path = tmp_path / "a.svg"
    path.write_text("before")
    given = ["--prompt", "w2 w3", "--strategy", "best_of_n", "-n", 2, "--max-new-tokens", 4]
    code, out, err = run(capsys, "search", tiny, *given, "--plot", path, "--json")
    assert code == 1 and "ZeroDivisionError" in err[-1]
    assert json.loads(out)["generated"] > 0 and path.read_text() == "before"


def test_readme_table(tmp_path):
    row = {"prefill_s": 1.0, "tokens_per_s": 2.0, "memory": {"total": 2**21}}
    half = row | {"memory": {"total": 2**20}}
    result = collections.defaultdict(int) | {"rows": {"plain generate": row, "kvtools": half}}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo:begin -->\nstale\n<!-- demo:end -->\nafter\n")
    for _ in range(2):
        demo.rewrite(readme, "demo", [demo.COLUMNS, *demo.lines(result)], "a caption")
    text = readme.read_text()
    assert "| kvtools | 1.00 | 2.0 | 1.00 | 2.0 | 1.0 |" in text
    assert "\n\na caption\n" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="demo:begin"):
        demo.rewrite(readme, "demo", [demo.COLUMNS], "")


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A folder with a random token classifier over the same words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "|": 1} | {f"w{i}": i for i in range(2, 32)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    transformers.LlamaForTokenClassification(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return str(folder)


TRL = ["--family", "trl", "--separator", "|"]  # a word that the tokenizer has
QUESTIONS = [
    {"id": "a", "question": "w2 w3", "solutions": [["w4", "w5 w6"], [], ["w7"]]},
    {"question": "w9", "solutions": ["w4\n\nw5 w6\n\nw7", ["w8"]]},
    {"question": "w2", "solutions": []},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(json.dumps(x) for x in QUESTIONS))  # a blank line is nothing
    return path


def test_score(capsys, reward, questions, tmp_path):
    code, out, err = run(capsys, "score", reward, questions, *TRL)
    assert (code, err) == (0, [])
    found = [json.loads(line) for line in out.splitlines()]
    assert [x.get("id") for x in found] == ["a", None, None]
    assert found[0]["settings"]["family"] == "trl" and "settings" not in found[1]
    assert [[len(steps) for steps in x["probs"]] for x in found] == [[2, 0, 1], [3, 1], []]
    for x in found:
        for steps, last, least in zip(x["probs"], x["last"], x["min"], strict=True):
            assert (last, least) == ((steps[-1], min(steps)) if steps else (None, None))
    assert found[0]["sum_logit"][2] == pytest.approx(found[0]["margins"][2][0])

    output = tmp_path / "out.jsonl"
    code, printed, _ = run(capsys, "score", reward, questions, *TRL, "--output", output)
    assert (code, printed) == (0, "")
    assert output.read_text() == out
    for stdout in ("-", "/dev/stdout"):
        assert run(capsys, "score", reward, questions, *TRL, "--output", stdout) == (0, out, [])
    assert run(capsys, "score", reward, questions, *TRL, "--output", "/dev/null") == (0, "", [])


def test_score_goes_on(capsys, reward, questions, tmp_path, monkeypatch):
    """After it was cut off in the middle of a line, wherever that was."""
    from kvtools.prm import PRM

    output, scored, score = tmp_path / "out.jsonl", [], PRM.score
    run(capsys, "score", reward, questions, *TRL, "--output", output)
    whole = output.read_text()
    monkeypatch.setattr(
        PRM, "score", lambda self, q, *args, **how: scored.append(q) or score(self, q, *args, **how)
    )
    ends = [i + 1 for i, x in enumerate(whole) if x == "\n"]
    for cut in (0, 30, 400, ends[0], ends[0] + 1, ends[0] + 20, ends[1], ends[2]):
        output.write_text(whole[:cut])
        scored.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO(questions.read_text()))
        code, _, err = run(capsys, "score", reward, "-", *TRL, "--output", output)
        assert (code, err) == (0, []), cut
        assert output.read_text() == whole
        assert scored == ["w2 w3", "w9", "w2"][sum(end <= cut for end in ends) :]


@pytest.mark.parametrize("line,given,words", [
    ("{", TRL, "line 3 is no JSON with"),
    ('{"question": "w2"}', TRL, "line 3 is no JSON with"),
    ('{"question": "w2", "solutions": [[1]]}', TRL, "line 3: a solution must be"),
    ('{"question": "w2", "solutions": 5}', TRL, 'line 3: "solutions" must be a list'),
    ('{"question": "w2", "solutions": null}', TRL, 'line 3: "solutions" must be a list'),
    ('{"question": "w2", "solutions": "w3"}', TRL, 'line 3: "solutions" must be a list'),
    ('{"question": "w2", "solutions": [null]}', TRL, "line 3: a solution must be"),
    ('{"question": 5, "solutions": []}', TRL, "line 3: a solution must be"),
    ("[" * 100_000, TRL, "line 3 is nested too deeply"),
    ("\udce9", TRL, "line 3 is not UTF-8"),
    ("", ["--family", "rlhflow"], "RLHFlow: the tokenizer has no chat template"),
])  # fmt: skip
def test_score_errors_are_one_line(capsys, reward, questions, tmp_path, line, given, words):
    said = f"{json.dumps(QUESTIONS[0])}\n\n{line}"
    questions.write_bytes(said.encode("utf-8", "surrogateescape"))
    code, _, err = run(capsys, "score", reward, questions, *given)
    assert (code, len(err)) == (1, 1), err
    assert words in err[0] and ("line" not in words or f"input {questions}: " in err[0])


@pytest.mark.parametrize("said", [
    "something else\n", "no newline", "{", '{"settings"', '{"settings": {}}\n', "{}\n",
    '{"input": "00000000"}\n', '{"settings": {"kvtools": "0.1.0"}, "input": "0"}\nmy notes',
    '{"settings": {"kvtools": "0.1.0"}}\n', "\n", "[" * 100_000, "\x89PNG\r\n\x1a\n\0",
])  # fmt: skip
def test_score_touches_no_other_file(capsys, reward, questions, tmp_path, said):
    output = tmp_path / "mine"
    output.write_text(said, newline="")
    for path in (output, questions):  # the input itself, too
        before = path.read_bytes()
        code, out, err = run(capsys, "score", reward, questions, *TRL, "--output", path)
        assert (code, out, len(err)) == (2, "", 1), err
        assert f"--output {path}" in err[0] and path.read_bytes() == before


def test_score_keeps_results_of_other_settings(capsys, reward, questions, tmp_path):
    output = tmp_path / "out.jsonl"
    run(capsys, "score", reward, questions, *TRL, "--output", output)
    before = output.read_bytes()
    other = shutil.copytree(reward, tmp_path / "other")
    for model, given, words in (
        (reward, [*TRL, "--bits", 8], "was made with cache={}, not {'bits': 8}"),
        (reward, [*TRL, "--dtype", "bfloat16"], "dtype='auto', not 'bfloat16'"),
        (reward, ["--family", "trl", "--separator", "w2"], "separator='|', not 'w2'"),
        (reward, [*TRL, "--reference-quirks"], "reference_quirks=False, not True"),
        (other, TRL, "model="),
    ):
        code, _, err = run(capsys, "score", model, questions, *given, "--output", output)
        assert (code, len(err)) == (2, 1) and words in err[0] and str(output) in err[0], err
        assert output.read_bytes() == before
    for text, words in (
        (questions.read_text().replace("w9", "w8"), "line 3 is not the one that was scored"),
        (json.dumps(QUESTIONS[0]), "the output has 3 records, the input 1"),
    ):
        questions.write_text(text)
        code, _, err = run(capsys, "score", reward, questions, *TRL, "--output", output)
        assert code == 1 and words in err[0], err
        assert output.read_bytes() == before


def test_two_writers_of_scores(capsys, reward, questions, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    output = tmp_path / "out.jsonl"
    with output.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = run(capsys, "score", reward, questions, *TRL, "--output", output)
        assert (code, len(err)) == (1, 1) and "another process writes to it" in err[0]
        assert output.read_text() == ""
    code, _, err = run(capsys, "score", reward, questions, *TRL, "--output", output)
    assert (code, err) == (0, [])


def test_a_failed_run_leaves_no_output(capsys, reward, questions, tmp_path):
    questions.write_text("{")
    code, _, _ = run(capsys, "score", reward, questions, *TRL, "--output", tmp_path / "out.jsonl")
    assert code == 1 and not (tmp_path / "out.jsonl").exists()


SAMPLE = ["-n", 6, "--rows", 4, "--max-new-tokens", 9, "--seed", 3]


@pytest.fixture
def some(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "w2 w3", "id": "a"}, {"question": "w9 w8", "answer": 4}, {"prompt": "w5"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    return path


def drawn(out):
    return {(x["input"], x["number"]): x["text"] for x in map(json.loads, out.splitlines())}


def test_sample(capsys, tiny, some):
    code, out, err = run(capsys, "sample", tiny, some, *SAMPLE, "--tokens")
    assert (code, err) == (0, [])
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(drawn(out)) == 18 and "settings" in found[0]
    assert collections.Counter(x.get("id") for x in found) == {"a": 6, None: 12}
    for x in found:
        assert len(x["tokens"]) == len(x["logprobs"]) == x["length"] <= 9
        assert x["why"] == ("eos" if x["tokens"][-1] == 1 else "length")
        assert x["logprob"] == pytest.approx(sum(x["logprobs"]))
    for rows in (1, 64):
        _, again, _ = run(capsys, "sample", tiny, some, *SAMPLE, "--rows", rows)
        assert drawn(again) == drawn(out)
    _, other, _ = run(capsys, "sample", tiny, some, *SAMPLE, "--seed", 4)
    assert drawn(other) != drawn(out)


def test_sample_goes_on(capsys, tiny, some, tmp_path):
    """Wherever it was cut off: nothing is lost, and nothing is there twice."""
    output = tmp_path / "out.jsonl"
    assert run(capsys, "sample", tiny, some, *SAMPLE, "--output", output)[:2] == (0, "")
    whole = output.read_text()
    ends = [i + 1 for i, x in enumerate(whole) if x == "\n"]
    for cut in (0, 30, 250, ends[0], ends[0] + 20, ends[7], ends[11] + 1, ends[17]):
        output.write_text(whole[:cut])
        code, _, err = run(capsys, "sample", tiny, some, *SAMPLE, "--output", output)
        assert (code, err) == (0, []), cut
        text = output.read_text()
        kept = max([end for end in ends if end <= cut], default=0)
        assert text[:kept] == whole[:kept] and len(text.splitlines()) == 18
        assert drawn(text) == drawn(whole)
    before = output.read_bytes()
    some.write_text(some.read_text().replace("w9", "w7"))
    code, _, err = run(capsys, "sample", tiny, some, *SAMPLE, "--output", output)
    assert code == 2 and f"--output {output} is of another input" in err[0]
    code, _, err = run(capsys, "sample", tiny, some, *SAMPLE, "--output", output, "-n", 7)
    assert code == 2 and "was made with n=6, not 7" in err[0]
    assert output.read_bytes() == before


def test_sample_within_a_budget(capsys, tiny, some, tmp_path):
    output = tmp_path / "out.jsonl"
    _, out, _ = run(capsys, "sample", tiny, some, *SAMPLE)
    given = ["sample", tiny, some, *SAMPLE, "--output", output]
    runs = 0
    while not output.exists() or len(output.read_text().splitlines()) < 18:
        code, _, err = run(capsys, *given, "--max-tokens", 40)
        assert code == 0 and (not err or "the budget has cut off" in err[0])
        runs += 1
    assert 2 <= runs < 18 and drawn(output.read_text()) == drawn(out)


def test_sample_until_correct(capsys, tiny, some, monkeypatch, tmp_path):
    """A verdict ends a prompt's samples, also of a run that goes on."""

    _, out, _ = run(capsys, "sample", tiny, some, *SAMPLE)
    monkeypatch.setattr(sample, "verdict", lambda lines: lambda x: "w2" in x.text.split())
    output = tmp_path / "out.jsonl"
    given = ["sample", tiny, some, *SAMPLE, "--until-correct", 1, "--rows", 2]
    assert run(capsys, *given, "--output", output)[0] == 0
    whole = output.read_text()
    found = [json.loads(x) for x in whole.splitlines()]
    assert {(x["input"], x["number"]): x["text"] for x in found}.items() <= drawn(out).items()
    for mark in {x["input"] for x in found}:
        said = [x["correct"] for x in found if x["input"] == mark]
        assert True not in said[:-1] and (said[-1] or len(said) == 6)
    assert any(x["correct"] for x in found) and len(found) < 18
    assert run(capsys, *given, "--output", output)[0] == 0
    assert output.read_text() == whole


def test_verdicts():
    from kvtools.cli.sample import verdict

    correct = verdict([{"text": "q", "answer": 5}, {"text": "q", "answer": None}])
    for prompt, text, right in (
        (0, "2 + 3 = 5. The answer is 5.", True), (0, "The answer is 6.", False),
        (0, "2 + 3 = 5", False), (0, "2 + 2 = 5. The answer is 5.", False), (0, "five", False),
        (1, "2 + 3 = 5", True), (1, "2 + 2 = 5", False), (1, "five", False),
    ):  # fmt: skip
        assert correct(SimpleNamespace(prompt=prompt, text=text)) is right, text


def test_sample_stops(capsys, tiny, some):
    _, out, _ = run(capsys, "sample", tiny, some, *SAMPLE)
    _, cut, _ = run(capsys, "sample", tiny, some, *SAMPLE, "--stop", "w2", "--stop", "w3")
    for key, text in drawn(out).items():
        words = text.split()
        end = next((i + 1 for i, w in enumerate(words) if w[:2] in ("w2", "w3")), len(words))
        assert drawn(cut)[key].split() == words[:end]


def test_stops_of_many_bytes():
    """A letter may be several tokens."""
    bytewise = SimpleNamespace(decode=lambda tokens: bytes(tokens).decode(errors="replace"))
    for stop in ("a", "答えは四十二です", "🙂🙃🙂🙃"):
        until = sample.ends(bytewise, ["zz", stop])
        said = list(f"この{stop}".encode())
        assert [until(said[:n]) for n in range(1, len(said) + 1)] == [False] * (len(said) - 1) + [
            True
        ]


def test_quality_keeps_results_of_other_settings(tiny, capsys, tmp_path):
    words = " ".join(f"w{2 + i * i % 27}" for i in range(140))
    given = ["--probe", "--prompt", words, "--presets", "lossless", "--json", tmp_path / "out.json"]
    assert run(capsys, "quality", tiny, *given)[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    for more, said in ((["--length", 900], "items="), (["--dtype", "bfloat16"], "dtype='auto'")):
        code, _, err = run(capsys, "quality", tiny, *given, *more)
        assert code == 2 and f"--json {tmp_path / 'out.json'} was made with {said}" in err[0]
        assert (tmp_path / "out.json").read_bytes() == before


@pytest.mark.parametrize("old,new", [("a" * 999 + "b", "a" * 999 + "c"), ("x", "y" * 999)])
def test_long_settings_are_cut_to_where_they_differ(tmp_path, old, new):
    results.write(tmp_path / "r.json", json.dumps({"items": old}))
    with pytest.raises(ValueError, match="was made with items=") as caught:
        results.claim(tmp_path / "r.json", {"items": new})
    said = str(caught.value).removeprefix(str(tmp_path))
    assert len(said) < 260
    was, now = said.partition(" was made with items=")[2].split(", not ")
    assert old[-1] in was.strip(".") and new[-1] in now and was != now


def test_files_are_written_whole(tmp_path, monkeypatch):
    path, link = tmp_path / "out.json", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    with monkeypatch.context() as patched:
        patched.setattr(results.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            results.write(path, "after")
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    results.write(link, "after")
    assert link.is_symlink() and path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.iterdir())) == 2
    results.write(tmp_path / "../" / tmp_path.name / "new", "x")
    assert (tmp_path / "new").read_text() == "x"
