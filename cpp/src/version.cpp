#include "qlora_native/version.h"

namespace qlora_native {

// CMake passes the QN_BUILD_* strings to this file alone.
BuildInfo build_info() noexcept {
  return {kVersion, QN_BUILD_COMPILER, QN_BUILD_CUDA_TOOLKIT, QN_BUILD_CUDA_ARCHITECTURES};
}

}  // namespace qlora_native
