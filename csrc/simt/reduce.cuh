// Warp reductions with one tie rule: of equal values the lowest index wins, on every backend.
//
// Every lane of the warp takes part in each of these, and the order of the additions is fixed, so the bits do not
// depend on how work was cut into blocks.
#pragma once

#include "platform.cuh"

namespace finecf {

// Butterfly sum: every lane gets the total, with the same bits.
template <typename T>
FINECF_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename T>
FINECF_DEVICE T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

template <typename T>
FINECF_DEVICE T warp_min(T value) {
  return -warp_max(-value);
}

// A sum of exponentials kept as sum * exp(peak), so that neither overflows. `peak` starts at the lowest finite float,
// not at -inf: then -inf terms (masked classes) and merges of two empty sums give 0 where -inf would give inf - inf.
struct LogSum {
  float peak, sum;
};

FINECF_DEVICE LogSum empty_log_sum() { return {-FLT_MAX, 0.0f}; }

FINECF_DEVICE LogSum merge(const LogSum& a, const LogSum& b) {
  LogSum out;
  out.peak = fmaxf(a.peak, b.peak);
  out.sum = a.sum * expf(a.peak - out.peak) + b.sum * expf(b.peak - out.peak);
  return out;
}

FINECF_DEVICE float merge(float a, float b) { return a + b; }

// Selects by value: a conditional of two array elements would select an address and force the array into local memory.
FINECF_DEVICE float pick(bool first, float a, float b) { return first ? a : b; }
FINECF_DEVICE LogSum pick(bool first, LogSum a, LogSum b) { return {first ? a.peak : b.peak, first ? a.sum : b.sum}; }

FINECF_DEVICE float shuffle_xor(float value, int offset) { return __shfl_xor_sync(kAllLanes, value, offset); }
FINECF_DEVICE LogSum shuffle_xor(const LogSum& value, int offset) {
  LogSum out;
  out.peak = __shfl_xor_sync(kAllLanes, value.peak, offset);
  out.sum = __shfl_xor_sync(kAllLanes, value.sum, offset);
  return out;
}

// Merges K values per lane over the warp at once. On return lane l holds the total of value l / (32 / K) in values[0].
// Each stage halves the values a lane carries and doubles the lanes behind each: K - 1 + log2(32 / K) shuffles instead
// of 5 K.
template <int K, typename T>
FINECF_DEVICE T warp_merge_many(T (&values)[K], int lane) {
  static_assert(K > 0 && K <= kWarp && (K & (K - 1)) == 0, "a power of two up to the warp");
  int offset = kWarp / 2;
#pragma unroll
  for (int half = K / 2; half > 0; half /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T kept = pick(upper, values[i + half], values[i]);
      const T sent = pick(upper, values[i], values[i + half]);
      values[i] = merge(kept, shuffle_xor(sent, offset));
    }
    offset /= 2;
  }
#pragma unroll
  for (int rest = kWarp / K / 2; rest > 0; rest /= 2) values[0] = merge(values[0], shuffle_xor(values[0], rest));
  return values[0];
}

// A value with where it was found, for arg-min. `none()` loses against every finite loss.
struct Found {
  double loss;
  int64_t candidate;
  int cell;
  int padding;
};

FINECF_DEVICE Found none_found() { return {HUGE_VAL, -1, 0x7fffffff, 0}; }

// Lower loss first, then lower cell, then lower candidate: a total order, so the order of comparisons is of no matter.
FINECF_DEVICE bool precedes(const Found& a, const Found& b) {
  if (a.loss != b.loss) return a.loss < b.loss;
  return a.cell != b.cell ? a.cell < b.cell : a.candidate < b.candidate;
}

FINECF_DEVICE Found warp_first(Found best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Found other;
    other.loss = __shfl_xor_sync(kAllLanes, best.loss, offset);
    other.candidate = __shfl_xor_sync(kAllLanes, best.candidate, offset);
    other.cell = __shfl_xor_sync(kAllLanes, best.cell, offset);
    other.padding = 0;
    if (precedes(other, best)) best = other;
  }
  return best;
}

// Arg-max over floats with indices: of equal values the lowest index.
FINECF_DEVICE int warp_argmax(float value, int index) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, offset);
    const int other_index = __shfl_xor_sync(kAllLanes, index, offset);
    if (other > value || (other == value && other_index < index)) {
      value = other;
      index = other_index;
    }
  }
  return index;
}

}  // namespace finecf
