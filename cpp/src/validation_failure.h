// How the argument checks say no.
#pragma once

#include <sstream>

#include "qlora_native/error.h"

namespace qlora_native {

/// Throws InvalidArgument with the parts, printed one after the other, as its message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InvalidArgument(message.str());
}

}  // namespace qlora_native
