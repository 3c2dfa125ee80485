// Conversions between fp32 and the array types, and wide loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace qlora_native::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Elements of T in the widest access, 16 bytes.
template <class T>
inline constexpr int kVectorElems = 16 / sizeof(T);

/// 16 bytes as an array of T.
template <class T>
struct alignas(16) Vector {
  T elems[kVectorElems<T>];
};

/// The elements of T in 16 bytes, as fp32. From words, because a copy through memory of a 16-bit
/// type compiles to one access per element.
template <class T>
__device__ __forceinline__ void unpack(uint4 vector, float* out) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      out[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i])));
      out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i] >> 16)));
    } else {
      // A bf16 is the upper half of its fp32.
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

/// Eight elements at `source` as fp32. `kAligned`: `source` is 16-byte aligned.
template <bool kAligned, class T>
__device__ __forceinline__ void load8(const T* source, float (&out)[8]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int v = 0; v < 8 / kVectorElems<T>; ++v) {
      unpack<T>(reinterpret_cast<const uint4*>(source)[v], out + v * kVectorElems<T>);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = to_float(source[i]);
  }
}

/// The first `count` elements of up to eight, and zeros after them.
template <class T>
__device__ __forceinline__ void load8_partial(const T* source, int64_t count, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i < count ? to_float(source[i]) : 0.0f;
}

/// 16 bytes read once: they do not displace what the L1 cache is used for.
__device__ __forceinline__ uint4 load_streaming(const uint4* source) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(source));
  return value;
}

}  // namespace qlora_native::cuda
