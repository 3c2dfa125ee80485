// Quantized weights for the tests: on the host, on the device, and by an independent reference.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "qlora_native/qlora_native.h"
#include "support/device_array.h"

namespace qlora_native::testing {

struct WeightSpec {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t block_size = 64;
  Codebook codebook = kNF4;
  bool double_quant = false;

  int64_t numel() const { return rows * cols; }
  int64_t blocks() const { return num_blocks(numel(), block_size); }
  int64_t groups() const { return num_groups(blocks()); }
};

/// Sixteen unevenly spaced values without a zero among them.
Codebook uneven_codebook();

std::ostream& operator<<(std::ostream& out, const WeightSpec& spec);

/// The arrays of a quantized weight; those that its spec has no use for are empty.
struct HostWeight {
  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  std::vector<uint8_t> absmax_codes;
  std::vector<float> absmax2;
  std::vector<float> offset;
};

/// Random codes and scales of every size.
HostWeight random_weight(const WeightSpec& spec, uint32_t seed);

/// What quantize_4bit has to write for `values` (fp32 numbers), element by element.
/// `pinned_offset` null: the offset is computed.
HostWeight reference_quantize(const WeightSpec& spec, const std::vector<double>& values,
                              const float* pinned_offset = nullptr);

/// The fp32 values of the elements: one product for each, rounded to fp32.
std::vector<double> reference_decode(const WeightSpec& spec, const HostWeight& weight);

class DeviceWeight {
 public:
  DeviceWeight(Device device, const WeightSpec& spec);  ///< poisoned
  DeviceWeight(Device device, const WeightSpec& spec, const HostWeight& values);

  MutableQuantizedView mutable_view();
  QuantizedView view();
  HostWeight to_host() const;
  bool is_untouched() const;
  void expect_guards_intact() const;

 private:
  Device device_;
  WeightSpec spec_;
  DeviceArray<uint8_t> packed_;
  DeviceArray<float> absmax_;
  DeviceArray<uint8_t> absmax_codes_;
  DeviceArray<float> absmax2_;
  DeviceArray<float> offset_;
};

/// All arrays have equal bytes, NaN included; names the first difference.
void expect_same_bytes(const HostWeight& actual, const HostWeight& expected);

/// Gaussian numbers, exactly representable in `dtype`.
std::vector<double> gaussian(int64_t count, DType dtype, uint32_t seed, double sigma = 1.0);

/// quantize_4bit of `values` stored as `dtype`, with its workspace, on `device`.
HostWeight quantize_on(Device device, const WeightSpec& spec, DType dtype,
                       const std::vector<double>& values, const float* pinned_offset = nullptr);

/// dequantize_4bit; the bytes of the output.
std::vector<uint8_t> dequantize_on(Device device, const WeightSpec& spec, const HostWeight& weight,
                                   DType dtype);

}  // namespace qlora_native::testing
