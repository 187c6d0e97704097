"""The command line: what it prints, and one line for what the user can put right."""

import collections
import io
import json

import pytest

from kvtools import cli, demo, models, search_command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of 2 layers and a tokenizer of 32 words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 32)}
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
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny")
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
    given = ["--prompt", "w2 w3 w4", "-n", 2, "--max-new-tokens", 5, "--greedy"]
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


ERRORS = {
    "no prompt": ([], "required"),
    "two prompts": (["--prompt", "w2", "--prompt-file", "x"], "not allowed with"),
    "missing file": (["--prompt-file", "/no/such/file"], "no such file"),
    "empty prompt": (["--prompt", " "], "prompt is empty"),
    "n of zero": (["--prompt", "w2", "-n", 0], "1 or more"),
    "bad bits": (["--prompt", "w2", "--bits", 5], "bits"),
    "bad policy": (["--prompt", "w2", "--policy", "none-such"], "policy"),
    "small budget": (["--prompt", "w2", "--budget", 2], "budget"),
    "bad dtype": (["--prompt", "w2", "--dtype", "float33"], "float33"),
    "no chat template": (["--prompt", "w2", "--chat"], "--chat"),
    "bad top_p": (["--prompt", "w2", "--top-p", 2], "--top-p"),
    "unknown option": (["--prompt", "w2", "--beams", 2], "--beams"),
}


@pytest.mark.parametrize("given,words", ERRORS.values(), ids=ERRORS)
def test_user_errors_are_one_line(capsys, tiny, given, words):
    code, out, err = run(capsys, "generate", tiny, *given)
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("kvtools") and words in err[0]


def test_unknown_model(capsys, tmp_path):
    pytest.importorskip("transformers")
    for folder in (tmp_path / "none", tmp_path):
        code, _, err = run(capsys, "generate", folder, "--prompt", "w2")
        assert (code, len(err)) == (2, 1), err
        assert str(folder) in err[0]


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", "/no/such", "--prompt", "w2", "--debug"])


def test_missing_package_names_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "generate", "smollm2", "--prompt", "w2")
    assert (code, err) == (2, ["kvtools: transformers is not installed: pip install 'kvtools[hf]'"])


def test_literal():
    texts = ("4", "0.5", "fp8", "0.5,1.5", "none")
    assert [cli.literal(text) for text in texts] == [4, 0.5, "fp8", [0.5, 1.5], None]


def test_quality_probe(tiny, capsys, tmp_path):
    words = " ".join(f"w{2 + i * i % 29}" for i in range(140))
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


@pytest.mark.parametrize("argv,message", [
    (["--probe"], "give --prompt"),
    (["--probe", "--prompt", "w2 w3"], "the prompt has 2 tokens; a probe needs 128 or more"),
    (["--presets", "tiny"], "preset 'tiny' does not exist; expected lossless, balanced, max"),
])  # fmt: skip
def test_quality_errors_are_one_line(tiny, capsys, argv, message):
    code, _, err = run(capsys, "quality", tiny, *argv)
    assert code == 2 and len(err) == 1 and message in err[0]


@pytest.mark.parametrize("strategy", search_command.STRATEGIES)
def test_search(tiny, capsys, tmp_path, strategy):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "w2 w3", "answer": 4}\n\n{"question": "w5 w6 w7"}\n')
    given = ["--questions", path, "--strategy", strategy, "-n", 4, "--max-new-tokens", 12]
    given += ["--delimiter", "w9", "--delimiter", "w1", "--seed", 3, "--bits", 8]
    code, out, err = run(capsys, "search", tiny, *given, "--json")
    assert (code, err) == (0, [])
    result = json.loads(out)
    assert result["strategy"] == strategy and result["config"] == {"bits": 8}
    assert [row["question"] for row in result["questions"]] == ["w2 w3", "w5 w6 w7"]
    for row in result["questions"]:
        assert row["best"] in [c["text"] for c in row["candidates"]]
        assert all(c["scores"] for c in row["candidates"] if c["text"])
        assert all(c["finished"] for c in row["candidates"]) or strategy == "dvts"
        assert bool(row["trace"]) == (strategy != "best_of_n")
    assert result["generated"] > 0 and result["policy_s"] <= result["all_s"]
    again = json.loads(run(capsys, "search", tiny, *given, "--json")[1])
    assert again["questions"] == result["questions"]
    code, out, _ = run(capsys, "search", tiny, *given, "--batch", 1)
    assert code == 0 and out.startswith("--- w2 w3\n") and "generated" in out


@pytest.mark.parametrize("given,words", [
    ([], "required"), (["--prompt", "w2", "--strategy", "mcts"], "mcts"),
    (["--prompt", "w2", "--ess", 0.5], "--ess is not an option of --strategy beam"),
    (["--prompt", "w2", "-n", 5], "n=5 is not a positive multiple of beam=4"),
    (["--prompt", "w2", "--reduce", "median"], "reduce='median'"),
    (["--prompt", "w2", "--delimiter", ""], "delimiters"),
    (["--questions", "/no/such"], "no such file"), (["--questions", "FILE"], "line 2"),
    (["--questions", "EMPTY"], "no question"),
])  # fmt: skip
def test_search_errors_are_one_line(tiny, capsys, tmp_path, given, words):
    (tmp_path / "FILE").write_text('{"question": "w2"}\n{"answer": 2}\n')
    (tmp_path / "EMPTY").write_text("\n")
    given = [tmp_path / x if x in ("FILE", "EMPTY") else x for x in given]
    code, out, err = run(capsys, "search", tiny, *given)
    assert (code, out, len(err)) == (2, "", 1), err
    assert words in err[0]


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
    assert [[len(steps) for steps in x["probs"]] for x in found] == [[2, 0, 1], [3, 1], []]
    for x in found:
        for steps, last, least in zip(x["probs"], x["last"], x["min"], strict=True):
            assert (last, least) == ((steps[-1], min(steps)) if steps else (None, None))
    assert found[0]["sum_logit"][2] == pytest.approx(found[0]["margins"][2][0])

    output = tmp_path / "out.jsonl"
    code, printed, _ = run(capsys, "score", reward, questions, *TRL, "--output", output)
    assert (code, printed) == (0, "")
    assert output.read_text() == out


def test_score_goes_on(capsys, reward, questions, tmp_path, monkeypatch):
    """After it was cut off in the middle of a line."""
    from kvtools.prm import PRM

    output, scored, score = tmp_path / "out.jsonl", [], PRM.score
    run(capsys, "score", reward, questions, *TRL, "--output", output)
    whole = output.read_text()
    output.write_text(whole[: whole.index("\n") + 20])
    monkeypatch.setattr(
        PRM, "score", lambda self, q, *args, **how: scored.append(q) or score(self, q, *args, **how)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(questions.read_text()))
    code, _, err = run(capsys, "score", reward, "-", *TRL, "--output", output)
    assert (code, err) == (0, [])
    assert output.read_text() == whole
    assert scored == ["w9", "w2"]


@pytest.mark.parametrize("line,given,words", [
    ("{", TRL, "line 2 is no JSON with"),
    ('{"question": "w2"}', TRL, "line 2 is no JSON with"),
    ('{"question": "w2", "solutions": [[1]]}', TRL, "line 2: a solution must be"),
    ("", ["--separator", "|"], "--separator is for --family trl"),
    ("", ["--family", "eurus"], "--family eurus: expected qwen"),
    ("", ["--family", "rlhflow"], "RLHFlow: the tokenizer has no chat template"),
    ("", ["--bits", 5], "bits"),
])  # fmt: skip
def test_score_errors_are_one_line(capsys, reward, questions, tmp_path, line, given, words):
    questions.write_text(f"{json.dumps(QUESTIONS[0])}\n{line}")
    code, _, err = run(capsys, "score", reward, questions, *given)
    assert (code, len(err)) == (2, 1), err
    assert words in err[0]


def test_score_keeps_other_outputs(capsys, reward, questions, tmp_path):
    output = tmp_path / "out.jsonl"
    run(capsys, "score", reward, questions, *TRL, "--output", output)
    before = output.read_text()
    questions.write_text(questions.read_text().replace("w9", "w8"))
    code, _, err = run(capsys, "score", reward, questions, *TRL, "--output", output)
    assert code == 2 and "line 2 is not the one that was scored" in err[0]
    assert output.read_text() == before
    output.write_text("something else\n")
    code, _, err = run(capsys, "score", reward, questions, *TRL, "--output", output)
    assert code == 2 and "holds something else than scores" in err[0]
    code, _, err = run(capsys, "score", reward, tmp_path / "none.jsonl")
    assert code == 2 and "no such file" in err[0]
