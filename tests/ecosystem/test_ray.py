"""Ray: the recipe for many prompts on several machines, on one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

ray = pytest.importorskip("ray")

from examples import EXAMPLES, example  # noqa: E402

SMALL = dict(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
OPTIONS = dict(n=4, tokens=24, block=2)


@pytest.fixture(scope="module")
def cluster():
    ray.init(**SMALL)
    yield
    ray.shutdown()


@pytest.fixture
def recipe(tmp_path, tokenizer, model, words):
    """The recipe's function over a model in a folder, from seven prompts to an output of this
    name: how many samples it drew, and what lines there are."""
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = words(*range(5, 12))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in texts))

    def run(name="out.jsonl", prompts="in.jsonl", **options):
        output = tmp_path / name
        drawn = example("ray_samples").main(
            str(tmp_path), str(tmp_path / prompts), str(output), **OPTIONS | options
        )
        return drawn, lines(output)

    run.folder, run.texts = tmp_path, texts
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(found):
    """Each sample once, and what it says."""
    assert max(Counter((x["input"], x["number"]) for x in found).values()) == 1
    return {(x["input"], x["number"]): (x["text"], x["why"]) for x in found}


def test_samples_are_the_same_whoever_draws_them(cluster, recipe, monkeypatch, record):
    """One actor or two, of which one is killed; from JSON lines or Parquet; at once or cut off."""
    import pandas

    count, found = recipe()
    wanted = drawn(found)
    assert count == len(wanted) == 7 * 4 and len(set(wanted.values())) > 20
    pandas.DataFrame({"prompt": recipe.texts}).to_parquet(recipe.folder / "in.parquet")
    stock, killed = ray.util.ActorPool.map_unordered, []

    def killing(pool, send, jobs):
        for x in stock(pool, send, jobs):
            if not killed:
                (_, actor), *_ = pool._future_to_actor.values()
                ray.kill(actor, no_restart=False)
                killed.append(True)
            yield x

    with monkeypatch.context() as context:
        context.setattr(ray.util.ActorPool, "map_unordered", killing)
        count, found = recipe("two.jsonl", "in.parquet", workers=2)
    assert killed and count == 28 and drawn(found) == wanted
    text = (recipe.folder / "two.jsonl").read_text()
    cut = text[: len(text) // 2]  # in a line, in a block
    (recipe.folder / "two.jsonl").write_text(cut)
    count, found = recipe("two.jsonl")
    assert count == 28 - cut.count("\n") and drawn(found) == wanted
    assert recipe("two.jsonl") == (0, found)
    assert {x["State"] for x in ray._private.state.actors().values()} == {"DEAD"}  # none is left
    record(
        "ray",
        "recipe: from JSON lines; from Parquet, one of two actors killed; cut off and run again",
        "same samples",
    )

    with pytest.raises(ValueError, match="made with n=4, not 2: name a new output"):
        recipe("two.jsonl", n=2)
    (recipe.folder / "in.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(ValueError, match="is of other prompts: name a new output"):
        recipe("two.jsonl")
    assert lines(recipe.folder / "two.jsonl") == found


@pytest.mark.long
def test_driver_killed(recipe, record):
    """Not asked to stop, but killed, with all of its Ray: the next run goes on."""
    output = recipe.folder / "out.jsonl"
    code = (
        f"import sys, ray; sys.path.insert(0, {str(EXAMPLES)!r}); ray.init(**{SMALL}); "
        "import ray_samples; print(ray_samples.main(*sys.argv[1:4], **"
        f"{OPTIONS | dict(block=1, tokens=200)}))"
    )
    names = [str(recipe.folder), str(recipe.folder / "in.jsonl"), str(output)]
    begin = [sys.executable, "-c", code, *names]
    first = subprocess.Popen(begin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (output.exists() and output.stat().st_size):
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    there = output.read_text().count("\n")
    assert 0 < there < 28
    second = subprocess.run(begin, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr[-2000:]
    assert int(second.stdout.split()[-1]) == 28 - there
    assert len(drawn(lines(output))) == 28
    record("ray", "recipe: its driver killed, and run again", "nothing lost, nothing doubled")
