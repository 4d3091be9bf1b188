// Picks the kernels for the machine that the program runs on. Compiled for the baseline instruction set, with a macro
// HSAI_HAS_* for every other one that the compiler knew.

#include <atomic>
#include <cstring>

#include "products.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hsai {
namespace {

#if defined(__x86_64__)
bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// Asked of the processor, since compilers of before 2022 have no name for it; its registers are those of AVX2.
[[maybe_unused]] bool runs_avxvnni() {
  unsigned a, b, c, d;
  return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
}
#elif defined(__aarch64__) && defined(__linux__)
// The numbers are Linux' HWCAP_ASIMDDP and HWCAP2_I8MM, which headers of old C libraries lack.
bool runs_dotprod() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }

[[maybe_unused]] bool runs_i8mm() { return runs_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  std::size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

bool runs_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }

[[maybe_unused]] bool runs_i8mm() { return runs_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
bool runs_dotprod() { return false; }

[[maybe_unused]] bool runs_i8mm() { return false; }
#endif

struct Candidate {
  const Products* products;
  bool (*runs)();
};

// Fastest first.
constexpr Candidate kCandidates[] = {
#if defined(HSAI_HAS_AVX512)
    {&kAvx512Products, runs_avx512},
#endif
#if defined(HSAI_HAS_AVXVNNI)
    {&kAvxVnniProducts, runs_avxvnni},
#endif
#if defined(HSAI_HAS_AVX2)
    {&kAvx2Products, runs_avx2},
#endif
#if defined(HSAI_HAS_I8MM)
    {&kI8mmProducts, runs_i8mm},
#endif
#if defined(HSAI_HAS_DOTPROD)
    {&kDotprodProducts, runs_dotprod},
#endif
    {&kBaselineProducts, [] { return true; }},
};

const Products* find_fastest() {
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs()) return candidate.products;
  }
  return &kBaselineProducts;
}

std::atomic<const Products*> chosen{nullptr};

}  // namespace

const Products& current_products() {
  static const Products* const fastest = find_fastest();
  const Products* products = chosen.load();
  return products != nullptr ? *products : *fastest;
}

bool use_products(const char* name) {
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(candidate.products->name, name) == 0 && candidate.runs()) {
      chosen = candidate.products;
      return true;
    }
  }
  return false;
}

}  // namespace hsai
