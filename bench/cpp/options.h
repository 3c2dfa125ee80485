// What to measure, from the command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "command_line.h"
#include "models.h"
#include "qlora_native/codebook.h"
#include "qlora_native/device.h"
#include "qlora_native/dtype.h"
#include "qlora_native/memory.h"
#include "shape.h"

namespace bench {

struct Options {
  // All commands.
  std::string device;  ///< "cpu", "cuda", "cuda:1"; empty: CUDA where there is a device
  int threads = 0;     ///< of the CPU; 0: the library's choice
  double min_seconds = 0.5;
  std::string json;  ///< a file; empty: none
  // Whatever has a weight.
  bool lists_models = false;
  std::vector<const Model*> models;
  std::vector<Shape> shapes;
  std::vector<qlora_native::DType> dtypes;  ///< empty: the command's own
  std::vector<qlora_native::QuantType> quant_types = {qlora_native::QuantType::kNF4};
  std::vector<int64_t> block_sizes = {64};
  std::vector<bool> double_quants = {true};
  std::string kernel;  ///< empty: the library's choice; "all": each that supports the case
  // Products.
  std::vector<int64_t> rows = {1, 4, 16, 64, 512};
  std::vector<bool> transposed = {false};
  // Adapters.
  std::vector<int64_t> ranks = {16};
  std::vector<std::string> passes = {"forward", "backward"};
  // Optimizers.
  std::vector<std::string> optimizer_cases = {"lora", "full"};
  std::vector<std::string> optimizers = {"adamw", "adamw8bit", "lion", "lion8bit"};
  // Paged memory.
  std::vector<qlora_native::Backing> backings;  ///< empty: all that the device has
  int64_t budget_mib = 256;
};

// Values of --kernel that are no names.
inline constexpr char kAllKernels[] = "all";
inline constexpr char kListKernels[] = "list";

/// The options of each kind; they write to `options`, which outlives them.
std::vector<Option> machine_options(Options& options);
std::vector<Option> weight_options(Options& options);
std::vector<Option> kernel_options(Options& options);
std::vector<Option> product_options(Options& options);
std::vector<Option> lora_options(Options& options);
std::vector<Option> optimizer_options(Options& options);
std::vector<Option> paged_options(Options& options);

/// "bf16", "fp16", "fp32".
const char* short_name(qlora_native::DType dtype);

/// The shapes asked for, each once: those of the models, then the others.
std::vector<Shape> shapes_of(const Options& options);

}  // namespace bench
