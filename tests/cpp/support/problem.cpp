#include "support/problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <ostream>

#include "support/number_formats.h"

namespace qlora_native::testing {
namespace {

float quiet_nan() { return __builtin_bit_cast(float, 0x7fc00000u); }

/// The published rule of FP4: |x| against seven thresholds, and the sign kept.
uint8_t reference_fp4_code(float x) {
  std::vector<float> magnitudes(kFP4.values, kFP4.values + 8);
  std::sort(magnitudes.begin(), magnitudes.end());
  int rank = 0;
  for (int i = 0; i < 7; ++i) rank += std::fabs(x) > kFP4.decision_points[8 + i];
  const auto code = std::find(kFP4.values, kFP4.values + 8, magnitudes[static_cast<size_t>(rank)]);
  return static_cast<uint8_t>(code - kFP4.values + (x < 0 ? 8 : 0));
}

/// Sorted codebooks: the fp32 midpoints of neighbours; a tie goes down.
uint8_t reference_code(const Codebook& book, float x) {
  if (book.type == QuantType::kFP4) return reference_fp4_code(x);
  int code = 0;
  while (code < 15) {
    const double sum = static_cast<double>(book.values[code]) + book.values[code + 1];
    if (!(x > static_cast<float>(sum / 2))) break;
    ++code;
  }
  return static_cast<uint8_t>(code);
}

/// Slot i after the step of the documented tree that adds slots `stride` apart.
double tree(const std::vector<double>& slots, size_t i, size_t stride) {
  if (stride == slots.size()) return slots[i];
  return tree(slots, i, 2 * stride) + tree(slots, i + stride, 2 * stride);
}

float reference_offset(const std::vector<float>& absmax) {
  std::vector<double> lanes(1024, 0.0);
  int64_t finite = 0;
  for (size_t g = 0; g * 256 < absmax.size(); ++g) {
    std::vector<double> slots(256, 0.0);
    for (size_t i = 0; i < 256 && g * 256 + i < absmax.size(); ++i) {
      const float a = absmax[g * 256 + i];
      if (!std::isfinite(a)) continue;
      slots[i] = a;
      ++finite;
    }
    lanes[g % 1024] += tree(slots, 0, 1);
  }
  return finite == 0 ? 0.0f : static_cast<float>(tree(lanes, 0, 1) / static_cast<double>(finite));
}

/// The entry of the dynamic map nearest to x, by exact distances; a tie goes down.
uint8_t nearest_dynamic_entry(float x) {
  int best = 0;
  for (int i = 1; i < 256; ++i) {
    // Differences of floats of similar size are exact in long double; it has 64 bits.
    const long double current =
        std::fabs(static_cast<long double>(x) - kSignedDynamicMap.values[i]);
    const long double least =
        std::fabs(static_cast<long double>(x) - kSignedDynamicMap.values[best]);
    if (current < least) best = i;
  }
  return static_cast<uint8_t>(best);
}

void reference_double_quantize(HostWeight* weight, const float* pinned_offset) {
  const std::vector<float>& absmax = weight->absmax;
  const float offset = pinned_offset ? *pinned_offset : reference_offset(absmax);
  weight->offset = {offset};
  for (size_t begin = 0; begin < absmax.size(); begin += 256) {
    const size_t end = std::min(begin + 256, absmax.size());
    float largest = 0.0f;
    bool has_nan = false;
    for (size_t b = begin; b < end; ++b) {
      has_nan = has_nan || std::isnan(absmax[b]);
      largest = std::max(largest, std::fabs(absmax[b] - offset));
    }
    const float reciprocal = 1.0f / largest;
    const bool is_flat = !std::isfinite(reciprocal);
    weight->absmax2.push_back(has_nan ? quiet_nan() : is_flat ? 0.0f : largest);
    for (size_t b = begin; b < end; ++b) {
      const float scaled = (absmax[b] - offset) * reciprocal;
      weight->absmax_codes.push_back(has_nan || is_flat ? kSignedDynamicZeroCode
                                                        : nearest_dynamic_entry(scaled));
    }
  }
  weight->absmax.clear();
}

/// absmax of a block of the weight.
float reference_scale(const HostWeight& weight, int64_t block) {
  const auto b = static_cast<size_t>(block);
  if (weight.absmax_codes.empty()) return weight.absmax[b];
  const float scaled = kSignedDynamicMap.values[weight.absmax_codes[b]] * weight.absmax2[b / 256];
  return scaled + weight.offset[0];
}

template <class T>
void expect_same_array(const std::vector<T>& actual, const std::vector<T>& expected,
                       const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) != 0) {
      FAIL() << what << "[" << i << "] is " << +actual[i] << ", expected " << +expected[i];
    }
  }
}

}  // namespace

Codebook uneven_codebook() {
  return make_custom_codebook({-1.0f, -0.83f, -0.61f, -0.47f, -0.31f, -0.2f, -0.11f, -0.04f, 0.02f,
                               0.09f, 0.17f, 0.29f, 0.4f, 0.58f, 0.77f, 0.95f});
}

std::ostream& operator<<(std::ostream& out, const WeightSpec& spec) {
  return out << spec.rows << " x " << spec.cols << ", block_size " << spec.block_size << ", "
             << name(spec.codebook.type) << (spec.double_quant ? ", double quantization" : "");
}

HostWeight random_weight(const WeightSpec& spec, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> byte(0, 255);
  std::uniform_real_distribution<float> scale(0.01f, 2.0f);
  HostWeight weight;
  weight.packed.resize(static_cast<size_t>(packed_bytes(spec.numel())));
  for (uint8_t& b : weight.packed) b = static_cast<uint8_t>(byte(generator));
  if (spec.double_quant) {
    weight.absmax_codes.resize(static_cast<size_t>(spec.blocks()));
    for (uint8_t& b : weight.absmax_codes) b = static_cast<uint8_t>(byte(generator));
    weight.absmax2.resize(static_cast<size_t>(spec.groups()));
    for (float& a : weight.absmax2) a = scale(generator);
    weight.offset = {scale(generator)};
  } else {
    weight.absmax.resize(static_cast<size_t>(spec.blocks()));
    for (float& a : weight.absmax) a = scale(generator);
  }
  return weight;
}

HostWeight reference_quantize(const WeightSpec& spec, const std::vector<double>& values,
                              const float* pinned_offset) {
  HostWeight weight;
  std::vector<uint8_t> codes;
  const auto numel = static_cast<size_t>(spec.numel());
  const auto block_size = static_cast<size_t>(spec.block_size);
  for (size_t begin = 0; begin < numel; begin += block_size) {
    const size_t end = std::min(begin + block_size, numel);
    float absmax = 0.0f;
    bool all_finite = true;
    for (size_t e = begin; e < end; ++e) {
      all_finite = all_finite && std::isfinite(values[e]);
      absmax = std::max(absmax, std::fabs(static_cast<float>(values[e])));
    }
    const float reciprocal = 1.0f / absmax;
    const bool is_zero = !std::isfinite(reciprocal);
    weight.absmax.push_back(!all_finite ? quiet_nan() : is_zero ? 0.0f : absmax);
    for (size_t e = begin; e < end; ++e) {
      const float scaled = static_cast<float>(values[e]) * reciprocal;
      codes.push_back(!all_finite || is_zero ? reference_code(spec.codebook, 0.0f)
                                             : reference_code(spec.codebook, scaled));
    }
  }
  if (codes.size() % 2 != 0) codes.push_back(reference_code(spec.codebook, 0.0f));
  for (size_t i = 0; i < codes.size(); i += 2) {
    weight.packed.push_back(static_cast<uint8_t>(codes[i] * 16 + codes[i + 1]));
  }
  if (spec.double_quant) reference_double_quantize(&weight, pinned_offset);
  return weight;
}

std::vector<double> reference_decode(const WeightSpec& spec, const HostWeight& weight) {
  std::vector<double> values;
  for (int64_t e = 0; e < spec.numel(); ++e) {
    const uint8_t byte = weight.packed[static_cast<size_t>(e / 2)];
    const int code = e % 2 == 0 ? byte / 16 : byte % 16;
    const double product = static_cast<double>(spec.codebook.values[code]) *
                           static_cast<double>(reference_scale(weight, e / spec.block_size));
    values.push_back(round_to(DType::kFloat32, product));
  }
  return values;
}

DeviceWeight::DeviceWeight(Device device, const WeightSpec& spec)
    : device_(device),
      spec_(spec),
      packed_(device, packed_bytes(spec.numel())),
      absmax_(device, spec.double_quant ? 0 : spec.blocks()),
      absmax_codes_(device, spec.double_quant ? spec.blocks() : 0),
      absmax2_(device, spec.double_quant ? spec.groups() : 0),
      offset_(device, spec.double_quant ? 1 : 0) {}

DeviceWeight::DeviceWeight(Device device, const WeightSpec& spec, const HostWeight& values)
    : device_(device),
      spec_(spec),
      packed_(device, std::span<const uint8_t>(values.packed)),
      absmax_(device, std::span<const float>(values.absmax)),
      absmax_codes_(device, std::span<const uint8_t>(values.absmax_codes)),
      absmax2_(device, std::span<const float>(values.absmax2)),
      offset_(device, std::span<const float>(values.offset)) {}

MutableQuantizedView DeviceWeight::mutable_view() {
  MutableAbsmax absmax;
  if (spec_.double_quant) {
    absmax = {nullptr, absmax_codes_.data(), absmax2_.data(), offset_.data()};
  } else {
    absmax.values = absmax_.data();
  }
  return {packed_.data(),   absmax,         spec_.rows, spec_.cols,
          spec_.block_size, spec_.codebook, device_};
}

QuantizedView DeviceWeight::view() {
  const MutableQuantizedView v = mutable_view();
  return {v.packed,     {v.absmax.values, v.absmax.codes, v.absmax.absmax2, v.absmax.offset},
          v.rows,       v.cols,
          v.block_size, v.codebook,
          v.device};
}

HostWeight DeviceWeight::to_host() const {
  return {packed_.to_host(), absmax_.to_host(), absmax_codes_.to_host(), absmax2_.to_host(),
          offset_.to_host()};
}

bool DeviceWeight::is_untouched() const {
  return packed_.is_untouched() && absmax_.is_untouched() && absmax_codes_.is_untouched() &&
         absmax2_.is_untouched() && offset_.is_untouched();
}

void DeviceWeight::expect_guards_intact() const {
  packed_.expect_guards_intact();
  absmax_.expect_guards_intact();
  absmax_codes_.expect_guards_intact();
  absmax2_.expect_guards_intact();
  offset_.expect_guards_intact();
}

void expect_same_bytes(const HostWeight& actual, const HostWeight& expected) {
  expect_same_array(actual.absmax, expected.absmax, "absmax");
  expect_same_array(actual.packed, expected.packed, "packed");
  expect_same_array(actual.offset, expected.offset, "offset");
  expect_same_array(actual.absmax2, expected.absmax2, "absmax2");
  expect_same_array(actual.absmax_codes, expected.absmax_codes, "absmax codes");
}

std::vector<double> gaussian(int64_t count, DType dtype, uint32_t seed, double sigma) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, sigma);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = round_to(dtype, normal(generator));
  return values;
}

HostWeight quantize_on(Device device, const WeightSpec& spec, DType dtype,
                       const std::vector<double>& values, const float* pinned_offset) {
  const std::vector<uint8_t> bytes = to_bytes(dtype, values);
  DeviceArray<uint8_t> input(device, std::span<const uint8_t>(bytes));
  DeviceWeight output(device, spec);
  DeviceArray<float> offset(device, std::span<const float>(pinned_offset, pinned_offset ? 1 : 0));
  QuantizeArgs args;
  args.input = {input.data(), spec.numel(), dtype, device};
  args.output = output.mutable_view();
  args.pinned_offset = pinned_offset ? offset.data() : nullptr;
  DeviceArray<uint8_t> workspace(device, quantize_4bit_workspace_bytes(args));
  const TestStream stream(device);
  quantize_4bit(args, {workspace.data(), workspace.size()}, stream.get());
  stream.synchronize();
  output.expect_guards_intact();
  workspace.expect_guards_intact();
  EXPECT_EQ(input.to_host(), bytes) << "the input was written to";
  return output.to_host();
}

std::vector<uint8_t> dequantize_on(Device device, const WeightSpec& spec, const HostWeight& weight,
                                   DType dtype) {
  DeviceWeight input(device, spec, weight);
  DeviceArray<uint8_t> output(device, spec.numel() * size_bytes(dtype));
  const TestStream stream(device);
  dequantize_4bit({input.view(), {output.data(), spec.numel(), dtype, device}}, stream.get());
  stream.synchronize();
  output.expect_guards_intact();
  return output.to_host();
}

}  // namespace qlora_native::testing
