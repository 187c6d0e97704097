"""One vLLM engine in a process of its own: reads a run on stdin, prints what came as JSON.

A run has `model`, `engine` (arguments of `LLM`) and `requests`: a list of `prompt` ids, `n`, and
`sampling`; without that, tokens are the likeliest. `first` has the log-probabilities that
`sampling` asks for of each row's first token.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    run = json.load(sys.stdin)
    llm = LLM(
        run["model"], skip_tokenizer_init=True, disable_log_stats=False, seed=0, **run["engine"]
    )
    common = dict(max_tokens=run["new"], logprobs=0, ignore_eos=True, detokenize=False)
    likeliest = dict(top_k=1)  # vLLM takes no n > 1 for temperature 0
    params = [
        SamplingParams(n=x["n"], **common | x.get("sampling", likeliest)) for x in run["requests"]
    ]
    prompts = [{"prompt_token_ids": x["prompt"]} for x in run["requests"]]
    rows = [x for out in llm.generate(prompts, params, use_tqdm=False) for x in out.outputs]
    metrics = {x.name: x.value for x in llm.get_metrics() if hasattr(x, "value")}
    kinds = llm.collective_rpc(attention)[0]
    print(
        json.dumps(
            {
                "tokens": [list(x.token_ids) for x in rows],
                "logprobs": [
                    [at[token].logprob for token, at in zip(x.token_ids, x.logprobs, strict=True)]
                    for x in rows
                ],
                "first": [[[i, y.logprob] for i, y in x.logprobs[0].items()] for x in rows],
                "preemptions": metrics["vllm:num_preemptions"],
                "prefix_hits": metrics["vllm:prefix_cache_hits"],
                "attention": kinds,
                "loaded": [x for x in sys.modules if x.partition(".")[0] == "kvtools"],
                "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            }
        )
    )


def attention(worker: object) -> list[str]:
    """Classes of the model's attention; a function that vLLM runs in its worker."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sorted({f"{type(x.impl).__module__}.{type(x.impl).__name__}" for x in layers})


if __name__ == "__main__":
    main()
