// CUDA, or what stands for it where a CPU runs the kernels (csrc/testing), and how they are
// launched.
#pragma once

#include "../params.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// `name`, a Type in the shared memory that `launch` provides.
#define KVTOOLS_SHARED(Type, name)                               \
  extern __shared__ __align__(16) unsigned char shared_memory[]; \
  Type& name = *reinterpret_cast<Type*>(shared_memory)
#else
#include "../testing/cuda_on_host.h"

#define KVTOOLS_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(::kvtools::testing::shared_memory())
#endif

namespace kvtools::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffff;  // lanes
constexpr float kLog2e = 0x1.715476p0f;

// Blocks of `warps` for a warp per row.
inline dim3 blocks_of(int64_t rows, int warps, unsigned y = 1) {
  return dim3(static_cast<unsigned>((rows + warps - 1) / warps), y);
}

#ifdef __CUDACC__
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}
#endif

// Dynamic shared memory that a block may have, in bytes.
inline int most_shared() {
#ifdef __CUDACC__
  int device, bytes;
  check(cudaGetDevice(&device), "most_shared");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "most_shared");
  return bytes;
#else
  return 99 << 10;  // where it is least, on sm_120
#endif
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
            size_t shared, void* stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  if (shared > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
#else
  static_cast<void>(stream);
  testing::run(name, blocks, dim3(threads), shared, [&] { kernel(arguments...); });
#endif
}

}  // namespace kvtools::cuda
