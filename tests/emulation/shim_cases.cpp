// Small kernels that use the shim rightly and wrongly. `shim_cases NAME SEED` runs one and prints what came of it:
// "ok VALUES", or "fault MESSAGE". See test_shim.py for what each must print.
#include <cstdlib>
#include <iostream>
#include <sstream>

#include "simt/platform.cuh"
#include "simt/reduce.cuh"

namespace {

using finecf::kAllLanes;

// Sums 256 numbers through shared memory; `order` notes in which order the threads came.
__global__ void sum_block(const float* in, float* out, int* order, int* arrived) {
  FINECF_STATIC_SHARED(float, of_warp, 8);
  order[atomicAdd(arrived, 1)] = static_cast<int>(threadIdx.x);
  const float sum = finecf::warp_sum(in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < 8; ++w) total += of_warp[w];
    out[blockIdx.x] = total;
  }
}

// out[8 i + lane]: what each kind of shuffle and vote gives; a segment of 8 lanes.
__global__ void shuffle_all_ways(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const int results[] = {__shfl_sync(kAllLanes, lane, 3),        __shfl_sync(kAllLanes, lane, 3, 8),
                         __shfl_up_sync(kAllLanes, lane, 2, 8),  __shfl_down_sync(kAllLanes, lane, 2, 8),
                         __shfl_xor_sync(kAllLanes, lane, 5, 8), static_cast<int>(__ballot_sync(kAllLanes, lane % 2)),
                         __any_sync(kAllLanes, lane == 40),      __all_sync(kAllLanes, lane < 32)};
  for (int i = 0; i < 8; ++i) out[8 * lane + i] = results[i];
}

// The two halves of a warp work apart, each under its own mask.
__global__ void halves(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
  } else {
    out[lane] = __shfl_xor_sync(0xffff0000u, lane, 2);
  }
  __syncwarp();
}

// Shuffles carry 64 bits, of a number or of an index.
__global__ void shuffle_wide(double* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const double value = 1e15 + lane;
  const long long index = (1ll << 40) + lane;
  out[lane] = __shfl_xor_sync(kAllLanes, value, 1) - 1e15;
  out[32 + lane] = static_cast<double>(__shfl_down_sync(kAllLanes, index, 3) - (1ll << 40));
}

// Part of a warp meets alone: what its first lane wrote is there for the others.
__global__ void meet_in_part(int* out) {
  FINECF_STATIC_SHARED(int, left, 32);
  const unsigned lane = threadIdx.x;
  if (lane >= 24) return;
  const unsigned mask = lane < 8 ? 0x000000ffu : 0x00ffff00u;
  left[lane] = static_cast<int>(lane);
  __syncwarp(mask);
  const unsigned first = lane < 8 ? 0 : 8, last = lane < 8 ? 7 : 23;
  out[lane] = left[last - (lane - first)];
}

// Every thread by its three numbers; all of them are different.
__global__ void three_axes(int* out) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(100 * block + thread);
}

// What 256 threads make of one number with each atomic.
__global__ void atomics(int* out) {
  const int i = static_cast<int>(threadIdx.x);
  atomicAdd(out, i);
  atomicSub(out + 1, i);
  atomicMin(out + 2, i - 100);
  atomicMax(out + 3, i);
  atomicOr(out + 4, 1 << (i % 8));
  atomicAnd(out + 5, ~(1 << (i % 8)));
  atomicXor(out + 6, i);
  int seen = out[7], expected;
  __syncwarp();  // the other lanes read the same number, so that all but one must try again
  do {
    expected = seen;
    seen = atomicCAS(out + 7, expected, expected + 2);
  } while (seen != expected);
  if (atomicExch(out + 8, 1) == 0) atomicAdd(out + 9, 1);
}

// Each block reads before it writes: what the block before it left must be gone.
__global__ void leftovers(float* out) {
  FINECF_STATIC_SHARED(float, fixed, 32);
  FINECF_DYNAMIC_SHARED(float, asked);
  out[blockIdx.x * 32 + threadIdx.x] = fixed[threadIdx.x] + asked[threadIdx.x];
  fixed[threadIdx.x] = asked[threadIdx.x] = 1.0f;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_return() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void mask_without_caller(int* out) {
  if (threadIdx.x < 20) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);
}

__global__ void returned_lane(int* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_down_sync(kAllLanes, 1, 1);
}

__global__ void missing_lane(int* out) { out[threadIdx.x] = __any_sync(kAllLanes, 1); }

__global__ void reads_outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 16);
}

__global__ void two_collectives(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __any_sync(kAllLanes, 1);
  } else {
    out[threadIdx.x] = __all_sync(kAllLanes, 1);
  }
}

__global__ void warp_barrier_without_caller() {
  if (threadIdx.x < 20) __syncwarp(0x0000ffffu);
}

__global__ void warp_barrier_after_return() {
  if (threadIdx.x == 9) return;
  __syncwarp();
}

__global__ void differing_masks(int* out) {
  out[threadIdx.x] = __any_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0000u, 1);
}

__global__ void deadlock(int* out) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __any_sync(kAllLanes, 1);
  }
}

__global__ void bad_width(int* out) { out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0, 12); }

__global__ void unwritten_shared(float* out) {
  FINECF_STATIC_SHARED(float, values, 64);
  FINECF_DYNAMIC_SHARED(float, more);
  if (threadIdx.x > 0) values[threadIdx.x] = more[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + more[threadIdx.x];
}

__global__ void past_dynamic_shared(int by) {
  FINECF_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + by] = 1.0f;
}

__global__ void past_static_shared(int by) {
  FINECF_STATIC_SHARED(float, values, 33);
  values[threadIdx.x + by] = 1.0f;
}

__global__ void too_much_shared() {
  FINECF_STATIC_SHARED(float, values, 16 * 1024);
  values[threadIdx.x] = 1.0f;
}

__global__ void past_array(const float* in, float* out, int by) { out[threadIdx.x] = in[threadIdx.x + by]; }

__global__ void into_padding(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void shift_too_far(unsigned* out) { out[threadIdx.x] = 1u << threadIdx.x; }

__global__ void overflow(int* out) { out[threadIdx.x] = 0x7ffffff0 + static_cast<int>(threadIdx.x); }

__global__ void endless_stack(int* out) {
  // Every page is used, from the top: a single write at the far end can land behind the guard page, in another stack.
  constexpr int kSize = 128 * 1024;
  volatile char room[kSize];
  for (int i = kSize - 1; i >= 0; i -= 1024) room[i] = 1;
  out[threadIdx.x] = room[kSize - 1];
}

template <typename T>
std::string text(const simt::DeviceArray<T>& values) {
  std::ostringstream out;
  for (int64_t i = 0; i < values.size(); ++i) out << " " << values.data()[i];
  return out.str();
}

std::string run(const std::string& name, uint64_t seed) {
  const simt::DeviceArray<int> ints(256);
  const simt::DeviceArray<float> floats(64);
  for (int i = 0; i < 256; ++i) ints.data()[i] = -7;
  const auto launch = [&](unsigned threads, size_t shared, auto kernel, auto... arguments) {
    simt::launch(name.c_str(), dim3(1), dim3(threads), shared, seed, [&] { kernel(arguments...); });
  };
  if (name == "sum_block") {
    const simt::DeviceArray<float> in(1024), out(4);
    const simt::DeviceArray<int> order(1024), arrived(1);
    for (int i = 0; i < 1024; ++i) in.data()[i] = static_cast<float>(i % 7);
    *arrived.data() = 0;
    simt::launch("sum_block", dim3(4), dim3(256), 0, seed,
                 [&] { sum_block(in.data(), out.data(), order.data(), arrived.data()); });
    return text(out) + " |" + text(order);
  }
  if (name == "shuffle_all_ways") return launch(32, 0, shuffle_all_ways, ints.data()), text(ints);
  if (name == "halves") return launch(32, 0, halves, ints.data()), text(ints);
  if (name == "unwritten_shared") return launch(64, 256, unwritten_shared, floats.data()), text(floats);
  if (name == "shuffle_wide") {
    const simt::DeviceArray<double> wide(64);
    return launch(32, 0, shuffle_wide, wide.data()), text(wide);
  }
  if (name == "meet_in_part") return launch(32, 0, meet_in_part, ints.data()), text(ints);
  if (name == "three_axes") {
    const simt::DeviceArray<int> out(2 * 3 * 4 * 5 * 3 * 2);
    simt::launch("three_axes", dim3(2, 3, 4), dim3(5, 3, 2), 0, seed, [&] { three_axes(out.data()); });
    return text(out);
  }
  if (name == "atomics") {
    const simt::DeviceArray<int> out(10);
    for (int i = 0; i < 10; ++i) out.data()[i] = i == 5 ? -1 : 0;
    return launch(256, 0, atomics, out.data()), text(out);
  }
  if (name == "leftovers") {
    const simt::DeviceArray<float> out(96);
    simt::launch("leftovers", dim3(3), dim3(32), 32 * sizeof(float), seed, [&] { leftovers(out.data()); });
    return text(out);
  }
  if (name == "warp_barrier_without_caller") launch(32, 0, warp_barrier_without_caller);
  if (name == "warp_barrier_after_return") launch(32, 0, warp_barrier_after_return);
  if (name == "differing_masks") launch(32, 0, differing_masks, ints.data());
  if (name == "into_padding") {
    const simt::DeviceArray<float> out(33);
    launch(34, 0, into_padding, out.data());
  }
  if (name == "shift_too_far") launch(33, 0, shift_too_far, reinterpret_cast<unsigned*>(ints.data()));
  if (name == "overflow") launch(33, 0, overflow, ints.data());
  if (name == "divergent_barrier") launch(64, 0, divergent_barrier);
  if (name == "barrier_after_return") launch(64, 0, barrier_after_return);
  if (name == "mask_without_caller") launch(32, 0, mask_without_caller, ints.data());
  if (name == "returned_lane") launch(32, 0, returned_lane, ints.data());
  if (name == "missing_lane") launch(20, 0, missing_lane, ints.data());
  if (name == "reads_outside_mask") launch(32, 0, reads_outside_mask, ints.data());
  if (name == "two_collectives") launch(32, 0, two_collectives, ints.data());
  if (name == "deadlock") launch(32, 0, deadlock, ints.data());
  if (name == "bad_width") launch(32, 0, bad_width, ints.data());
  if (name == "past_dynamic_shared") launch(33, 33 * 4, past_dynamic_shared, 1);
  if (name == "far_past_dynamic_shared") launch(33, 33 * 4, past_dynamic_shared, 100);
  if (name == "past_static_shared") launch(33, 0, past_static_shared, 2);
  if (name == "too_much_shared") launch(32, 0, too_much_shared);
  if (name == "past_array") launch(32, 0, past_array, static_cast<const float*>(floats.data()), floats.data(), 33);
  if (name == "before_array") launch(32, 0, past_array, static_cast<const float*>(floats.data()), floats.data(), -4096);
  if (name == "endless_stack") launch(32, 0, endless_stack, ints.data());
  if (name == "too_many_threads") launch(1025, 0, endless_stack, ints.data());
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    const std::string values = run(argv[1], std::strtoull(argv[2], nullptr, 10));
    std::cout << "ok" << values << "\n";
  } catch (const simt::Fault& fault) {
    std::cout << "fault " << fault.what() << "\n";
  }
}
