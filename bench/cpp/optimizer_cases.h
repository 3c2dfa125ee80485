// The command on optimizers.
#pragma once

#include "case.h"
#include "machine.h"
#include "options.h"

namespace bench {

/// Steps of optimizers over lists of tensors. As the plans of weight_cases.h.
Plan optimizer_plan(const Options& options, Machine& machine, double copy_rate);

}  // namespace bench
