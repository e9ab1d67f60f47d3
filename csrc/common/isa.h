// The instruction set in use: chosen once, the widest that the machine and the build have; FINECF_CPU_ISA forces one.
#pragma once

#include "kernel_table.h"

namespace finecf {

const KernelTable& cpu_kernels();

template <class T>
const Kernels<T>& cpu_kernels_for();
template <>
inline const Kernels<float>& cpu_kernels_for<float>() {
  return cpu_kernels().f32;
}
template <>
inline const Kernels<double>& cpu_kernels_for<double>() {
  return cpu_kernels().f64;
}

}  // namespace finecf
