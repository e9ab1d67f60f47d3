// The one translation unit that is compiled once per instruction set, with -DFINECF_ISA=<name> and that set's flags.
#ifndef FINECF_ISA
#error "compile with -DFINECF_ISA=baseline|avx2|avx512|neon"
#endif
#define FINECF_PASTE_(a, b) a##b
#define FINECF_PASTE(a, b) FINECF_PASTE_(a, b)
#define FINECF_TEXT_(a) #a
#define FINECF_TEXT(a) FINECF_TEXT_(a)
#define FINECF_ISA_NS FINECF_PASTE(isa_, FINECF_ISA)

#include "../replacement/replacement_cpu_kernel.h"
#include "../shapley/shapley_cpu_kernel.h"
#include "../submodular/submodular_cpu_kernel.h"

namespace finecf {
namespace FINECF_ISA_NS {

template <class T>
static constexpr Kernels<T> kernels() {
  return {Simd<T>::lanes,
          kTileRows,
          kTileCols<T>,
          kDotRows,
          kDotCols,
          shapley_relative<T>,
          shapley_value_of<T>,
          shapley_masked_scores<T>,
          shapley_prepare_walk<T>,
          shapley_walk_tile<T>,
          cosine_block<T>,
          inverse_norms<T>,
          pack_panel<T>,
          pack_factors<T>,
          scan_panel<T>,
          exact_losses<T>,
          submodular_probability<T>,
          submodular_confidence<T>};
}

extern const KernelTable table;
const KernelTable table = {FINECF_TEXT(FINECF_ISA), kernels<float>(), kernels<double>()};

}  // namespace FINECF_ISA_NS
}  // namespace finecf
