// The version of the library: the one place it is written. CMake and pyproject.toml read it here.
#pragma once

#include "qlora_native/export.h"

namespace qlora_native {

inline constexpr const char* kVersion = "0.1.0";

/// How the loaded library was built, for diagnostics. All strings are static.
struct BuildInfo {
  const char* version;
  const char* compiler;
  const char* cuda_toolkit;        ///< e.g. "13.0", or "" for a build without CUDA
  const char* cuda_architectures;  ///< e.g. "80;86;89;90", or "" for a build without CUDA
};

/// Never throws.
QN_API BuildInfo build_info() noexcept;

}  // namespace qlora_native
