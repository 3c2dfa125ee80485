// What to measure, from the command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"
#include "qlora_native/dtype.h"

namespace bench {

struct Options {
  std::vector<std::string> devices;  ///< "cpu", "cuda"; empty: all there are
  std::vector<Shape> shapes;         ///< empty: the device's own list
  std::vector<qlora_native::DType> dtypes = {qlora_native::DType::kBFloat16};
  std::vector<int64_t> rows = {1, 2, 4, 8, 16, 32, 64, 128, 512};
  std::string kernel;  ///< empty: the library's choice
  int threads = 0;     ///< of the CPU; 0: the library's choice
};

/// One line per option.
const char* options_help();

/// Takes out of `arguments` (those after the program's name) what it knows; leaves the others.
/// Throws std::invalid_argument, naming the option and the value.
Options parse_options(std::vector<std::string>& arguments);

/// "bf16", "fp16", "fp32".
const char* short_name(qlora_native::DType dtype);

}  // namespace bench
