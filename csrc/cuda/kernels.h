// The kernels of csrc/cuda; `stream` is a cudaStream_t.
#pragma once

#include "../params.h"

namespace kvtools::cuda {

void quantize_kv(const QuantizeKv&, void* stream);
void append_kv(const AppendKv&, void* stream);

// Needs tree_attention_scratch bytes at `scratch`.
void tree_attention(const TreeAttention&, void* stream);
int64_t tree_attention_scratch(const TreeAttention&);

}  // namespace kvtools::cuda
