// The kernels of csrc/cuda; `stream` is a cudaStream_t.
#pragma once

#include "../params.h"

namespace kvtools::cuda {

// What the launches of `sample` leave for one another; see sampling.cu.
struct Sampling {
  static constexpr int kGroup = 256, kBins = 128;
  struct Group {
    // The greatest z; sum of e^(z - peak); the greatest e^(z + noise - peak), or 0 if too low.
    float peak, sum, bound;
  };
  Sample p;
  Group* group;             // [b, v / kGroup, rounded up]
  unsigned long long* bin;  // [b, kBins]
};

void quantize_kv(const QuantizeKv&, void* stream);
void append_kv(const AppendKv&, void* stream);
void select_victims(const SelectVictims&, void* stream);
void step_scores(const StepScores&, void* stream);
void sample(const Sampling&, void* stream);

// Needs tree_attention_scratch bytes at `scratch`.
void tree_attention(const TreeAttention&, void* stream);
int64_t tree_attention_scratch(const TreeAttention&);

}  // namespace kvtools::cuda
