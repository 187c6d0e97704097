// A stand-in for CUDA's driver, libcuda.so.1: it takes Triton's modules and launches as a Hopper
// GPU would, refuses those that the GPU would refuse, notes the arguments of the last, and runs
// nothing. tests/launches.py compares what it noted with what the launcher was called with.
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { kShared = 232448, kSharedByDefault = 49152, kMaxArguments = 256 };

static CUcontext context = (CUcontext)1;
static int expected;  // arguments of the next launch
static uint64_t arguments[kMaxArguments];
static char refused[256] = "";

// What a module holds: its one kernel, as far as launches go.
typedef struct {
  int shared;  // bytes that a launch may ask for
} Kernel;

// Says how many arguments the next launch has.
void stand_in_expect(int count) {
  expected = count;
  memset(arguments, 0, sizeof arguments);
}
const uint64_t* stand_in_arguments(void) { return arguments; }
const char* stand_in_refused(void) { return refused; }

static CUresult refuse(const char* why) {
  strncpy(refused, why, sizeof refused - 1);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* x) {
  *x = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* x) {
  *x = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext x) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* x, CUlimit limit) {
  *x = 1 << 20;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t x) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* x, int ordinal) {
  *x = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* x) {
  *x = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* x, CUdevice device) {
  *x = context;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* x, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *x = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *x = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *x = kShared;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *x = 132;
      break;
    default:
      *x = 65536;
  }
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = refused;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* x, const void* image) {
  Kernel* kernel = malloc(sizeof *kernel);
  kernel->shared = kSharedByDefault;
  *x = (CUmodule)kernel;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule x) { return CUDA_SUCCESS; }  // its kernel may still be launched
CUresult cuModuleGetFunction(CUfunction* x, CUmodule module, const char* name) {
  *x = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* x, CUfunction_attribute attribute, CUfunction function) {
  *x = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int x) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE;  // as an older driver: Triton then sets the one above
  if (x > kShared) return refuse("more shared memory than a block can have");
  ((Kernel*)function)->shared = x;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache x) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* x, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(x, &pointer, sizeof pointer);  // any memory counts as the device's
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** x,
                                CUdeviceptr pointer) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuOccupancyMaxActiveClusters(int* x, CUfunction function, const CUlaunchConfig* launch) {
  *x = 1;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* x) {
  *x = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* x, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction function, void** values,
                          void** extra) {
  if (!launch->gridDimX || !launch->gridDimY || !launch->gridDimZ) return refuse("an empty grid");
  if (launch->gridDimX > 0x7fffffff || launch->gridDimY > 65535 || launch->gridDimZ > 65535)
    return refuse("a grid beyond the limits");
  const unsigned threads = launch->blockDimX * launch->blockDimY * launch->blockDimZ;
  if (threads == 0 || threads > 1024) return refuse("a block beyond the limits");
  if ((int)launch->sharedMemBytes > ((Kernel*)function)->shared)
    return refuse("more shared memory than the kernel was allowed");
  if (expected > kMaxArguments) return refuse("more arguments than the stand-in notes");
  for (int i = 0; i < expected; ++i) memcpy(arguments + i, values[i], sizeof *arguments);
  return CUDA_SUCCESS;
}
