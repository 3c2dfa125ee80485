// The float environment that every computation of the backend runs in.
#pragma once

#include <cfenv>

namespace qlora_native::cpu {

/// IEEE rounding to nearest, and subnormals, while in scope, whatever the thread was set to (as
/// torch.set_flush_denormal does): the bytes must not depend on the thread that computes them.
class DefaultFloatScope {
 public:
  DefaultFloatScope() {
    std::fegetenv(&previous_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatScope() { std::fesetenv(&previous_); }
  DefaultFloatScope(const DefaultFloatScope&) = delete;
  DefaultFloatScope& operator=(const DefaultFloatScope&) = delete;

 private:
  std::fenv_t previous_;
};

}  // namespace qlora_native::cpu
