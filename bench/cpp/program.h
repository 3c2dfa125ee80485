// The program qn_bench, apart from its main function.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

namespace bench {

/// Runs qn_bench with the arguments that follow its name; tables go to `out`, complaints to `err`.
/// Returns the exit status: 0; 1 when a result was wrong or nothing could be measured; 2 when the
/// arguments are wrong.
int run_program(std::vector<std::string> arguments, std::ostream& out, std::ostream& err);

}  // namespace bench
