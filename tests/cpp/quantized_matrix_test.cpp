// 4-bit matrices from checkpoints in both layouts, compared with the reference's decoding.
#include "qlora_native/quantized_matrix.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "qlora_native/dequantize.h"
#include "support/problem.h"
#include "support/rejection.h"
#include "support/safetensors_bytes.h"

namespace qlora_native::testing {
namespace {

std::vector<float> decode(const QuantizedMatrix& matrix) {
  std::vector<float> values(static_cast<size_t>(matrix.view().numel()));
  dequantize_4bit({.weight = matrix.view(),
                   .output = {values.data(), matrix.view().numel(), DType::kFloat32, {}}},
                  Stream::none());
  return values;
}

void expect_decodes(const QuantizedMatrix& matrix, const std::vector<double>& expected) {
  const std::vector<float> actual = decode(matrix);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_TRUE(actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i])))
        << "element " << i << ": " << actual[i] << ", expected " << expected[i];
  }
}

std::vector<uint8_t> raw(const std::vector<float>& values) {
  const auto* const first = reinterpret_cast<const uint8_t*>(values.data());
  return {first, first + values.size() * sizeof(float)};
}

FileTensor u8(const std::string& name, const std::vector<uint8_t>& values) {
  return {name, "U8", {static_cast<int64_t>(values.size())}, bytes_of(values)};
}

FileTensor f32(const std::string& name, const std::vector<float>& values) {
  return {name, "F32", {static_cast<int64_t>(values.size())}, bytes_of(values)};
}

std::vector<FileTensor> our_tensors(const WeightSpec& spec, const HostWeight& weight) {
  std::vector<FileTensor> tensors = {u8("m.weight", weight.packed)};
  if (spec.cols % 2 == 0) tensors[0].shape = {spec.rows, spec.cols / 2};
  if (!spec.double_quant) {
    tensors.push_back(u8("m.weight_absmax", raw(weight.absmax)));
    return tensors;
  }
  tensors.push_back(u8("m.weight_absmax", weight.absmax_codes));
  std::vector<float> constants = weight.absmax2;
  constants.push_back(weight.offset[0]);
  tensors.push_back(u8("m.weight_absmax2", raw(constants)));
  return tensors;
}

/// With a map of absmax codes and groups of the caller's choice.
std::vector<FileTensor> their_tensors(const WeightSpec& spec, const HostWeight& weight,
                                      const DynamicMap& map = kSignedDynamicMap,
                                      int64_t group = kGroupSize) {
  const std::string type = name(spec.codebook.type);
  std::string state = "{\"quant_type\": \"" + type +
                      "\", \"blocksize\": " + std::to_string(spec.block_size) +
                      ", \"dtype\": \"bfloat16\", \"shape\": [" + std::to_string(spec.rows) + ", " +
                      std::to_string(spec.cols) + "]";
  std::vector<FileTensor> tensors = {u8("m.weight", weight.packed)};
  std::vector<float> values(spec.codebook.values, spec.codebook.values + 16);
  for (float& value : values) value += 0.0f;  // as it writes FP4's negative zero
  tensors.push_back(f32("m.weight.quant_map", values));
  if (spec.double_quant) {
    char offset[32];
    snprintf(offset, sizeof offset, "%.17g", static_cast<double>(weight.offset[0]));
    state += ", \"nested_blocksize\": " + std::to_string(group) +
             ", \"nested_dtype\": \"float32\", \"nested_offset\": " + offset;
    tensors.push_back(u8("m.weight.absmax", weight.absmax_codes));
    tensors.push_back(f32("m.weight.nested_absmax", weight.absmax2));
    tensors.push_back(f32("m.weight.nested_quant_map", {map.values, map.values + 256}));
  } else {
    tensors.push_back(f32("m.weight.absmax", weight.absmax));
  }
  state += "}";
  tensors.push_back(u8("m.weight.quant_state.bitsandbytes__" + type, {state.begin(), state.end()}));
  return tensors;
}

struct Opened {
  Bytes bytes;
  SafetensorsCheckpoint checkpoint;

  explicit Opened(const std::vector<FileTensor>& tensors, size_t padding = 0)
      : bytes(safetensors_bytes(tensors, padding)),
        checkpoint(SafetensorsFile::over(bytes, "the.file")) {}
};

const WeightSpec kSpecs[] = {
    {4, 64, 64, kNF4, true},     {7, 96, 64, kFP4, true},   {3, 37, 32, kNF4, true},
    {5, 130, 128, kINT4, true},  {4, 64, 64, kNF4, false},  {9, 33, 32, kFP4, false},
    {1, 1, 64, kNF4, false},     {96, 512, 64, kNF4, true}, {0, 64, 64, kNF4, false},
    {3, 4096, 4096, kFP4, true}, {600, 64, 64, kNF4, true},
};

QuantizationConfig config_of(const WeightSpec& spec) {
  return QuantizationConfig({spec.codebook.type, spec.block_size, spec.double_quant});
}

MatrixShape shape_of(const WeightSpec& spec) { return {spec.rows, spec.cols}; }

TEST(QuantizedMatrix, OurLayoutAtEveryAlignment) {
  for (const WeightSpec& spec : kSpecs) {
    SCOPED_TRACE(::testing::PrintToString(spec));
    const HostWeight weight = random_weight(spec, 1);
    for (size_t padding = 0; padding < 4; ++padding) {
      const Opened opened(our_tensors(spec, weight), padding);
      EXPECT_TRUE(QuantizedMatrix::is_in(opened.checkpoint, "m.weight"));
      const auto matrix =
          QuantizedMatrix::load(opened.checkpoint, "m.weight", config_of(spec), shape_of(spec));
      EXPECT_EQ(matrix.view().rows, spec.rows);
      EXPECT_EQ(matrix.view().cols, spec.cols);
      EXPECT_EQ(matrix.view().absmax.is_double_quantized(), spec.double_quant);
      expect_decodes(matrix, reference_decode(spec, weight));
    }
  }
}

TEST(QuantizedMatrix, BitsandbytesLayoutAtEveryAlignment) {
  for (const WeightSpec& spec : kSpecs) {
    if (spec.codebook.type == QuantType::kINT4) continue;
    SCOPED_TRACE(::testing::PrintToString(spec));
    const HostWeight weight = random_weight(spec, 2);
    for (size_t padding = 0; padding < 4; ++padding) {
      const Opened opened(their_tensors(spec, weight), padding);
      EXPECT_TRUE(QuantizedMatrix::is_in(opened.checkpoint, "m.weight"));
      const auto matrix = QuantizedMatrix::load(opened.checkpoint, "m.weight", {});
      EXPECT_EQ(matrix.view().rows, spec.rows);
      EXPECT_EQ(matrix.view().cols, spec.cols);
      EXPECT_EQ(matrix.view().absmax.is_double_quantized(), spec.double_quant);
      expect_decodes(matrix, reference_decode(spec, weight));
    }
  }
}

TEST(QuantizedMatrix, AbsmaxCodesOfAnotherMapOrOtherGroupsAreDecoded) {
  const WeightSpec spec{40, 512, 64, kNF4, true};  // 320 blocks: two groups
  HostWeight weight = random_weight(spec, 3);
  DynamicMap map = kSignedDynamicMap;
  for (float& value : map.values) value = std::nextafter(value, 2.0f);
  for (const int64_t group : {int64_t{256}, int64_t{100}, int64_t{1000}}) {
    const int64_t groups = (spec.blocks() + group - 1) / group;
    weight.absmax2.assign(static_cast<size_t>(groups), 0.25f);
    weight.absmax2[0] = 3.0f;
    // The same weight without double quantization: each operation rounded to fp32.
    WeightSpec plain = spec;
    plain.double_quant = false;
    HostWeight decoded;
    decoded.packed = weight.packed;
    for (int64_t block = 0; block < spec.blocks(); ++block) {
      const volatile float product =
          map.values[weight.absmax_codes[block]] * weight.absmax2[block / group];
      decoded.absmax.push_back(product + weight.offset[0]);
    }
    const Opened opened(their_tensors(spec, weight, map, group));
    const auto matrix = QuantizedMatrix::load(opened.checkpoint, "m.weight", {});
    EXPECT_FALSE(matrix.view().absmax.is_double_quantized());
    expect_decodes(matrix, reference_decode(plain, decoded));
  }
}

TEST(QuantizedMatrix, CopiesShareWhatTheyOwn) {
  const WeightSpec spec{4, 64, 64, kNF4, true};
  const HostWeight weight = random_weight(spec, 4);
  const Opened opened(their_tensors(spec, weight));
  std::vector<QuantizedMatrix> matrices;
  matrices.push_back(QuantizedMatrix::load(opened.checkpoint, "m.weight", {}));
  const QuantizedMatrix copy = matrices.front();
  matrices.clear();
  expect_decodes(copy, reference_decode(spec, weight));
}

TEST(QuantizedMatrix, DenseTensorsAreNotIn) {
  const Opened opened({f32("m.weight", {1, 2})});
  EXPECT_FALSE(QuantizedMatrix::is_in(opened.checkpoint, "m.weight"));
  EXPECT_FALSE(QuantizedMatrix::is_in(opened.checkpoint, "other.weight"));
  expect_rejected([&] { QuantizedMatrix::load(opened.checkpoint, "m.weight", {}); },
                  {"the.file", "\"m.weight\"", "F32", "U8"});
}

// ---- What does not fit ----

class Misfit : public ::testing::Test {
 protected:
  using Tensors = std::vector<FileTensor>;

  static FileTensor& named(Tensors& tensors, const std::string& name) {
    for (FileTensor& tensor : tensors) {
      if (tensor.name == name) return tensor;
    }
    throw std::out_of_range(name);
  }

  static void drop_last_bytes(FileTensor& tensor, size_t count) {
    tensor.data.resize(tensor.data.size() - count);
    tensor.shape = {static_cast<int64_t>(tensor.data.size()) / (tensor.dtype == "F32" ? 4 : 1)};
  }

  static void remove(Tensors& tensors, const std::string& name) {
    std::erase_if(tensors, [&](const FileTensor& tensor) { return tensor.name == name; });
  }

  void rejects(const Tensors& tensors, const std::vector<std::string>& words,
               const QuantizationConfig& config = {},
               std::optional<MatrixShape> shape = std::nullopt) const {
    const Opened opened(tensors);
    std::vector<std::string> expected = {"the.file"};
    expected.insert(expected.end(), words.begin(), words.end());
    expect_rejected([&] { QuantizedMatrix::load(opened.checkpoint, "m.weight", config, shape); },
                    expected);
  }

  const WeightSpec spec_{4, 64, 64, kNF4, true};
  const HostWeight weight_ = random_weight(spec_, 5);
  const Tensors ours_ = our_tensors(spec_, weight_);
  const Tensors theirs_ = their_tensors(spec_, weight_);
  const std::string state_ = "m.weight.quant_state.bitsandbytes__nf4";
};

TEST_F(Misfit, OurTensors) {
  for (const FileTensor& part : ours_) {
    Tensors tensors = ours_;
    remove(tensors, part.name);
    if (part.name == "m.weight_absmax") {
      rejects(tensors, {"\"m.weight_absmax\""});
    } else {
      rejects(tensors, {"\"" + part.name + "\""});
    }
    tensors = ours_;
    drop_last_bytes(named(tensors, part.name), 1);
    if (part.name == "m.weight") named(tensors, part.name).shape = {127};
    rejects(tensors, {"\"" + part.name + "\"", "4 x 64", "blocks of 64"}, {}, MatrixShape{4, 64});
    tensors = ours_;
    named(tensors, part.name).dtype = "I8";
    rejects(tensors, {"\"" + part.name + "\"", "I8", "U8"});
  }
}

TEST_F(Misfit, OurSettings) {
  const QuantizationConfig plain({.double_quant = false});
  rejects(ours_, {"\"m.weight_absmax\"", "4 bytes", "takes 16"}, plain);
  const QuantizationConfig wide({.block_size = 128});
  rejects(ours_, {"\"m.weight_absmax\"", "blocks of 128", "takes 2"}, wide);
  rejects(ours_, {"block_size 48"}, QuantizationConfig({.block_size = 48}));
  const Opened opened(ours_);
  const QuantizationConfig custom({.quant_type = QuantType::kCustom});
  expect_rejected([&] { QuantizedMatrix::load(opened.checkpoint, "m.weight", custom); },
                  {"custom"});
}

TEST_F(Misfit, Shapes) {
  rejects(ours_, {"4 x 64", "expected 4 x 66"}, {}, MatrixShape{4, 66});
  rejects(theirs_, {"4 x 64", "expected 64 x 4"}, {}, MatrixShape{64, 4});
  Tensors tensors = ours_;
  named(tensors, "m.weight").shape = {2, 2, 32};
  rejects(tensors, {"[2, 2, 32]"});
  named(tensors, "m.weight").shape = {128};
  rejects(tensors, {"odd number of columns"});
  rejects(tensors, {"overflows"}, {}, MatrixShape{1LL << 40, 1LL << 40});
  rejects(tensors, {"overflows"}, {}, MatrixShape{-1, 4});
  tensors = {{"m.weight", "U8", {0, 1LL << 58}, {}}, u8("m.weight_absmax", {})};
  EXPECT_EQ(QuantizedMatrix::load(Opened(tensors).checkpoint, "m.weight",
                                  QuantizationConfig({.double_quant = false}))
                .view()
                .rows,
            0);
}

TEST_F(Misfit, TheirTensors) {
  for (const char* part : {"m.weight", "m.weight.absmax", "m.weight.quant_map",
                           "m.weight.nested_absmax", "m.weight.nested_quant_map"}) {
    SCOPED_TRACE(part);
    const std::string quoted = "\"" + std::string(part) + "\"";
    Tensors tensors = theirs_;
    remove(tensors, part);
    if (std::string(part) == "m.weight.nested_absmax") {
      rejects(tensors, {"\"m.weight.absmax\"", "U8", "F32"});
    } else {
      rejects(tensors, {quoted});
    }
    tensors = theirs_;
    drop_last_bytes(named(tensors, part), named(tensors, part).dtype == "F32" ? 4 : 1);
    rejects(tensors, {quoted});
  }
  Tensors tensors = theirs_;
  float wrong = 0.5f;
  std::memcpy(named(tensors, "m.weight.quant_map").data.data(), &wrong, 4);
  rejects(tensors, {"\"m.weight.quant_map\"", "nf4"});
}

TEST_F(Misfit, TheirPackedBytesMayHaveAnyDtype) {
  Tensors tensors = theirs_;
  named(tensors, "m.weight").dtype = "BF16";
  named(tensors, "m.weight").shape = {64, 1};
  expect_decodes(QuantizedMatrix::load(Opened(tensors).checkpoint, "m.weight", {}),
                 reference_decode(spec_, weight_));
}

TEST_F(Misfit, TheirState) {
  const std::pair<const char*, const char*> wrong[] = {
      {"", "not JSON"},
      {"[]", "quant_type"},
      {R"({"quant_type": "int8"})", "quant_type"},
      {R"({"quant_type": "nf4"})", "blocksize"},
      {R"({"quant_type": "nf4", "blocksize": 48})", "blocksize 48"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [256]})", "shape"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4, "64"]})", "shape"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [-4, 64]})", "-4 x 64"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4611686018427387904, 4]})", "overflows"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [5, 64]})", "takes 160"},
      {R"({"quant_type": "fp4", "blocksize": 64, "shape": [4, 64]})", "map of fp4"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4, 64]})", "nested_blocksize"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_blocksize": 0})",
       "nested_blocksize is 0"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_blocksize": 2,
           "nested_offset": 0})",
       "groups of 2 take 2"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_blocksize": 256})",
       "nested_offset"},
      {R"({"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_blocksize": 256,
           "nested_offset": 1e300})",
       "nested_offset"},
  };
  for (const auto& [state, word] : wrong) {
    Tensors tensors = theirs_;
    const std::string text = state;
    named(tensors, state_) = u8(state_, {text.begin(), text.end()});
    rejects(tensors, {word});
  }
}

}  // namespace
}  // namespace qlora_native::testing
