#include "models.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

namespace bench {
namespace {

// name, layers, hidden, intermediate, query, key_value
constexpr Model kModels[] = {
    {"llama2-7b", 32, 4096, 11008, 4096, 4096},   {"llama2-13b", 40, 5120, 13824, 5120, 5120},
    {"llama2-70b", 80, 8192, 28672, 8192, 1024},  {"llama3-8b", 32, 4096, 14336, 4096, 1024},
    {"llama3-70b", 80, 8192, 28672, 8192, 1024},  {"llama3.2-1b", 16, 2048, 8192, 2048, 512},
    {"llama3.2-3b", 28, 3072, 8192, 3072, 1024},  {"mistral-7b", 32, 4096, 14336, 4096, 1024},
    {"qwen2.5-0.5b", 24, 896, 4864, 896, 128},    {"qwen2.5-7b", 28, 3584, 18944, 3584, 512},
    {"qwen2.5-14b", 48, 5120, 13824, 5120, 1024}, {"qwen2.5-32b", 64, 5120, 27648, 5120, 1024},
    {"qwen2.5-72b", 80, 8192, 29568, 8192, 1024}, {"qwen3-8b", 36, 4096, 12288, 4096, 1024},
    {"qwen3-32b", 64, 5120, 25600, 8192, 1024},   {"gemma-7b", 28, 3072, 24576, 4096, 4096},
    {"gemma2-2b", 26, 2304, 9216, 2048, 1024},    {"gemma2-9b", 42, 3584, 14336, 4096, 2048},
    {"gemma2-27b", 46, 4608, 36864, 4096, 2048},
};

}  // namespace

std::span<const Model> all_models() { return kModels; }

const Model& model_named(const std::string& name) {
  const auto* found = std::find_if(std::begin(kModels), std::end(kModels),
                                   [&](const Model& model) { return name == model.name; });
  if (found != std::end(kModels)) return *found;
  std::string message = "'";
  message += name + "' is none of";
  for (const Model& model : kModels) message += std::string(" ") + model.name;
  throw std::invalid_argument(message);
}

std::vector<Linear> projections_of(const Model& model) {
  const Shape key_value{model.key_value, model.hidden};
  const Shape up{model.intermediate, model.hidden};
  return {{{model.query, model.hidden}, "q_proj"},
          {key_value, "k_proj"},
          {key_value, "v_proj"},
          {{model.hidden, model.query}, "o_proj"},
          {up, "gate_proj"},
          {up, "up_proj"},
          {{model.hidden, model.intermediate}, "down_proj"}};
}

std::vector<Linear> linears_of(const Model& model) {
  std::vector<Linear> linears;
  for (const Linear& projection : projections_of(model)) {
    const auto same = std::find_if(linears.begin(), linears.end(), [&](const Linear& linear) {
      return linear.shape == projection.shape;
    });
    if (same == linears.end()) {
      linears.push_back(projection);
    } else {
      same->names += ", " + projection.names;
    }
  }
  return linears;
}

std::string model_table() {
  char line[160];
  const auto format = "%-14s %6s %9s   %s\n";
  std::snprintf(line, sizeof line, format, "model", "layers", "G weights",
                "shapes (rows x columns), each once");
  std::string table = line;
  for (const Model& model : kModels) {
    std::string shapes;
    for (const Linear& linear : linears_of(model)) {
      if (!shapes.empty()) shapes += ' ';
      shapes += to_string(linear.shape);
    }
    char elements[16];
    std::snprintf(elements, sizeof elements, "%.2f",
                  static_cast<double>(model.linear_elements()) * 1e-9);
    std::snprintf(line, sizeof line, format, model.name, std::to_string(model.layers).c_str(),
                  elements, shapes.c_str());
    table += line;
  }
  return table;
}

}  // namespace bench
