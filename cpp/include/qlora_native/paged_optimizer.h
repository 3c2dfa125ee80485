// Optimizer steps whose state lies in paged memory.
#pragma once

#include <cstdint>
#include <span>

#include "qlora_native/export.h"
#include "qlora_native/memory.h"
#include "qlora_native/optimizer.h"

namespace qlora_native {

/// As optimizer_step, with the same results, for tensors whose moments and masters (`state1`,
/// `state2`, `absmax1`, `absmax2`, `master`) lie in allocations of `pool`, by the addresses that the
/// pool gave out; those that do not are on the device as ever. Everything else is on args.device,
/// which is the pool's.
///
/// The step goes in parts of at most `part_bytes` of state, or one block of 256 elements: a part is
/// brought to the device while the one before is updated, and the one before that goes back. Several
/// small allocations make a part; one that is larger is cut. `allocations`: where the pool's
/// allocations that hold state are, in any order. The plan of the pool is replaced.
///
/// `workspace`: at least optimizer_step_workspace_bytes(args). Throws as optimizer_step and
/// PagedPool::acquire do; when a part could not be brought, the parts before have been updated.
QN_API void paged_optimizer_step(const OptimizerStepArgs& args, PagedPool pool,
                                 std::span<const PagedRange> allocations, int64_t part_bytes,
                                 Workspace workspace, Stream stream);

}  // namespace qlora_native
