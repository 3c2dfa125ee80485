// What the architecture that device code is being compiled for can do.
#pragma once

namespace qlora_native::cuda {

/// Bulk copies, clusters and dependent launches. Depends on T so that `if constexpr` leaves out code
/// that older architectures do not compile.
template <class T>
inline constexpr bool kIsHopperOrNewer =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    true;
#else
    false;
#endif

}  // namespace qlora_native::cuda
