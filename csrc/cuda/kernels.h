// The kernels of csrc/cuda; `stream` is a cudaStream_t.
#pragma once

#include "../params.h"

namespace kvtools::cuda {

void quantize_kv(const QuantizeKv&, void* stream);
void append_kv(const AppendKv&, void* stream);
void select_victims(const SelectVictims&, void* stream);
void step_scores(const StepScores&, void* stream);

}  // namespace kvtools::cuda
