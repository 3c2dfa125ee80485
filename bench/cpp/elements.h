// Arrays of float32, float16 and bfloat16 on the host, converted without the library's help.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "machine.h"
#include "qlora_native/dtype.h"

namespace bench {

/// A host copy of an array, read element by element.
class HostArray {
 public:
  HostArray(const Buffer& buffer, int64_t count, qlora_native::DType dtype)
      : HostArray(buffer.to_host<uint8_t>(count * qlora_native::size_bytes(dtype)), dtype) {}
  HostArray(std::vector<uint8_t> raw, qlora_native::DType dtype)
      : raw_(std::move(raw)), dtype_(dtype) {}

  float operator[](int64_t index) const;

 private:
  std::vector<uint8_t> raw_;
  qlora_native::DType dtype_;
};

/// The values cut off (not rounded) to `dtype`: good enough for made-up data.
std::vector<uint8_t> encode(std::span<const float> values, qlora_native::DType dtype);

/// Half the distance between the numbers of `dtype` around x.
double half_ulp(double x, qlora_native::DType dtype);

}  // namespace bench
