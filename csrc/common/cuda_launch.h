// The CUDA side of an operator call over the LibTorch stable ABI: device, stream, scratch memory, launches and their
// checks.
//
// What the drivers in the *_kernel.cuh files call a launcher; simt::HostLauncher (simt/host_simt.h) is its twin on the
// host.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../simt/platform.cuh"
#include "checks.h"

namespace finecf {

// Bytes of scratch after which work is cut into chunks; results do not depend on it.
constexpr size_t kScratchBudget = size_t{64} << 20;

inline void check_cuda(const char* op, const char* what, cudaError_t status) {
  check(status == cudaSuccess, op, ": ", what, " failed: ", cudaGetErrorString(status));
}

// Makes the device of `like` current for its lifetime and launches on torch's current stream there. Scratch is torch's
// memory, given back when the launcher goes: what is queued on the stream by then runs before the memory is used again.
class CudaLauncher {
 public:
  CudaLauncher(const char* op, const Tensor& like) : op_(op), like_(like), guard_(like.get_device_index()) {
    const int device = like.get_device_index();
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, op, ": no current CUDA stream on device ", device);
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(op, "asking for the limit of shared memory",
               cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check_cuda(op, "asking for the number of multiprocessors",
               cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
  }

  template <typename... Parameters, typename... Arguments>
  void run(const char* name, void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared,
           Arguments... arguments) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (shared > kWithoutAsking) {
      check_cuda(op_, name,
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    kernel<<<grid, block, shared, stream_>>>(static_cast<Parameters>(arguments)...);
    check_cuda(op_, name, cudaGetLastError());
  }

  template <typename T>
  T* scratch(int64_t count) {
    scratch_.push_back(empty(like_, {count * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte));
    return static_cast<T*>(scratch_.back().mutable_data_ptr());
  }

  size_t shared_limit() const { return static_cast<size_t>(shared_limit_); }
  size_t scratch_budget() const { return kScratchBudget; }
  int multiprocessors() const { return multiprocessors_; }

 private:
  const char* op_;
  const Tensor like_;
  const torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int shared_limit_ = 0, multiprocessors_ = 0;
  std::vector<Tensor> scratch_;
};

// float32, float16 or bfloat16: what the CUDA kernels read. They accumulate in float32, and results are float32.
inline void check_cuda_float(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, ": ", name,
        " must be float32, float16 or bfloat16 on CUDA, got ", torch::headeronly::toString(dtype));
}

// Small operands are read as float32 whatever the type of the large ones.
inline Tensor to_float32(const char* op, const char* name, const Tensor& tensor) {
  check_cuda_float(op, name, tensor);
  return to_contiguous(tensor.scalar_type() == ScalarType::Float ? tensor
                                                                 : torch::stable::to(tensor, ScalarType::Float));
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls f with a null pointer of the element type of `tensor`, which only carries the type.
template <typename F>
void dispatch_cuda_float(const char* op, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<const float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<const half_t*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<const bfloat16_t*>(nullptr));
    default:
      check_cuda_float(op, "the first argument", tensor);
  }
}

}  // namespace finecf
