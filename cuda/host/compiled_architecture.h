// Which architecture the library's code for a device was compiled for. It can be older than the
// device: the driver translates PTX of any older architecture.
#pragma once

namespace qlora_native::cuda {

/// Whether the code that runs on CUDA device `device` was compiled for compute capability 9.0 or more,
/// so that what `kIsHopperOrNewer` chooses at compile time is in it. False also where the driver
/// cannot say. It is asked once per device.
bool is_compiled_for_hopper(int device);

}  // namespace qlora_native::cuda
