#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: the ninth model that a process compiles is refused.
#
# torch.compile allows eight versions of a function. `forward` of transformers' causal models is
# wrapped by a decorator for renamed arguments, and what the compiler sees is the wrapper, whose code
# is one for all classes. So the versions of Llama, of Qwen2 and of all others are counted together:
# eight models that have nothing in common use up the limit, and the next one, compiled once, raises
# under fullgraph=True. Without fullgraph it runs eagerly, with a line in the log.
#
# Hurts: test suites and benchmarks over many models, services that load one after another, and
# whoever looks for the recompilation in the model that failed.
# The right guess: the limit counts a model's own versions. Call torch.compiler.reset() between
# models, or raise torch._dynamo.config.recompile_limit.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
install() { venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
echo torch==2.13.0 >pins
install -c pins transformers==5.24.0 safetensors==0.8.0 tokenizers==0.23.3
cat >case.py <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2)
ids = torch.ones(1, 3, dtype=torch.long)


@torch.no_grad()
def compiled(kind, config, layers):
    """Compile a new model and run it once: 'ok' or the name of what is raised."""
    options = dict(num_hidden_layers=layers, num_key_value_heads=2)
    model = kind(config(**SIZES, **options)).eval()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    try:
        model(input_ids=ids, use_cache=False)
    except Exception as error:
        return type(error).__name__
    return "ok"


def qwen(layers):
    return compiled(Qwen2ForCausalLM, Qwen2Config, layers)


print("transformers", transformers.__version__, "torch", torch.__version__)
llamas = [compiled(LlamaForCausalLM, LlamaConfig, n) for n in range(1, 9)]
print("eight Llamas of 1 to 8 layers:", llamas)
after = qwen(1)
print("then one Qwen2:", after)
torch.compiler.reset()
alone = qwen(1)
print("one Qwen2 after a reset:", alone)
as_described = set(llamas) == {"ok"} and after == "FailOnRecompileLimitHit" and alone == "ok"
raise SystemExit(0 if as_described else "no longer as described")
EOF
venv/bin/python case.py
