// The commands on 4-bit weights.
#pragma once

#include "case.h"
#include "machine.h"
#include "options.h"

namespace bench {

/// `copy_rate`: what bytes per second are compared with. `machine` outlives the plan. All throw
/// std::invalid_argument when the operation has no kernel of the name asked for.
Plan quantize_plan(const Options& options, Machine& machine, double copy_rate);
Plan dequantize_plan(const Options& options, Machine& machine, double copy_rate);
Plan matmul_plan(const Options& options, Machine& machine, double copy_rate);
Plan lora_plan(const Options& options, Machine& machine, double copy_rate);

}  // namespace bench
