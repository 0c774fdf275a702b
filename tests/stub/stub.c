// A libcuda without a GPU: it says yes to everything, runs nothing, and shows every launch to whoever watches (tests/stub/gpu.py).
#include "cuda.h"
#include <stdint.h>
#include <string.h>
#undef cuDevicePrimaryCtxRetain
#undef cuStreamIsCapturing

// What a tensor map is made of, in the 128 bytes of one.
struct map {
  uint64_t address, strides[4];
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t type, rank, steps[5], interleave, swizzle, promotion, fill;
};
_Static_assert(sizeof(struct map) <= sizeof(CUtensorMap), "no room for it");

// grid, block, bytes of shared memory, attributes of the launch
typedef void (*watcher)(uint64_t function, const uint32_t shape[8], uint64_t stream, void **arguments);
static watcher watching;
// whether a function has such a parameter, and where it lies
typedef CUresult (*teller)(uint64_t function, size_t index, size_t *offset, size_t *size);
static teller telling;
static unsigned long launches;
static uint64_t handles = 0x1000;

void stub_watch(watcher w) { watching = w; }
void stub_tell(teller t) { telling = t; }
unsigned long stub_launches(void) { return launches; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **text) { *text = "stub"; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)__atomic_add_fetch(&handles, 16, __ATOMIC_SEQ_CST); return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)module; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
  return telling ? telling((uint64_t)function, index, offset, size) : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr pointer) { *(CUdeviceptr *)data = pointer; return CUDA_SUCCESS; }
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *which, void **data, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; ++i) *(CUdeviceptr *)data[i] = pointer;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) { *count = 1; return CUDA_SUCCESS; }

static unsigned refused;
void stub_refuse(unsigned count) { refused = count; }  // so many launches

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  if (refused) { --refused; return CUDA_ERROR_INVALID_CONTEXT; }
  const uint32_t shape[8] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->numAttrs};
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION && c->attrs[i].value.programmaticStreamSerializationAllowed != 1)
      return CUDA_ERROR_INVALID_VALUE;
    else if (c->attrs[i].id > CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT)
      return CUDA_ERROR_INVALID_VALUE;
  __atomic_add_fetch(&launches, 1, __ATOMIC_SEQ_CST);
  if (watching) watching((uint64_t)function, shape, (uint64_t)c->hStream, arguments);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *out, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  struct map m = {.address = (uint64_t)address, .type = type, .rank = rank};
  m.interleave = interleave, m.swizzle = swizzle, m.promotion = promotion, m.fill = fill;
  if ((uint64_t)address % 16) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) m.sizes[i] = sizes[i], m.box[i] = box[i], m.steps[i] = steps[i];
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >> 40) return CUDA_ERROR_INVALID_VALUE;
    m.strides[i] = strides[i];
  }
  memset(out, 0, sizeof *out);
  memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}
