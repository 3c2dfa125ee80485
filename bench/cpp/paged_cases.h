// The command on paged memory.
#pragma once

#include "case.h"
#include "machine.h"
#include "options.h"

namespace bench {

/// What paged memory moves per second, relative to the link between host and device, and what an
/// acquire costs the host when nothing is to move. Throws std::invalid_argument when the device has
/// none of the backings asked for.
Plan paged_plan(const Options& options, Machine& machine);

}  // namespace bench
