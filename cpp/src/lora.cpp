// The adapters' operations: each alone, and the forward and backward pass composed of them.
#include "qlora_native/lora.h"

#include <algorithm>
#include <cstddef>

#include "dispatch.h"
#include "dropout_mask.h"
#include "validate.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

constexpr int64_t kAlignment = 256;

bool has_nothing_to_do(const LoraProjectArgs& args) { return args.t.rows == 0 || args.t.cols == 0; }
bool has_nothing_to_do(const LoraUpdateArgs& args) {
  return args.y.rows == 0 || args.y.cols == 0 || args.t.cols == 0;
}
bool has_nothing_to_do(const LoraGradientArgs& args) {
  return args.grad.rows == 0 || args.grad.cols == 0;
}
bool has_nothing_to_do(const MatmulArgs& args) { return args.y.rows == 0 || args.y.cols == 0; }
bool has_nothing_to_do(const MatmulTransposedArgs& args) {
  return args.dx.rows == 0 || args.dx.cols == 0;
}

/// Of validated arguments, as all below. Throws Unsupported when no kernel takes them.
template <class Args>
int64_t scratch_bytes(const Args& args) {
  return has_nothing_to_do(args) ? 0 : kernel_workspace_bytes(args);
}

template <class Args>
void run(const Args& args, Workspace workspace, Stream stream) {
  if (!has_nothing_to_do(args)) run_kernel(args, workspace, stream);
}

template <class Args>
MatmulPlan validated_plan(const Args& args) {
  validate(args);
  if (has_nothing_to_do(args)) return {};
  MatmulPlan plan = kernel_plan(args);
  if (dropout_mask(args.dropout, 0).drops()) plan.prefers_dense = false;
  return plan;
}

template <class Args>
void run_validated(const Args& args, Workspace workspace, Stream stream) {
  validate(args);
  run(args, workspace, stream);
}

MatrixView as_const(const MutableMatrixView& view) {
  return {view.data, view.rows, view.cols, view.row_stride, view.dtype, view.device};
}

int64_t aligned_bytes(int64_t rows, int64_t cols, DType dtype) {
  const int64_t bytes = rows * cols * size_bytes(dtype);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// The workspace behind its first `bytes`.
Workspace rest_of(Workspace workspace, int64_t bytes) {
  return {static_cast<std::byte*>(workspace.data) + bytes, workspace.size_bytes - bytes};
}

void check_workspace(const char* op, Workspace workspace, int64_t needed) {
  if (workspace.size_bytes < needed || (needed > 0 && workspace.data == nullptr)) {
    fail(op, ": the workspace has ", workspace.size_bytes, " bytes, ", needed, " are needed");
  }
}

/// What a forward pass consists of. `workspace` may be null while bytes are counted.
struct Forward {
  int64_t t_bytes;  ///< of t in the workspace
  LoraProjectArgs project;
  MatmulArgs product;
  LoraUpdateArgs update;

  Forward(const LoraForwardArgs& args, void* workspace) {
    const int64_t m = args.x.rows;
    const int64_t r = args.a.rows;
    const bool keeps_t = args.t.data != nullptr;
    t_bytes = keeps_t ? 0 : aligned_bytes(m, r, args.x.dtype);
    const MutableMatrixView t =
        keeps_t ? args.t : MutableMatrixView{workspace, m, r, r, args.x.dtype, args.x.device};
    project = {args.x, args.a, false, 1.0f, args.dropout, t};
    product = {args.x, args.weight, args.bias, args.y};
    update = {as_const(t), args.b, false, args.scaling, {}, args.y};
  }

  int64_t workspace_bytes() const {
    return t_bytes +
           std::max({scratch_bytes(project), scratch_bytes(product), scratch_bytes(update)});
  }
};

struct Backward {
  bool wants_dx, wants_da, wants_db;
  int64_t u_bytes;
  LoraProjectArgs project;
  MatmulTransposedArgs product;
  LoraUpdateArgs update;
  LoraGradientArgs a_gradient;
  LoraGradientArgs b_gradient;

  Backward(const LoraBackwardArgs& args, void* workspace)
      : wants_dx(args.dx.data != nullptr),
        wants_da(args.da.data != nullptr),
        wants_db(args.db.data != nullptr) {
    const int64_t m = args.dy.rows;
    const int64_t r = args.b.cols;
    u_bytes = wants_dx || wants_da ? aligned_bytes(m, r, args.dy.dtype) : 0;
    const MutableMatrixView u{workspace, m, r, r, args.dy.dtype, args.dy.device};
    project = {args.dy, args.b, true, args.scaling, {}, u};
    product = {args.dy, args.weight, args.dx};
    update = {as_const(u), args.a, true, 1.0f, args.dropout, args.dx};
    a_gradient = {as_const(u), args.x, 1.0f, args.dropout, false, args.da};
    b_gradient = {args.t, args.dy, args.scaling, {}, true, args.db};
  }

  int64_t workspace_bytes() const {
    int64_t scratch = 0;
    if (wants_dx || wants_da) scratch = scratch_bytes(project);
    if (wants_dx) scratch = std::max({scratch, scratch_bytes(product), scratch_bytes(update)});
    if (wants_da) scratch = std::max(scratch, scratch_bytes(a_gradient));
    if (wants_db) scratch = std::max(scratch, scratch_bytes(b_gradient));
    return u_bytes + scratch;
  }
};

}  // namespace

MatmulPlan lora_project_plan(const LoraProjectArgs& args) { return validated_plan(args); }
int64_t lora_project_workspace_bytes(const LoraProjectArgs& args) {
  return validated_plan(args).workspace_bytes;
}
void lora_project(const LoraProjectArgs& args, Workspace workspace, Stream stream) {
  run_validated(args, workspace, stream);
}

MatmulPlan lora_update_plan(const LoraUpdateArgs& args) { return validated_plan(args); }
int64_t lora_update_workspace_bytes(const LoraUpdateArgs& args) {
  return validated_plan(args).workspace_bytes;
}
void lora_update(const LoraUpdateArgs& args, Workspace workspace, Stream stream) {
  run_validated(args, workspace, stream);
}

MatmulPlan lora_gradient_plan(const LoraGradientArgs& args) { return validated_plan(args); }
int64_t lora_gradient_workspace_bytes(const LoraGradientArgs& args) {
  return validated_plan(args).workspace_bytes;
}
void lora_gradient(const LoraGradientArgs& args, Workspace workspace, Stream stream) {
  run_validated(args, workspace, stream);
}

int64_t lora_forward_workspace_bytes(const LoraForwardArgs& args) {
  validate(args);
  return Forward(args, nullptr).workspace_bytes();
}

void lora_forward(const LoraForwardArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  const Forward pass(args, workspace.data);
  // Selects every kernel: whatever none takes is refused before the first of them writes.
  check_workspace("lora_forward", workspace, pass.workspace_bytes());
  const Workspace scratch = rest_of(workspace, pass.t_bytes);
  run(pass.project, scratch, stream);
  run(pass.product, scratch, stream);
  run(pass.update, scratch, stream);
}

int64_t lora_backward_workspace_bytes(const LoraBackwardArgs& args) {
  validate(args);
  return Backward(args, nullptr).workspace_bytes();
}

void lora_backward(const LoraBackwardArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  const Backward pass(args, workspace.data);
  check_workspace("lora_backward", workspace, pass.workspace_bytes());
  const Workspace scratch = rest_of(workspace, pass.u_bytes);
  if (pass.wants_dx || pass.wants_da) run(pass.project, scratch, stream);
  if (pass.wants_dx) {
    run(pass.product, scratch, stream);
    run(pass.update, scratch, stream);
  }
  if (pass.wants_da) run(pass.a_gradient, scratch, stream);
  if (pass.wants_db) run(pass.b_gradient, scratch, stream);
}

}  // namespace qlora_native
