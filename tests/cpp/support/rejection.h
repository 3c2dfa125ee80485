// That a call is refused, and says why.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace qlora_native::testing {

/// `call` throws InvalidArgument with a message that contains every one of `words`.
void expect_rejected(const std::function<void()>& call, const std::vector<std::string>& words);

}  // namespace qlora_native::testing
