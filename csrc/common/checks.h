// Argument checks and small tensor helpers over the LibTorch stable ABI, shared by the CPU and CUDA entry points.
//
// The Python wrappers in finecf/ops validate everything and speak to users; these checks keep a direct call through
// torch.ops.finecf from reading out of bounds. Each failure is a std::runtime_error (RuntimeError in Python) that names
// the operator, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace finecf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) {
    fail(parts...);
  }
}

inline std::string shape_text(const int64_t* sizes, size_t rank) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < rank; ++i) {
    text << (i ? ", " : "") << sizes[i];
  }
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return shape_text(sizes.data(), sizes.size());
}

// `axes` names the axes for the message, e.g. "B, P, C".
inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank, const char* axes) {
  check(tensor.dim() == rank, op, ": ", name, " must have shape [", axes, "], got ", shape_text(tensor));
}

// Every axis must have exactly the size given.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                        const char* axes) {
  check_rank(op, name, tensor, static_cast<int64_t>(sizes.size()), axes);
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    check(tensor.size(axis) == size, op, ": ", name, " must have shape [", axes,
          "] = ", shape_text(sizes.begin(), sizes.size()), ", got ", shape_text(tensor));
    ++axis;
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

// float32 or float64: what the CPU kernels take.
inline void check_float(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name, " must be float32 or float64, got ",
        torch::headeronly::toString(dtype));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
            tensor.get_device_index() == like.get_device_index(),
        op, ": ", name, " must be on the same device as the first argument");
}

// Values of a contiguous int64 tensor on the CPU must lie in [low, high).
inline void check_range(const char* op, const char* name, const Tensor& tensor, int64_t low, int64_t high) {
  const int64_t* values = tensor.const_data_ptr<int64_t>();
  for (int64_t i = 0, n = tensor.numel(); i < n; ++i) {
    check(values[i] >= low && values[i] < high, op, ": ", name, " must lie in [", low, ", ", high, "), got ",
          values[i]);
  }
}

inline Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised tensor on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Calls f(float()) or f(double()): the value only carries the type. A switch, since the dispatch macro of the headers
// breaks on a comma in a template argument list.
template <typename F>
inline auto dispatch_float(const char* op, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    default:
      fail(op, ": expected float32 or float64, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

}  // namespace finecf
