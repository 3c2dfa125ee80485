#include "qlora_native/quantized_matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "in_quotes.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

// Of a weight's name, by layout.
constexpr const char* kOurAbsmax = "_absmax";
constexpr const char* kOurAbsmax2 = "_absmax2";
constexpr const char* kTheirStates[] = {".quant_state.bitsandbytes__nf4",
                                        ".quant_state.bitsandbytes__fp4"};

const uint8_t* as_codes(std::span<const std::byte> bytes) {
  return reinterpret_cast<const uint8_t*>(bytes.data());
}

const Codebook& codebook_of(QuantType type) {
  switch (type) {
    case QuantType::kNF4:
      return kNF4;
    case QuantType::kFP4:
      return kFP4;
    case QuantType::kINT4:
      return kINT4;
    case QuantType::kCustom:
      break;
  }
  fail("checkpoints hold matrices of type nf4, fp4 and int4, not ", name(type));
}

}  // namespace

/// Reads one matrix of one checkpoint.
class QuantizedMatrixReader {
 public:
  QuantizedMatrixReader(const SafetensorsCheckpoint& checkpoint, std::string_view name)
      : checkpoint_(checkpoint), name_(name) {}

  static const SafetensorsTensor* their_state(const SafetensorsCheckpoint& checkpoint,
                                              std::string_view name) {
    for (const char* suffix : kTheirStates) {
      if (const auto* state = checkpoint.find(std::string(name) + suffix)) return state;
    }
    return nullptr;
  }

  QuantizedMatrix read(const QuantizationConfig& config, std::optional<MatrixShape> shape) {
    if constexpr (std::endian::native != std::endian::little) {
      throw Unsupported("4-bit checkpoints are read on little-endian processors only");
    }
    if (const auto* state = their_state(checkpoint_, name_)) {
      read_theirs(*state, shape);
    } else {
      std::string_view module = name_;
      if (module.ends_with(".weight")) module.remove_suffix(7);
      read_ours(config.settings_of(module), shape);
    }
    return std::move(result_);
  }

 private:
  template <class... Parts>
  [[noreturn]] void refuse(const std::string& suffix, const Parts&... parts) const {
    fail(checkpoint_.name(), ": tensor ", in_quotes(name_ + suffix), ": ", parts...);
  }

  const SafetensorsTensor& tensor(const std::string& suffix, std::string_view dtype) const {
    const SafetensorsTensor& found = checkpoint_.at(name_ + suffix);
    if (found.dtype != dtype) refuse(suffix, "is ", found.dtype, ", expected ", dtype);
    return found;
  }

  void require_bytes(const std::string& suffix, const SafetensorsTensor& found,
                     int64_t expected) const {
    if (static_cast<int64_t>(found.data.size()) != expected) {
      refuse(suffix, "has ", found.data.size(), " bytes, but ", view().rows, " x ", view().cols,
             " in blocks of ", view().block_size, " takes ", expected);
    }
  }

  /// fp32 values, in the file if they can be read there.
  const float* as_floats(std::span<const std::byte> bytes) {
    if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(float) == 0) {
      return reinterpret_cast<const float*>(bytes.data());
    }
    float* const copy = own(bytes.size() / sizeof(float));
    std::memcpy(copy, bytes.data(), bytes.size());
    return copy;
  }

  float* own(size_t count) {
    auto values = std::make_shared<float[]>(count);
    result_.copies_.push_back(values);
    return values.get();
  }

  QuantizedView& view() { return result_.view_; }
  const QuantizedView& view() const { return result_.view_; }

  void set_shape(MatrixShape actual, std::optional<MatrixShape> expected) {
    int64_t bits = 0;
    if (actual.rows < 0 || actual.cols < 0 ||
        __builtin_mul_overflow(actual.rows, actual.cols, &bits) ||
        __builtin_mul_overflow(bits, int64_t{8}, &bits)) {
      refuse("", "a matrix of ", actual.rows, " x ", actual.cols, " overflows 64 bits");
    }
    if (expected && (expected->rows != actual.rows || expected->cols != actual.cols)) {
      refuse("", "is a matrix of ", actual.rows, " x ", actual.cols, ", expected ", expected->rows,
             " x ", expected->cols);
    }
    view().rows = actual.rows;
    view().cols = actual.cols;
  }

  int64_t blocks() const { return num_blocks(view().numel(), view().block_size); }

  // ---- Our layout ----

  void read_ours(const QuantizationSettings& settings, std::optional<MatrixShape> shape) {
    if (!is_valid_block_size(settings.block_size)) refuse("", "block_size ", settings.block_size);
    view().block_size = settings.block_size;
    view().codebook = codebook_of(settings.quant_type);
    const SafetensorsTensor& weight = tensor("", "U8");
    set_shape(our_shape(weight, shape), shape);
    require_bytes("", weight, packed_bytes(view().numel()));
    view().packed = as_codes(weight.data);
    const SafetensorsTensor& absmax = tensor(kOurAbsmax, "U8");
    if (!settings.double_quant) {
      require_bytes(kOurAbsmax, absmax, 4 * blocks());
      view().absmax.values = as_floats(absmax.data);
      return;
    }
    require_bytes(kOurAbsmax, absmax, blocks());
    const SafetensorsTensor& absmax2 = tensor(kOurAbsmax2, "U8");
    const int64_t groups = num_groups(blocks());
    require_bytes(kOurAbsmax2, absmax2, 4 * (groups + 1));
    const float* const constants = as_floats(absmax2.data);
    view().absmax = {nullptr, as_codes(absmax.data), constants, constants + groups};
  }

  MatrixShape our_shape(const SafetensorsTensor& weight, std::optional<MatrixShape> shape) const {
    if (weight.shape.size() == 2) {
      int64_t cols = 0;
      if (__builtin_mul_overflow(weight.shape[1], int64_t{2}, &cols)) {
        refuse("", "has shape ", to_string(weight.shape), ", which overflows 64 bits");
      }
      return {weight.shape[0], cols};
    }
    if (weight.shape.size() != 1) {
      refuse("", "has shape ", to_string(weight.shape), ", which is no packed matrix's");
    }
    if (!shape) refuse("", "has an odd number of columns: the caller has to say how many");
    return *shape;
  }

  // ---- The layout of bitsandbytes ----

  void read_theirs(const SafetensorsTensor& state, std::optional<MatrixShape> shape) {
    const std::string_view text(reinterpret_cast<const char*>(state.data.data()),
                                state.data.size());
    const std::string suffix = state.name.substr(name_.size());
    info_ = Json::parse(text, checkpoint_.name() + ": tensor " + in_quotes(state.name));
    const Json* const type = info_.find("quant_type");
    const std::string* const type_name = type == nullptr ? nullptr : type->string();
    if (type_name == nullptr ||
        (*type_name != name(QuantType::kNF4) && *type_name != name(QuantType::kFP4))) {
      refuse(suffix, "its quant_type is neither nf4 nor fp4");
    }
    view().codebook = *type_name == name(QuantType::kNF4) ? kNF4 : kFP4;
    view().block_size = integer(suffix, "blocksize");
    if (!is_valid_block_size(view().block_size)) {
      refuse(suffix, "blocksize ", view().block_size, " is not a power of two from ", kMinBlockSize,
             " to ", kMaxBlockSize);
    }
    set_shape(their_shape(suffix), shape);
    // Of whatever dtype: the bytes are what counts.
    const SafetensorsTensor& weight = checkpoint_.at(name_);
    require_bytes("", weight, packed_bytes(view().numel()));
    view().packed = as_codes(weight.data);
    require_map(".quant_map", view().codebook.values);
    if (checkpoint_.find(name_ + ".nested_absmax") != nullptr) {
      read_nested(suffix);
    } else {
      const SafetensorsTensor& absmax = tensor(".absmax", "F32");
      require_bytes(".absmax", absmax, 4 * blocks());
      view().absmax.values = as_floats(absmax.data);
    }
  }

  int64_t integer(const std::string& suffix, const char* key) const {
    const Json* const value = info_.find(key);
    if (value == nullptr || !value->integer()) refuse(suffix, "has no integer ", key);
    return *value->integer();
  }

  MatrixShape their_shape(const std::string& suffix) const {
    const Json* const value = info_.find("shape");
    const Json::Array* const sizes = value == nullptr ? nullptr : value->array();
    if (sizes == nullptr || sizes->size() != 2 || !(*sizes)[0].integer() ||
        !(*sizes)[1].integer()) {
      refuse(suffix, "its shape is not that of a matrix");
    }
    return {*(*sizes)[0].integer(), *(*sizes)[1].integer()};
  }

  /// The fp32 values of a map.
  template <size_t kCount>
  std::span<const float, kCount> map_of(const std::string& suffix) {
    const SafetensorsTensor& found = tensor(suffix, "F32");
    if (found.data.size() != kCount * sizeof(float)) {
      refuse(suffix, "has ", found.data.size(), " bytes, a map takes ", kCount * sizeof(float));
    }
    return std::span<const float, kCount>(as_floats(found.data), kCount);
  }

  void require_map(const std::string& suffix, const float (&values)[16]) {
    // As numbers: bitsandbytes writes FP4's negative zero as a positive one.
    if (!std::ranges::equal(map_of<16>(suffix), values)) {
      refuse(suffix, "is not the map of ", name(view().codebook.type));
    }
  }

  void read_nested(const std::string& suffix) {
    const SafetensorsTensor& codes = tensor(".absmax", "U8");
    require_bytes(".absmax", codes, blocks());
    const int64_t group = integer(suffix, "nested_blocksize");
    if (group < 1) refuse(suffix, "nested_blocksize is ", group);
    const Json* const offset = info_.find("nested_offset");
    if (offset == nullptr || !offset->number() ||
        std::abs(*offset->number()) > std::numeric_limits<float>::max()) {
      refuse(suffix, "its nested_offset is no number that float holds");
    }
    const SafetensorsTensor& scales = tensor(".nested_absmax", "F32");
    const int64_t groups = blocks() / group + (blocks() % group != 0);
    if (static_cast<int64_t>(scales.data.size()) / 4 != groups) {
      refuse(".nested_absmax", "has ", scales.data.size() / 4, " values, but ", blocks(),
             " blocks in groups of ", group, " take ", groups);
    }
    const auto map = map_of<256>(".nested_quant_map");
    const float* const absmax2 = as_floats(scales.data);
    float* const own_offset = own(1);
    *own_offset = static_cast<float>(*offset->number());
    if (group == kGroupSize && std::ranges::equal(map, kSignedDynamicMap.values)) {
      view().absmax = {nullptr, as_codes(codes.data), absmax2, own_offset};
      return;
    }
    float* const values = own(static_cast<size_t>(blocks()));
    for (int64_t block = 0; block < blocks(); ++block) {
      const auto code = std::to_integer<size_t>(codes.data[static_cast<size_t>(block)]);
      // Two operations, each rounded, as everywhere: this library is compiled without FMAs.
      values[block] = map[code] * absmax2[block / group] + *own_offset;
    }
    view().absmax.values = values;
  }

  const SafetensorsCheckpoint& checkpoint_;
  std::string name_;
  Json info_;  ///< bitsandbytes' quantization state
  QuantizedMatrix result_;
};

bool QuantizedMatrix::is_in(const SafetensorsCheckpoint& checkpoint, std::string_view name) {
  return checkpoint.find(std::string(name) + kOurAbsmax) != nullptr ||
         QuantizedMatrixReader::their_state(checkpoint, name) != nullptr;
}

QuantizedMatrix QuantizedMatrix::load(const SafetensorsCheckpoint& checkpoint,
                                      std::string_view name, const QuantizationConfig& config,
                                      std::optional<MatrixShape> shape) {
  return QuantizedMatrixReader(checkpoint, name).read(config, shape);
}

}  // namespace qlora_native
