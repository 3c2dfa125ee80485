// Matrix products of a warpgroup (four warps), A in registers and B in shared memory (sm_90a).
//
// B lies in panels: rows of 64 16-bit elements (128 bytes), swizzled by 128 bytes: 16-byte piece
// c of row r lies at piece c ^ (r % 8). A panel begins at a multiple of 1024 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace qlora_native::cuda {

inline constexpr int kPanelRowBytes = 128;

/// How the tensor cores find a panel (PTX ISA, "matrix descriptor"): swizzle of 128 bytes, 1024 bytes
/// from one group of eight rows to the next.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * kPanelRowBytes / 16} << 32;
  constexpr uint64_t kUnusedStride = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnusedStride | (address & 0x3ffff) >> 4;
}

/// How far the descriptor of the next 16 elements of the contraction is: 32 bytes along a row.
inline constexpr uint64_t kPanelStep16 = 32 / 16;

/// Registers written before are seen by the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kPending of the groups committed last run.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps what is computed from the sums behind wgmma_wait(), and what sets them before wgmma_fence(): to the
/// compiler neither has to do with them.
template <int kSums>
__device__ __forceinline__ void wgmma_order(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Lists of operands of an asm statement cannot be made by a template.
#define QN_SUMS_8(i)                                                                         \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define QN_SUMS_32(i) QN_SUMS_8(i), QN_SUMS_8(i + 8), QN_SUMS_8(i + 16), QN_SUMS_8(i + 24)

#define QN_SUMS_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"

#define QN_SUMS_TEXT_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"

#define QN_SUMS_TEXT_64                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define QN_SUMS_TEXT_128                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define QN_SUMS_TEXT_256                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define QN_WGMMA(SHAPE, TYPE, SUMS, A, B, ADDS)                                          \
  "{.reg .pred add; setp.ne.b32 add, " ADDS                                              \
  ", 0;\n"                                                                               \
  "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" SUMS "}, {" A "}, " B \
  ", add, 1, 1, 0;}\n"
#define QN_REGISTERS_OF_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

/// sums[64, 2 * kSums] += A[64, 16] * B[2 * kSums, 16]^T. A thread holds of row 16 * warp +
/// lane / 4 + 8 * (i / 2 % 2) the columns 8 * (i / 4) + lane % 4 * 2 + i % 2, in sums[i]. Of A it holds
/// rows lane / 4 and lane / 4 + 8 (of the 16 that belong to the warp), in turn, columns lane % 4 * 2 and the next, then
/// both rows of columns 8 further: fragments of mma.sync.m16n8k16. Neither sums nor fragments are to be touched until
/// wgmma_wait(). `kAdds` is false where the sums begin with this product. kSums is 8, 16,
/// 32, 64 or 128.
template <class T, bool kAdds, int kSums>
__device__ __forceinline__ void wgmma(float (&sums)[kSums], const uint32_t* a, uint64_t b) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);

  if constexpr (kSums == 8 && kHalf) {
    asm volatile(QN_WGMMA("m64n16k16", "f16", QN_SUMS_TEXT_16, "%8, %9, %10, %11", "%12", "%13")
                 : QN_SUMS_8(0)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 8 && !kHalf) {
    asm volatile(QN_WGMMA("m64n16k16", "bf16", QN_SUMS_TEXT_16, "%8, %9, %10, %11", "%12", "%13")
                 : QN_SUMS_8(0)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 16 && kHalf) {
    asm volatile(QN_WGMMA("m64n32k16", "f16", QN_SUMS_TEXT_32, "%16, %17, %18, %19", "%20", "%21")
                 : QN_SUMS_8(0), QN_SUMS_8(8)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 16 && !kHalf) {
    asm volatile(QN_WGMMA("m64n32k16", "bf16", QN_SUMS_TEXT_32, "%16, %17, %18, %19", "%20", "%21")
                 : QN_SUMS_8(0), QN_SUMS_8(8)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 32 && kHalf) {
    asm volatile(QN_WGMMA("m64n64k16", "f16", QN_SUMS_TEXT_64, "%32, %33, %34, %35", "%36", "%37")
                 : QN_SUMS_32(0)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 32 && !kHalf) {
    asm volatile(QN_WGMMA("m64n64k16", "bf16", QN_SUMS_TEXT_64, "%32, %33, %34, %35", "%36", "%37")
                 : QN_SUMS_32(0)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 64 && kHalf) {
    asm volatile(QN_WGMMA("m64n128k16", "f16", QN_SUMS_TEXT_128, "%64, %65, %66, %67", "%68", "%69")
                 : QN_SUMS_32(0), QN_SUMS_32(32)
                 : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 64 && !kHalf) {
    asm volatile(
        QN_WGMMA("m64n128k16", "bf16", QN_SUMS_TEXT_128, "%64, %65, %66, %67", "%68", "%69")
        : QN_SUMS_32(0), QN_SUMS_32(32)
        : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 128 && kHalf) {
    asm volatile(
        QN_WGMMA("m64n256k16", "f16", QN_SUMS_TEXT_256, "%128, %129, %130, %131", "%132", "%133")
        : QN_SUMS_32(0), QN_SUMS_32(32), QN_SUMS_32(64), QN_SUMS_32(96)
        : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else if constexpr (kSums == 128 && !kHalf) {
    asm volatile(
        QN_WGMMA("m64n256k16", "bf16", QN_SUMS_TEXT_256, "%128, %129, %130, %131", "%132", "%133")
        : QN_SUMS_32(0), QN_SUMS_32(32), QN_SUMS_32(64), QN_SUMS_32(96)
        : QN_REGISTERS_OF_A, "l"(b), "n"(kAdds));
  } else {
    static_assert(kSums == 8, "no instruction of this width here");
  }
}

#undef QN_REGISTERS_OF_A
#undef QN_WGMMA
#undef QN_SUMS_TEXT_16
#undef QN_SUMS_TEXT_32
#undef QN_SUMS_TEXT_64
#undef QN_SUMS_TEXT_128
#undef QN_SUMS_TEXT_256
#undef QN_SUMS_32
#undef QN_SUMS_8

}  // namespace qlora_native::cuda
