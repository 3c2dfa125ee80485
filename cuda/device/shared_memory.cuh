// Shared memory by its 32-bit addresses: address arithmetic in one instruction, and no doubt about
// the kind of memory.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and
/// gets columns 2t, 2t + 1 (t = l % 4) of row l / 4 of each. (PTX ISA, ldmatrix.)
__device__ __forceinline__ void load_matrix_x4(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

/// The same of the transposed matrices: a lane gets rows 2t, 2t + 1 of column l / 4 of each.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// Volatile keeps the accesses on their side of a barrier.

__device__ __forceinline__ float load_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address));
  return value;
}

/// Loads 16 bytes where `wanted`; elsewhere `value` stays, and the lane costs no bandwidth.
__device__ __forceinline__ void load_shared_if(uint4& value, uint32_t address, bool wanted) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
               : "r"(address), "r"(static_cast<uint32_t>(wanted)));
}

/// The same of a float.
__device__ __forceinline__ void load_shared_if(float& value, uint32_t address, bool wanted) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.shared.f32 %0, [%1];}"
               : "+f"(value)
               : "r"(address), "r"(static_cast<uint32_t>(wanted)));
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y)
               : "memory");
}

/// The opposite of load_matrix_x4 for transposed matrices: column r of matrix i, as the lanes hold it, becomes
/// the 16 bytes at the address that lane 8i + r gives. (PTX ISA, stmatrix; sm_90 and newer.)
__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t address,
                                                           const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

}  // namespace qlora_native::cuda
