#include "cpu/cpu_features.h"

#include <unistd.h>

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif

namespace qlora_native::cpu {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

/// Which register states the operating system saves on a context switch.
uint64_t enabled_register_states() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

constexpr bool has(unsigned reg, int bit) { return (reg >> bit & 1) != 0; }

std::string brand_string() {
  if (cpuid(0x80000000u).eax < 0x80000004u) return "x86-64";
  char text[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i);
    const unsigned words[4] = {r.eax, r.ebx, r.ecx, r.edx};
    std::memcpy(text + 16 * i, words, sizeof(words));
  }
  const std::string brand(text);
  const size_t first = brand.find_first_not_of(' ');
  if (first == std::string::npos) return "x86-64";
  return brand.substr(first, brand.find_last_not_of(' ') - first + 1);
}

/// Asks the system for the tile registers, which are 8 KiB more to save for a thread that uses them.
/// Refused where a thread's alternative signal stack could not take those.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures features;
  features.brand = brand_string();
  const Registers leaf1 = cpuid(1);
  const bool osxsave = has(leaf1.ecx, 27);
  if (!osxsave) return features;
  constexpr uint64_t kYmmStates = 0x6;   // SSE and AVX
  constexpr uint64_t kZmmStates = 0xE6;  // and opmask, the upper halves, zmm16-31
  const uint64_t states = enabled_register_states();
  const Registers leaf7 = cpuid(7);
  const bool avx = has(leaf1.ecx, 28) && (states & kYmmStates) == kYmmStates;
  features.avx2 = avx && has(leaf7.ebx, 5) && has(leaf1.ecx, 12) && has(leaf1.ecx, 29);
  features.avx512 = features.avx2 && (states & kZmmStates) == kZmmStates && has(leaf7.ebx, 16) &&
                    has(leaf7.ebx, 30) && has(leaf7.ebx, 31) && has(leaf7.ebx, 17);
  features.avx512_vbmi = features.avx512 && has(leaf7.ecx, 1);
  features.avx512_bf16 = features.avx512 && has(cpuid(7, 1).eax, 5);
  constexpr uint64_t kTileStates = 0x60000;  // their shapes and their contents
  const bool has_tiles =
      has(leaf7.edx, 24) && has(leaf7.edx, 22) && (states & kTileStates) == kTileStates;
  features.amx_bf16 = features.avx512_bf16 && has_tiles && request_tiles();
  return features;
}

#else

CpuFeatures detect() { return {.brand = "CPU"}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::string to_string(const CpuFeatures& features) {
  std::string text;
  const auto append = [&text](bool present, const char* word) {
    if (!present) return;
    if (!text.empty()) text += ' ';
    text += word;
  };
  append(features.avx2, "avx2");
  append(features.avx512, "avx512");
  append(features.avx512_vbmi, "avx512_vbmi");
  append(features.avx512_bf16, "avx512_bf16");
  append(features.amx_bf16, "amx_bf16");
  return text;
}

int64_t physical_memory_bytes() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page_bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && page_bytes > 0 ? int64_t{pages} * page_bytes : 0;
}

}  // namespace qlora_native::cpu
