#include "options.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <stdexcept>
#include <string_view>

namespace bench {
namespace {

using qlora_native::DType;

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

int64_t positive(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    throw std::invalid_argument("'" + std::string(text) + "' is not a positive number");
  }
  return value;
}

Shape shape(const std::string& text) {
  const size_t by = text.find('x');
  if (by == std::string::npos) {
    throw std::invalid_argument("'" + text + "' is not a shape like 4096x14336");
  }
  return {positive(text.substr(0, by)), positive(text.substr(by + 1))};
}

DType dtype(const std::string& text) {
  for (const DType known : kDTypes) {
    if (text == short_name(known)) return known;
  }
  throw std::invalid_argument("'" + text + "' is none of bf16, fp16, fp32");
}

std::string device(const std::string& text) {
  if (text == "cpu" || text == "cuda") return text;
  throw std::invalid_argument("'" + text + "' is none of cpu, cuda");
}

template <class Parse>
auto list_of(const std::string& text, Parse parse) {
  std::vector<decltype(parse(text))> values;
  for (const std::string& part : split(text)) values.push_back(parse(part));
  return values;
}

}  // namespace

const char* short_name(DType dtype) {
  return dtype == DType::kBFloat16 ? "bf16" : dtype == DType::kFloat16 ? "fp16" : "fp32";
}

const char* options_help() {
  return "  --devices=cpu,cuda          default: all there are\n"
         "  --shapes=4096x4096,...      rows x columns of the weight\n"
         "  --dtypes=bf16,fp16,fp32     of everything but the weight; default: bf16\n"
         "  --m=1,4,16                  rows of activations (bench_matmul)\n"
         "  --kernel=NAME               this kernel only, where it supports the case\n"
         "  --threads=N                 of the CPU\n"
         "and Google Benchmark's, of which --benchmark_filter=REGEX, --benchmark_min_time=...\n"
         "and --benchmark_out=FILE.json are useful most.\n";
}

Options parse_options(std::vector<std::string>& arguments) {
  Options options;
  const std::map<std::string, std::function<void(const std::string&)>> known = {
      {"--devices", [&](const std::string& text) { options.devices = list_of(text, device); }},
      {"--shapes", [&](const std::string& text) { options.shapes = list_of(text, shape); }},
      {"--dtypes", [&](const std::string& text) { options.dtypes = list_of(text, dtype); }},
      {"--m", [&](const std::string& text) { options.rows = list_of(text, positive); }},
      {"--kernel", [&](const std::string& text) { options.kernel = text; }},
      {"--threads",
       [&](const std::string& text) { options.threads = static_cast<int>(positive(text)); }},
  };
  std::vector<std::string> others;
  for (const std::string& argument : arguments) {
    const size_t equals = argument.find('=');
    const auto found = known.find(argument.substr(0, equals));
    if (found == known.end()) {
      others.push_back(argument);
      continue;
    }
    if (equals == std::string::npos) {
      throw std::invalid_argument(argument + " needs a value: " + argument + "=...");
    }
    try {
      found->second(argument.substr(equals + 1));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(found->first + ": " + error.what());
    }
  }
  arguments = others;
  return options;
}

}  // namespace bench
