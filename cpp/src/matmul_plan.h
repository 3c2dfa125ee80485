// What every product answers before it runs.
#pragma once

#include "dispatch.h"
#include "qlora_native/matmul.h"
#include "validate.h"

namespace qlora_native {

inline bool is_empty(const MutableMatrixView& out) { return out.rows == 0 || out.cols == 0; }

/// The plan of a product that writes `out`.
template <class Args>
MatmulPlan make_plan(const Args& args, const MutableMatrixView& out) {
  validate(args);
  return is_empty(out) ? MatmulPlan{} : kernel_plan(args);
}

}  // namespace qlora_native
