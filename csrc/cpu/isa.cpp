#include "cpu/isa.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.hpp"
#if defined(FUSEDSTEP_X86)
#include <cpuid.h>
#endif

namespace fusedstep::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();  // asks for the processor and for the operating system
  const KernelTable* kernels;
};

#if defined(FUSEDSTEP_X86)
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

/// Best first.
const Isa all_isas[] = {
#if defined(FUSEDSTEP_X86)
    {"avx512", runs_avx512, &kernels_avx512},
    {"avx2", runs_avx2, &kernels_avx2},
#endif
    {"scalar", [] { return true; }, &kernels_scalar},
};

const Isa& find(const std::string& name, const std::string& asked_by) {
  std::string built, here;
  for (const Isa& isa : all_isas) {
    if (name == isa.name && isa.runs_here()) return isa;
    built += std::string(built.empty() ? "" : ", ") + isa.name;
    if (isa.runs_here()) here += std::string(here.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error(asked_by + ": instruction set '" + name +
                           "' is not available; this build has " + built + ", this machine runs " +
                           here);
}

const Isa& default_isa() {
  const char* forced = std::getenv("FUSEDSTEP_FORCE_ISA");
  if (forced && *forced) return find(forced, "FUSEDSTEP_FORCE_ISA");
  for (const Isa& isa : all_isas)
    if (isa.runs_here()) return isa;
  throw std::logic_error("the scalar instruction set runs everywhere");
}

std::atomic<const Isa*> active{nullptr};  // null: not chosen yet

const Isa& active_entry() {
  const Isa* isa = active.load(std::memory_order_acquire);
  if (isa) return *isa;
  isa = &default_isa();
  const Isa* none = nullptr;  // force_isa in another thread goes first
  if (!active.compare_exchange_strong(none, isa)) isa = none;
  return *isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all_isas)
    if (isa.runs_here()) names.emplace_back(isa.name);
  return names;
}

const char* active_isa() { return active_entry().name; }

const KernelTable& active_kernels() { return *active_entry().kernels; }

void force_isa(const std::string& name) {
  active.store(name.empty() ? &default_isa() : &find(name, "force_isa"));
}

}  // namespace fusedstep::cpu
