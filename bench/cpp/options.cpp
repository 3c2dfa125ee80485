#include "options.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kMostThreads = 4096;
constexpr int64_t kMostMiB = 1 << 20;

Shape shape(const std::string& text) {
  const size_t by = text.find('x');
  if (by == std::string::npos) {
    throw std::invalid_argument("'" + text + "' is no shape like 4096x14336");
  }
  return {positive(text.substr(0, by)), positive(text.substr(by + 1))};
}

qn::DType dtype(const std::string& text) {
  constexpr qn::DType kAll[] = {qn::DType::kBFloat16, qn::DType::kFloat16, qn::DType::kFloat32};
  for (const qn::DType known : kAll) {
    if (text == short_name(known)) return known;
  }
  throw std::invalid_argument("'" + text + "' is none of bf16, fp16, fp32");
}

qn::QuantType quant_type(const std::string& text) {
  for (const qn::QuantType known :
       {qn::QuantType::kNF4, qn::QuantType::kFP4, qn::QuantType::kINT4}) {
    if (text == qn::name(known)) return known;
  }
  throw std::invalid_argument("'" + text + "' is none of nf4, fp4, int4");
}

int64_t block_size(const std::string& text) {
  const int64_t size = positive(text);
  if (qn::is_valid_block_size(size)) return size;
  throw std::invalid_argument("'" + text + "' is no power of two from " +
                              std::to_string(qn::kMinBlockSize) + " to " +
                              std::to_string(qn::kMaxBlockSize));
}

bool yes(const std::string& text) {
  constexpr const char* kNames[] = {"yes", "no"};
  return one_of(text, kNames) == "yes";
}

bool is_transposed(const std::string& text) {
  constexpr const char* kNames[] = {"forward", "transposed"};
  return one_of(text, kNames) == "transposed";
}

qn::Backing backing(const std::string& text) {
  for (const qn::Backing known :
       {qn::Backing::kManaged, qn::Backing::kPinned, qn::Backing::kHost}) {
    if (text == qn::name(known)) return known;
  }
  throw std::invalid_argument("'" + text + "' is none of managed, pinned, host");
}

std::string device(const std::string& text) {
  if (text == "cpu" || text == "cuda") return text;
  const bool has_index = text.starts_with("cuda:") && text.size() > 5 && text.size() < 9 &&
                         text.find_first_not_of("0123456789", 5) == std::string::npos;
  if (has_index) return text;
  throw std::invalid_argument("'" + text + "' is none of cpu, cuda, cuda:N");
}

double seconds(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value > 0 && value <= 3600)) {
    throw std::invalid_argument("'" + text + "' is no number of seconds up to 3600");
  }
  return value;
}

std::string file(const std::string& text) {
  if (text.empty()) throw std::invalid_argument("'' is no name of a file");
  return text;
}

std::string kernel(const std::string& text) {
  if (text.empty()) throw std::invalid_argument("'' is no name of a kernel");
  return text;
}

Option rows_option(Options& options) {
  return {"--m", "ROWS", "rows of activations; default: 1,4,16,64,512",
          [&](const std::string& text) {
            options.rows = list_of(text, [](const std::string& part) { return positive(part); });
          }};
}

Option kernel_option(Options& options) {
  return {"--kernel", "NAME",
          "this kernel, where it supports the case; 'all': each that\n"
          "does; 'list' shows which there are; default: the library's\n"
          "choice",
          [&](const std::string& text) { options.kernel = kernel(text); }};
}

}  // namespace

const char* short_name(qn::DType dtype) {
  return dtype == qn::DType::kBFloat16 ? "bf16" : dtype == qn::DType::kFloat16 ? "fp16" : "fp32";
}

std::vector<Option> machine_options(Options& options) {
  return {
      {"--device", "DEVICE", "cpu, cuda or cuda:N; default: cuda where there is one",
       [&](const std::string& text) { options.device = device(text); }},
      {"--threads", "N", "threads of the CPU; default: one per core",
       [&](const std::string& text) {
         options.threads = static_cast<int>(positive(text, kMostThreads));
       }},
      {"--min-time", "SECONDS", "of measuring for each line of the table; default: 0.5",
       [&](const std::string& text) { options.min_seconds = seconds(text); }},
      {"--json", "FILE", "also write the figures there; bench/plot.py draws them",
       [&](const std::string& text) { options.json = file(text); }},
  };
}

std::vector<Option> weight_options(Options& options) {
  return {
      {"--model", "NAMES",
       "the shapes of a model's linear layers, such as llama3-8b;\n"
       "'list' shows which models there are",
       [&](const std::string& text) {
         if (text == "list") {
           options.lists_models = true;
         } else {
           options.models =
               list_of(text, [](const std::string& name) { return &model_named(name); });
         }
       }},
      {"--shapes", "NxK,...",
       "weights of N outputs by K inputs;\n"
       "default: 4096x4096,14336x4096",
       [&](const std::string& text) { options.shapes = list_of(text, shape); }},
      {"--dtype", "NAMES", "of what is not quantized: bf16 (default), fp16, fp32",
       [&](const std::string& text) { options.dtypes = list_of(text, dtype); }},
      {"--quant-type", "NAMES", "nf4 (default), fp4, int4",
       [&](const std::string& text) { options.quant_types = list_of(text, quant_type); }},
      {"--block-size", "SIZES", "elements that share a scale: 32, 64 (default), ... 4096",
       [&](const std::string& text) { options.block_sizes = list_of(text, block_size); }},
      {"--double-quant", "yes|no", "scales in 8 bits (default), or in fp32; 'yes,no': both",
       [&](const std::string& text) { options.double_quants = list_of(text, yes); }},
  };
}

std::vector<Option> kernel_options(Options& options) { return {kernel_option(options)}; }

std::vector<Option> lora_options(Options& options) {
  return {
      rows_option(options),
      {"--rank", "RANKS", "of the adapter; default: 16",
       [&](const std::string& text) {
         options.ranks = list_of(text, [](const std::string& part) { return positive(part); });
       }},
      {"--pass", "NAMES", "forward, backward; default: both",
       [&](const std::string& text) {
         constexpr const char* kNames[] = {"forward", "backward"};
         options.passes =
             list_of(text, [&](const std::string& part) { return one_of(part, kNames); });
       }},
  };
}

std::vector<Option> product_options(Options& options) {
  return {
      rows_option(options),
      {"--direction", "NAMES",
       "forward: Y[M, N] = X[M, K] W^T (default);\n"
       "transposed: dX[M, K] = dY[M, N] W",
       [&](const std::string& text) { options.transposed = list_of(text, is_transposed); }},
  };
}

std::vector<Option> optimizer_options(Options& options) {
  return {
      {"--case", "NAMES",
       "lora: adapters of rank 16 on all linear layers of 8 layers\n"
       "of llama3-8b, 112 tensors, 10.5 M parameters;\n"
       "full: 16 tensors, 16.8 M; large: 300 tensors, 500 M, 8 GB;\n"
       "tiny: 2 tensors, 9217; default: lora,full",
       [&](const std::string& text) {
         constexpr const char* kNames[] = {"lora", "full", "large", "tiny"};
         options.optimizer_cases =
             list_of(text, [&](const std::string& part) { return one_of(part, kNames); });
       }},
      {"--optimizer", "NAMES", "adamw, adamw8bit, lion, lion8bit; default: all of them",
       [&](const std::string& text) {
         constexpr const char* kNames[] = {"adamw", "adamw8bit", "lion", "lion8bit"};
         options.optimizers =
             list_of(text, [&](const std::string& part) { return one_of(part, kNames); });
       }},
      {"--dtype", "NAMES", "of parameters and gradients: fp32 (default), bf16, fp16",
       [&](const std::string& text) { options.dtypes = list_of(text, dtype); }},
      kernel_option(options),
  };
}

std::vector<Option> paged_options(Options& options) {
  return {
      {"--backing", "NAMES", "managed, pinned; of the CPU: host; default: all there are",
       [&](const std::string& text) { options.backings = list_of(text, backing); }},
      {"--budget", "MIB",
       "device memory of the staging cache, over four times of\n"
       "which the passes go; default: 256",
       [&](const std::string& text) { options.budget_mib = positive(text, kMostMiB); }},
  };
}

std::vector<Shape> shapes_of(const Options& options) {
  std::vector<Shape> shapes;
  const auto add = [&](Shape shape) {
    if (std::find(shapes.begin(), shapes.end(), shape) == shapes.end()) shapes.push_back(shape);
  };
  for (const Model* model : options.models) {
    for (const Linear& linear : linears_of(*model)) add(linear.shape);
  }
  for (const Shape shape : options.shapes) add(shape);
  if (shapes.empty()) shapes = {{4096, 4096}, {14336, 4096}};
  return shapes;
}

}  // namespace bench
