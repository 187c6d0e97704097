"""One SGLang engine on a CPU: reads a run on stdin, prints what came as JSON in the last line.

A run has `engine` (arguments of `Engine`) and `requests`: a list of `prompt` ids and `sampling`.
SGLang starts processes of its own, and what they need of GPUs is not here: so `sitecustomize` on
their path, which `site` writes, puts stand-ins in its place.
"""

import json
import os
import sys
from pathlib import Path

SITE = """
import sys
sys.path.insert(0, {tests!r})
import sglang_stubs
sglang_stubs.install()
import kvtools.serve as serve
made, plugin = serve._sglang_attention, serve.sglang_plugin
def attention(runner):
    backend = made(runner)
    print("made", type(backend).__module__, file=sys.stderr, flush=True)
    return backend
serve._sglang_attention = attention
if {sampler!r}:  # on a CPU SGLang knows only the sampler of this name
    def both():
        plugin()
        from sglang.srt.layers.sampler import register_sampler_backend
        register_sampler_backend("pytorch", serve._sglang_sampler)
    serve.sglang_plugin = both
"""


def site(folder: Path, sampler: bool) -> None:
    tests = str(Path(__file__).parent)
    (folder / "sitecustomize.py").write_text(SITE.format(tests=tests, sampler=sampler))


def main() -> None:
    import sglang

    run = json.load(sys.stdin)
    engine = sglang.Engine(
        device="cpu", skip_tokenizer_init=True, dtype="float32", log_level="info", random_seed=0,
        mem_fraction_static=0.9, disable_cuda_graph=True, **run["engine"],
    )  # fmt: skip
    try:
        rounds = [
            engine.generate(
                input_ids=[x["prompt"] for x in requests],
                sampling_params=[x["sampling"] | {"ignore_eos": True} for x in requests],
            )
            for requests in run["rounds"]
        ]
        info = engine.get_server_info()
    finally:
        engine.shutdown()
    found = {
        "tokens": [[x["output_ids"] for x in outs] for outs in rounds],
        "cached": sum(x["meta_info"]["cached_tokens"] for outs in rounds for x in outs),
        "attention": info["attention_backend"],
    }
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
