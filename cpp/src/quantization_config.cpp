#include <algorithm>
#include <array>

#include "in_quotes.h"
#include "qlora_native/quantized_matrix.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

constexpr std::array kTypes = {QuantType::kNF4, QuantType::kFP4, QuantType::kINT4};

/// Settings of an object, with `defaults` where it says nothing; `where` begins messages.
QuantizationSettings read_settings(const Json& value, QuantizationSettings defaults,
                                   const std::string& where) {
  if (value.object() == nullptr) fail(where, ": is ", value.kind(), ", expected an object");
  QuantizationSettings result = defaults;
  if (const Json* const type = value.find("quant_type")) {
    const std::string* const text = type->string();
    if (text == nullptr) fail(where, ": quant_type is ", type->kind(), ", not a string");
    const auto known = std::ranges::find_if(kTypes, [&](QuantType t) { return *text == name(t); });
    if (known == kTypes.end()) {
      fail(where, ": quant_type is ", in_quotes(*text), ", none of nf4, fp4 and int4");
    }
    result.quant_type = *known;
  }
  if (const Json* const size = value.find("block_size")) {
    if (!size->integer()) fail(where, ": block_size is ", size->kind(), ", not an integer");
    result.block_size = *size->integer();
    if (!is_valid_block_size(result.block_size)) {
      fail(where, ": block_size ", result.block_size, " is not a power of two from ", kMinBlockSize,
           " to ", kMaxBlockSize);
    }
  }
  if (const Json* const nested = value.find("double_quant")) {
    if (!nested->boolean()) fail(where, ": double_quant is ", nested->kind(), ", not a boolean");
    result.double_quant = *nested->boolean();
  }
  return result;
}

}  // namespace

QuantizationConfig QuantizationConfig::read(const std::filesystem::path& config_json) {
  return from_json(Json::read(config_json), config_json.string());
}

QuantizationConfig QuantizationConfig::from_json(const Json& config, std::string_view name) {
  const std::string where = std::string(name) + ": quantization_config";
  QuantizationConfig result;
  const Json* const value = config.find("quantization_config");
  if (value == nullptr || value->is_null()) return result;
  const Json* const method = value->find("quant_method");
  const std::string* const text = method == nullptr ? nullptr : method->string();
  if (text == nullptr) fail(where, ": has no quant_method");
  if (*text == "bitsandbytes") return result;
  if (*text != "qlora_native") {
    fail(where, ": quant_method is ", in_quotes(*text), ", neither qlora_native nor bitsandbytes");
  }
  result.settings_ = read_settings(*value, {}, where);
  const Json* const overrides = value->find("overrides");
  if (overrides == nullptr) return result;
  if (overrides->object() == nullptr) fail(where, ": overrides is ", overrides->kind());
  for (const Json::Member& module : *overrides->object()) {
    const std::string place = where + ": overrides of " + in_quotes(module.key);
    result.overrides_.emplace(module.key, read_settings(module.value, result.settings_, place));
  }
  return result;
}

const QuantizationSettings& QuantizationConfig::settings_of(
    std::string_view module) const noexcept {
  const auto found = overrides_.find(module);
  return found == overrides_.end() ? settings_ : found->second;
}

}  // namespace qlora_native
