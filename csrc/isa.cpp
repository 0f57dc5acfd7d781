#include "isa.hpp"

#include <atomic>

namespace gossamer {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found{&portable_kernels};
#ifdef GOSSAMER_X86
  // The compiler's builtin asks the operating system too: registers that it does not save are not there.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) found.push_back(&avx2_kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512_kernels);
#endif
  return found;
}

namespace {
std::atomic<const Kernels*> in_use{available_kernels().back()};
}

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

bool use_kernels(const std::string& name) {
  for (const Kernels* table : available_kernels())
    if (name == table->name) {
      in_use = table;
      return true;
    }
  return false;
}

const Ops& engine_ops() {
#ifdef GOSSAMER_X86
  if (&kernels() == &avx512_kernels) return avx512_ops;
  if (&kernels() == &avx2_kernels) return avx2_ops;
#endif
  return portable_ops;
}

}  // namespace gossamer
