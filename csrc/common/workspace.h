// Uninitialised, 64-byte aligned scratch memory, and the one loop over fixed tiles that the CPU entry points run on
// torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

namespace finecf {

template <class T>
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(int64_t count) { resize(count); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // Contents are lost.
  void resize(int64_t count) {
    if (count <= capacity_) return;
    std::free(data_);
    capacity_ = 0;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    capacity_ = count;
  }
  T* data() { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// body(begin, end) over [0, count), cut at multiples of `tile`; which thread takes which tiles never shows in results.
// An exception in a body is rethrown here: it may not cross the C boundary of torch's thread pool.
template <class F>
void parallel_tiles(int64_t count, int64_t tile, F&& body) {
  const int64_t tiles = (count + tile - 1) / tile;
  if (tiles <= 1) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  std::exception_ptr error;
  std::mutex guard;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    try {
      const int64_t last = end * tile;
      body(begin * tile, last < count ? last : count);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace finecf
