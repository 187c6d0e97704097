"""lm-evaluation-harness: the model type `kvtools` against `hf`, on a task that a model of this
repository can do."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from models import Counter  # noqa: E402

from kvtools import tasks  # noqa: E402
from kvtools.integrations.lm_eval import KVToolsLM  # noqa: E402

RECALL = Path(__file__).parents[2] / "bench/models/recall"


@pytest.fixture(scope="module")
def recall(tmp_path_factory, tokenizer):
    """A folder with the model and a tokenizer; its answers are far from ties."""
    folder = tmp_path_factory.mktemp("recall")
    model = transformers.AutoModelForCausalLM.from_pretrained(RECALL, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Values of keys that are hidden in a text; four questions with answers stand before each.
    Answered freely, and chosen among digits."""
    rng = random.Random(1)
    pairs = tasks.key_values(24, tasks.DIGITS, rng)
    text = tasks.document(500, pairs, rng).decode("latin1")
    docs = [{"key": key, "value": value} for key, value in pairs.items()]
    folder = tmp_path_factory.mktemp("task")
    for name, some in (("shots", docs[:4]), ("asked", docs[4:])):
        lines = "".join(json.dumps(doc) + "\n" for doc in some)
        (folder / f"{name}.jsonl").write_text(lines)
    common = dict(
        dataset_path="json",
        dataset_kwargs=dict(
            data_files={x: str(folder / f"{x}.jsonl") for x in ("shots", "asked")},
            cache_dir=str(folder),
        ),
        test_split="asked", fewshot_split="shots", fewshot_config=dict(sampler="first_n"),
        num_fewshot=4, description=text, doc_to_text="?{{key}}", target_delimiter="",
        fewshot_delimiter="",
    )  # fmt: skip
    return {
        "free": dict(
            common, task="free", output_type="generate_until", doc_to_target="{{value}}",
            generation_kwargs=dict(until=["?"], max_gen_toks=4, do_sample=False),
            metric_list=[dict(metric="exact_match")],
        ),
        "choice": dict(
            common, task="choice", output_type="multiple_choice", doc_to_target="{{value}}",
            doc_to_choice=list(tasks.DIGITS),
        ),
        "loglikelihood": dict(
            common, task="loglikelihood", output_type="loglikelihood",
            doc_to_target="{{value}}?", metric_list=[dict(metric="acc"), dict(metric="perplexity")],
        ),
    }  # fmt: skip


def run(lm, configs, **options):
    """Scores and answers of each task, and tokens encoded."""
    with Counter(lm.model) as count:
        found = lm_eval.simple_evaluate(
            lm, tasks=[dict(x) for x in configs], bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False), **options,
        )  # fmt: skip
    scores = {
        (task, name): value
        for task, each in found["results"].items()
        for name, value in each.items()
        if isinstance(value, float)
    }  # fmt: skip
    answers = {name: [x["filtered_resps"] for x in each] for name, each in found["samples"].items()}
    return scores, answers, sum(count.forwards)


@pytest.mark.parametrize(
    "task, metric", [("free", "exact_match,none"), ("choice", "acc,none"),
                     ("loglikelihood", "perplexity,none")],
)  # fmt: skip
def test_scores_are_those_of_hf(task, metric, recall, configs, record):
    options = dict(pretrained=str(recall), dtype="float32", device="cpu", batch_size=10)
    wanted, answers, plain = run(HFLM(**options), [configs[task]])
    scores, ours, tokens = run(KVToolsLM(**options), [configs[task]])
    assert scores == pytest.approx(wanted, rel=1e-4)
    assert wanted[task, metric] > 0.5
    if task == "free":
        assert ours == answers
    else:
        for got, want in zip(ours[task], answers[task], strict=True):
            for (logprob, greedy), (stock, best) in zip(got, want, strict=True):
                assert logprob == pytest.approx(stock, abs=1e-4) and greedy == best
    assert plain >= 3 * tokens, (plain, tokens)
    kind = configs[task]["output_type"]
    record(
        "lm_eval", f"`{kind}`, 4 shots, batches of 10, tokens encoded by `hf` over ours",
        f"scores of `hf`; {plain / tokens:.1f}", plain / tokens, 3,
    )  # fmt: skip


def test_repeats_share_their_prompt(recall, configs):
    options = dict(pretrained=str(recall), dtype="float32", device="cpu", batch_size=8)
    configs = [configs["free"] | dict(repeats=4)]
    _, answers, _ = run(HFLM(**options), configs, limit=4)
    _, ours, tokens = run(KVToolsLM(**options), configs, limit=4)
    assert ours == answers and tokens < 2 * 600


@pytest.mark.parametrize("task", ["free", "choice"])
def test_a_lossy_cache_counts(task, recall, configs):
    """Also where nothing is generated: the uncompressed model is not what is measured."""
    options = dict(pretrained=str(recall), dtype="float32", device="cpu", batch_size=10)
    longer = dict(until=["\n"], max_gen_toks=16, do_sample=False)
    config = configs[task] | (dict(generation_kwargs=longer) if task == "free" else {})
    lm = KVToolsLM(**options, bits=2, recent_bits="fp8", sinks=0)
    assert (lm.kv_config.bits, lm.kv_config.recent_bits) == (2, "fp8")
    _, wanted, _ = run(KVToolsLM(**options), [config])
    _, answers, _ = run(lm, [config])
    if task == "choice":
        exact, lossy = (
            torch.tensor([[a for a, _ in x] for x in y[task]]) for y in (wanted, answers)
        )
        assert (exact - lossy).abs().max() > 0.1
    else:
        assert answers != wanted


def test_long_texts_are_cut_as_by_hf(recall, configs):
    """To max_length, on the left; and a rolling likelihood in windows."""
    options = dict(pretrained=str(recall), dtype="float32", device="cpu", batch_size=4)
    texts = ["".join(map(chr, range(97, 123))) * 3, "short"]
    pairs = [(text, " then") for text in texts] + [("", "abc"), (texts[0], " else")]
    found = []
    for kind in (HFLM, KVToolsLM):
        lm = kind(**options, max_length=32)
        asked = [instance("loglikelihood", x) for x in pairs]
        rolled = [instance("loglikelihood_rolling", (x,)) for x in texts]
        found.append([*lm.loglikelihood(asked), *lm.loglikelihood_rolling(rolled)])
    for got, want in zip(*reversed(found), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    with pytest.raises(ValueError, match="continuation of 40 tokens is longer than max_length=32"):
        lm.loglikelihood([instance("loglikelihood", ("a", "b" * 40))])


def instance(kind, arguments):
    return lm_eval.api.instance.Instance(kind, {}, arguments, 0)


@pytest.mark.parametrize(
    "options, message",
    [(dict(bits=5), "bits=5 does not exist"), (dict(preset="tiny"), "preset 'tiny'"),
     (dict(budget=3), "budget=3 must be")],
)  # fmt: skip
def test_bad_options_are_named_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        KVToolsLM("nowhere", **options)


def test_command_line(recall, configs, tmp_path):
    import yaml

    (tmp_path / "free.yaml").write_text(yaml.safe_dump(configs["free"]))
    said = subprocess.run(
        [sys.executable, "-m", "kvtools.integrations.lm_eval", "run", "--model", "kvtools",
         "--model_args", f"pretrained={recall},dtype=float32,preset=balanced,bits=8",
         "--include_path", str(tmp_path), "--tasks", "free", "--batch_size", "8",
         "--limit", "4", "--device", "cpu", "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-1000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())
    assert found["config"]["model"] == "kvtools" and found["config"]["model_args"]["bits"] == 8
    assert 0.5 < found["results"]["free"]["exact_match,none"] <= 1
