// One vocabulary for kernels that nvcc compiles for the device and g++ compiles for the host emulator.
//
// A kernel header includes this file and nothing of CUDA's or torch's. Under nvcc the names below are CUDA's own; under
// a plain C++17 compiler they come from host_simt.h, which runs one fiber per CUDA thread. Kernels use shared memory
// only through the two macros here, so that the emulator can poison it and watch its borders:
//
//   FINECF_STATIC_SHARED(float, tile, 256);   // float tile[256], 16-byte aligned, one per block
//   FINECF_DYNAMIC_SHARED(float, rows);       // float* rows, the launch's dynamic shared memory
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FINECF_STATIC_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define FINECF_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char finecf_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(finecf_dynamic_shared)
#define FINECF_DEVICE __device__ __forceinline__

namespace finecf {
using half_t = __half;
using bfloat16_t = __nv_bfloat16;

FINECF_DEVICE float to_float(float x) { return x; }
FINECF_DEVICE float to_float(half_t x) { return __half2float(x); }
FINECF_DEVICE float to_float(bfloat16_t x) { return __bfloat162float(x); }
}  // namespace finecf

#else

#include "host_simt.h"

#define FINECF_STATIC_SHARED(type, name, count) \
  type* const name = ::simt::static_shared<type>(count, __FILE__, __LINE__)
#define FINECF_DYNAMIC_SHARED(type, name) type* const name = ::simt::dynamic_shared<type>()
#define FINECF_DEVICE inline

namespace finecf {
using half_t = ::simt::Half;
using bfloat16_t = ::simt::BFloat16;

inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return ::simt::widen(x); }
inline float to_float(bfloat16_t x) { return ::simt::widen(x); }
}  // namespace finecf

#endif

namespace finecf {

// Every operator keeps a plain version of its kernels beside the fast one, for tests to select.
enum class Version : int { kNaive = 0, kFast = 1 };

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Launches beyond this many blocks loop over their work instead: below CUDA's limit on gridDim.x (2^31 - 1) and long
// past the point where more blocks help.
constexpr int64_t kMostBlocks = int64_t{1} << 20;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = ceil_div(work, per_block);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace finecf
