// 4-bit matrices of a checkpoint, as `matmul_4bit` and its like take them. No Python is needed for
// what from_pretrained and save_pretrained wrote:
//
//     const SafetensorsCheckpoint files("./llama-nf4");
//     const auto config = QuantizationConfig::read("./llama-nf4/config.json");
//     const auto w = QuantizedMatrix::load(files, "model.layers.0.mlp.up_proj.weight", config);
//     matmul_4bit({.x = x, .weight = w.view(), .y = y}, workspace, Stream::none());
//
// Two layouts are known. Ours, where the tensors beside NAME are NAME_absmax and NAME_absmax2, and
// config.json says the rest; and that of bitsandbytes (NAME.absmax, NAME.quant_map,
// NAME.quant_state.bitsandbytes__nf4, ...), which says everything itself.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qlora_native/export.h"
#include "qlora_native/json.h"
#include "qlora_native/quantized.h"
#include "qlora_native/safetensors.h"

namespace qlora_native {

/// How a matrix was quantized.
struct QuantizationSettings {
  QuantType quant_type = QuantType::kNF4;  ///< not kCustom, which checkpoints do not hold
  int64_t block_size = 64;
  bool double_quant = true;
};

/// What a config.json says in its "quantization_config": settings, and those of single modules that
/// differ. A configuration without one, or with that of bitsandbytes, gives the default settings,
/// which its checkpoints do not need.
class QN_API QuantizationConfig {
 public:
  /// The same settings for every module.
  QuantizationConfig() = default;
  explicit QuantizationConfig(const QuantizationSettings& settings) : settings_(settings) {}

  /// Of a file. Throws InvalidArgument when it cannot be read, is not JSON, or `from_json` throws.
  static QuantizationConfig read(const std::filesystem::path& config_json);
  /// Of the content of a config.json; `name` stands for its path in messages. Throws
  /// InvalidArgument for another quantization method and for values that do not exist.
  static QuantizationConfig from_json(const Json& config, std::string_view name);

  /// Of a module such as "model.layers.0.mlp.up_proj".
  const QuantizationSettings& settings_of(std::string_view module) const noexcept;

 private:
  QuantizationSettings settings_;
  std::map<std::string, QuantizationSettings, std::less<>> overrides_;
};

struct MatrixShape {
  int64_t rows = 0;
  int64_t cols = 0;
};

/// A 4-bit matrix on the CPU whose codes stay where the checkpoint has them. The checkpoint's files
/// must outlive it; copies share what they own. To use it on a GPU, copy the arrays of `view()`:
/// quantized.h says how long they are.
class QN_API QuantizedMatrix {
 public:
  /// Whether the tensor of this name is there in 4 bits, in either layout.
  static bool is_in(const SafetensorsCheckpoint& checkpoint, std::string_view name);

  /// The matrix of this name, a weight [rows, cols]. In bitsandbytes' layout, where its absmax codes
  /// are not of our map, they are decoded to fp32 once; it decodes to the same bits either way.
  /// `shape`, if given, is compared with the file's; in our layout it is needed where `cols` is odd,
  /// for then the file does not have it.
  /// Throws InvalidArgument with the file, the tensor and the values when tensors are missing, have
  /// other dtypes or sizes than the settings and each other ask for, or another shape.
  static QuantizedMatrix load(const SafetensorsCheckpoint& checkpoint, std::string_view name,
                              const QuantizationConfig& config,
                              std::optional<MatrixShape> shape = std::nullopt);

  const QuantizedView& view() const noexcept { return view_; }

 private:
  friend class QuantizedMatrixReader;

  QuantizedView view_;
  std::vector<std::shared_ptr<const float[]>> copies_;  ///< what could not be used in the file
};

}  // namespace qlora_native
