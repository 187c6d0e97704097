#!/usr/bin/env bash
# Collects what bench.gpu compares with and a machine without network lacks: bench/gpu_rivals.sh OUT.tar.xz (30 MB)
# FlashInfer for Python 3.12, its kernels compiled for Hopper beforehand, and FlashAttention-3 out of vLLM's wheel.
# Unpack it into a folder of PYTHONPATH. Needs nvcc 13, and python3 (PYTHON) with torch; takes an hour on two cores.
set -euo pipefail

out=$(realpath -m "$1")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir -p "$site" "$work/stubs" "$(dirname "$out")"
cd "$work"

fetch() { "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 "$@" -d .; }
fetch --platform manylinux_2_28_x86_64 flashinfer-python==0.7.2.post1 apache-tvm-ffi==0.1.15.post2
fetch --platform manylinux_2_28_x86_64 --abi abi3 vllm==0.33.0
fetch --platform manylinux_2_27_x86_64 nvidia-curand==10.4.5.25
"$python" -m pip install -q --no-deps --target deps apache-tvm-ffi==0.1.15.post2 certifi charset-normalizer click einops filelock \
  idna ninja nvidia-ml-py packaging requests tabulate tqdm urllib3

unzip -q flashinfer_python-*.whl -d "$site"
unzip -q apache_tvm_ffi-*.whl -d "$site"
unzip -q vllm-*.whl 'vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so' 'vllm-*.dist-info/METADATA' -d vllm
mv vllm/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so vllm/vllm-*.dist-info "$site"

# FlashInfer takes modules from data/aot as they are; of its sources it then only reads the templates.
data=$site/flashinfer/data
unzip -q -j nvidia_curand-*.whl '*/curand*.h' -d "$data/include"
gcc -shared -Wl,-soname,libcuda.so.1 -x c /dev/null -o stubs/libcuda.so
cat > build.py << 'EOF'
import shutil

import torch
from flashinfer.jit.attention import modules
from flashinfer.jit.cascade import gen_cascade_module
from flashinfer.jit.sampling import gen_sampling_module
from flashinfer.jit.topk import gen_topk_module

kinds = (*[torch.bfloat16] * 3, torch.int32, 128, 128, 0, False, False, False)
for spec in (
    gen_cascade_module(),
    gen_sampling_module(),
    gen_topk_module(),
    modules._gen_batch_prefill_primary_module("fa2", *kinds),
    modules.gen_batch_prefill_module("fa3", *kinds),
):
    spec.build()
    spec.aot_path.parent.mkdir(parents=True)
    shutil.copy(spec.jit_library_path, spec.aot_path)
EOF
export CUDA_HOME=${CUDA_HOME:-$(ls -d /usr/local/cuda-13* | head -n 1)} LIBRARY_PATH=$work/stubs
export FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_WORKSPACE_BASE=$work
PATH=$work/deps/bin:$PATH PYTHONPATH=$work/deps:$site "$python" build.py

cd "$data"
find . -mindepth 1 -maxdepth 1 ! -name aot ! -name csrc -exec rm -rf {} +
find csrc -mindepth 1 -maxdepth 1 ! -name 'batch_prefill*' -exec rm -rf {} +
tar -C "$site" --exclude=__pycache__ -c . | xz -3 -T 0 > "$out"
ls -l "$out"
