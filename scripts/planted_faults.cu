// One fault for each tool of compute-sanitizer, named in its first argument. A tool that does not find the fault planted
// for it shows nothing about the kernels of this project either: it does not work on this machine, or its filter lets no
// kernel through. The kernels are in namespace finecf because that is what the filter asks for (scripts/gpu_check.py).
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace finecf {
namespace {

constexpr int kThreads = 64;

// memcheck: the last thread writes behind the allocation.
__global__ void planted_memcheck(int* out) { out[threadIdx.x + 1] = static_cast<int>(threadIdx.x); }

// racecheck: a thread of one warp reads what one of the other warp writes, with no barrier between.
__global__ void planted_racecheck(int* out) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + kThreads / 2) % kThreads];
}

// synccheck: half of a warp never comes to the barrier.
__global__ void planted_synccheck(int* out, int few) {
  if (static_cast<int>(threadIdx.x) < few) {
    out[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] += 1;
  }
}

// initcheck: reads what nothing has written.
__global__ void planted_initcheck(int* out) { out[threadIdx.x] = out[threadIdx.x] + 1; }

}  // namespace
}  // namespace finecf

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const char* const tool = arguments[1];
  int* out = nullptr;
  if (cudaMalloc(&out, finecf::kThreads * sizeof(int)) != cudaSuccess) return 3;
  if (std::strcmp(tool, "memcheck") == 0) {
    finecf::planted_memcheck<<<1, finecf::kThreads>>>(out);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    finecf::planted_racecheck<<<1, finecf::kThreads>>>(out);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    finecf::planted_synccheck<<<1, finecf::kThreads>>>(out, finecf::kThreads * 3 / 4);
  } else if (std::strcmp(tool, "initcheck") == 0) {
    finecf::planted_initcheck<<<1, finecf::kThreads>>>(out);
  } else {
    return 2;
  }
  const cudaError_t status = cudaDeviceSynchronize();
  std::printf("planted: %s\n", cudaGetErrorString(status));
  cudaFree(out);
  return 0;
}
