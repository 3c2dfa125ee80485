// Which architecture the library's code for a device was compiled for. It can be older than the
// device: the driver translates PTX of any older architecture.
#pragma once

namespace qlora_native::cuda {

/// Whether the code that runs on the current device was compiled for compute capability 9.0 or more,
/// so that what `kIsHopperOrNewer` chooses at compile time is in it. False also where the driver
/// cannot say.
bool is_compiled_for_hopper();

}  // namespace qlora_native::cuda
