#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace finecf {

#if defined(__aarch64__)
namespace isa_neon {
extern const KernelTable table;
}
#else
namespace isa_baseline {
extern const KernelTable table;
}
#ifdef FINECF_HAVE_AVX2
namespace isa_avx2 {
extern const KernelTable table;
}
#endif
#ifdef FINECF_HAVE_AVX512
namespace isa_avx512 {
extern const KernelTable table;
}
#endif
#endif

namespace {

// Usable here, narrowest first.
const std::vector<const KernelTable*>& levels() {
  static const std::vector<const KernelTable*> found = [] {
    std::vector<const KernelTable*> v;
#if defined(__aarch64__)
    v.push_back(&isa_neon::table);
#else
    v.push_back(&isa_baseline::table);
#ifdef FINECF_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) v.push_back(&isa_avx2::table);
#endif
#ifdef FINECF_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      v.push_back(&isa_avx512::table);
#endif
#endif
    return v;
  }();
  return found;
}

const KernelTable* find_level(const char* name) {
  for (const KernelTable* t : levels())
    if (std::strcmp(t->name, name) == 0) return t;
  return nullptr;
}

std::atomic<const KernelTable*>& selected() {
  // An unusable FINECF_CPU_ISA is reported by the Python side at import; here the widest level serves.
  static std::atomic<const KernelTable*> choice{[] {
    const char* asked = std::getenv("FINECF_CPU_ISA");
    const KernelTable* t = asked ? find_level(asked) : nullptr;
    return t ? t : levels().back();
  }()};
  return choice;
}

}  // namespace

const KernelTable& cpu_kernels() { return *selected().load(std::memory_order_relaxed); }

}  // namespace finecf

#define FINECF_EXPORT extern "C" __attribute__((visibility("default")))

// The level in use.
FINECF_EXPORT const char* finecf_cpu_isa() { return finecf::cpu_kernels().name; }

// The levels this build has and this machine can run, narrowest first, with commas.
FINECF_EXPORT const char* finecf_cpu_isa_levels() {
  static const std::string names = [] {
    std::string s;
    for (const finecf::KernelTable* t : finecf::levels()) s += (s.empty() ? "" : ",") + std::string(t->name);
    return s;
  }();
  return names.c_str();
}

// Takes another level from now on; 0, or 1 where it is unknown or not usable here.
FINECF_EXPORT int finecf_set_cpu_isa(const char* name) {
  const finecf::KernelTable* t = finecf::find_level(name);
  if (!t) return 1;
  finecf::selected().store(t, std::memory_order_relaxed);
  return 0;
}
