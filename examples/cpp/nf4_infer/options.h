// The command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llama {

struct Options {
  std::string model;  ///< a folder with config.json and safetensors files
  std::vector<int64_t> tokens;
  int64_t max_new_tokens = 32;
  int threads = 0;  ///< 0: as many as the library takes by itself
  bool ignores_eos = false;
  bool times = false;
  bool wants_help = false;
};

extern const char* const kUsage;

/// Throws std::runtime_error that says which argument is wrong.
Options parse_options(int argc, char** argv);

}  // namespace llama
