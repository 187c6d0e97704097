"""Samples of many prompts on the machines of a Ray cluster, or on this one:

    python ray_samples.py MODEL prompts.jsonl samples.jsonl --workers 4 --gpus 1

The same command goes on where it was cut off.
"""

import argparse
import json
from pathlib import Path

import ray
from ray.util import ActorPool
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvtools
from kvtools import records


# One that is lost with its machine begins again elsewhere, and so does what it was drawing.
@ray.remote(max_restarts=-1, max_task_retries=2)
class Sampler:
    def __init__(self, name: str, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name).eval().to(device)

    def sample(self, prompts: dict[str, str], skip: set, seed: int, n: int, tokens: int) -> list:
        ids, marks = [self.tokenizer(x)["input_ids"] for x in prompts.values()], list(prompts)
        rollouts = kvtools.Rollouts(self.model, temperature=0.8, seed=seed)
        options = dict(max_new_tokens=tokens, skip=skip, tokenizer=self.tokenizer)
        return [
            {"input": marks[x.prompt], "number": x.number, "text": x.text, "why": x.why}
            for x in rollouts.sample(ids, n, **options)
        ]


def read(path: Path) -> list[str]:
    """The column "prompt" of JSON lines, or of Parquet."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path, columns=["prompt"])["prompt"].to_pylist()
    with path.open("rb") as lines:
        return [json.loads(line)["prompt"] for _, line in records.text_lines(lines)]


def main(
    model: str,
    prompts: str,
    output: str,
    n: int = 16,
    tokens: int = 256,
    block: int = 8,
    seed: int = 0,
    workers: int = 1,
    gpus: float = 0,
) -> int:
    """Draw what is missing of `n` samples of each prompt; says how many that were."""
    texts = {f"{i}:{records.checksum(x)}": x for i, x in enumerate(read(Path(prompts)))}
    settings = dict(
        kvtools=kvtools.__version__, model=model, n=n, tokens=tokens, block=block, seed=seed
    )
    # Only this process writes, so that machines need no folder in common.
    with records.opened(Path(output), settings) as (sink, done):
        have, jobs = {(x["input"], x["number"]) for x in done}, []
        if not {mark for mark, _ in have} <= texts.keys():
            raise ValueError(f"{output} is of other prompts: name a new output")
        for begin in range(0, len(texts), block):
            some = dict(list(texts.items())[begin : begin + block])
            skip = {(i, k) for i, mark in enumerate(some) for k in range(n) if (mark, k) in have}
            if len(skip) < n * len(some):
                # Noise by block and place in it: the same, whoever draws, and whatever is there.
                jobs.append((some, skip, seed + begin // block, n, tokens))
        ray.init(ignore_reinit_error=True)  # a cluster's if RAY_ADDRESS says so
        made, device = Sampler.options(num_cpus=1, num_gpus=gpus), "cuda" if gpus else "cpu"
        actors = [made.remote(model, device) for _ in range(min(workers, len(jobs)))]
        drawn = 0
        try:
            draws = ActorPool(actors).map_unordered(lambda x, job: x.sample.remote(*job), jobs)
            for found in draws:
                for x in found:
                    first = {} if done or drawn else {"settings": settings}
                    sink.write(json.dumps(first | x) + "\n")
                    drawn += 1
                sink.flush()
        finally:
            for actor in actors:  # each holds a processor for as long as it is there
                ray.kill(actor)
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "prompts", "output"):
        parser.add_argument(name)
    for name, default in dict(n=16, tokens=256, block=8, seed=0, workers=1, gpus=0.0).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    print(main(**vars(parser.parse_args())), "samples drawn")
