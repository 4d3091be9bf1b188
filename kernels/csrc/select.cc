// Picks the kernels for the machine that the program runs on. Compiled for the baseline instruction set.

#include <atomic>
#include <cstring>

#include "products.h"

namespace hsai {
namespace {

// The i-th table that this machine runs, fastest first; null past the last.
const Products* find_runnable(int i) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && i-- == 0) return &kAvx512Products;
  if (avx2 && i-- == 0) return &kAvx2Products;
#endif
  return i == 0 ? &kBaselineProducts : nullptr;
}

std::atomic<const Products*> chosen{nullptr};

}  // namespace

const Products& current_products() {
  const Products* products = chosen.load();
  return products != nullptr ? *products : *find_runnable(0);
}

bool use_products(const char* name) {
  for (int i = 0; const Products* products = find_runnable(i); ++i) {
    if (std::strcmp(products->name, name) == 0) {
      chosen = products;
      return true;
    }
  }
  return false;
}

}  // namespace hsai
