// The functions of the C ABI's optimizers.
#include "qlora_native/c_api_optimizer.h"

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_optimizer_arguments.h"
#include "c_api_struct.h"
#include "qlora_native/kernels.h"
#include "qlora_native/optimizer.h"

namespace qn = qlora_native;
using qn::Stream;
using qn::c_api::check_buffer;
using qn::c_api::check_pointer;
using qn::c_api::guarded;
using qn::c_api::to_workspace;

qn_status qn_optimizer_step(const qn_optimizer_args* args, void* workspace, int64_t workspace_bytes,
                            void* stream) {
  return guarded(__func__, [&](const char* function) {
    const qn::c_api::OptimizerCall call = qn::c_api::to_call(function, args);
    qn::optimizer_step(call.args, to_workspace(function, workspace, workspace_bytes),
                       Stream::from_handle(stream));
  });
}

qn_status qn_optimizer_step_workspace_bytes(const qn_optimizer_args* args,
                                            int64_t* workspace_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "workspace_bytes", workspace_bytes, alignof(int64_t));
    *workspace_bytes = qn::optimizer_step_workspace_bytes(qn::c_api::to_call(function, args).args);
  });
}

qn_status qn_optimizer_step_selected_kernel(const qn_optimizer_args* args, char* name,
                                            int64_t name_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_buffer(function, "name", name, name_bytes);
    const qn::c_api::OptimizerCall call = qn::c_api::to_call(function, args);
    qn::c_api::copy_whole(function, qn::selected_kernel(call.args), name, name_bytes);
  });
}

qn_status qn_gradient_norm(const qn_gradient_norm_args* args, void* workspace,
                           int64_t workspace_bytes, void* stream) {
  return guarded(__func__, [&](const char* function) {
    const qn::c_api::GradientNormCall call = qn::c_api::to_call(function, args);
    qn::gradient_norm(call.args, to_workspace(function, workspace, workspace_bytes),
                      Stream::from_handle(stream));
  });
}

qn_status qn_gradient_norm_workspace_bytes(const qn_gradient_norm_args* args,
                                           int64_t* workspace_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "workspace_bytes", workspace_bytes, alignof(int64_t));
    *workspace_bytes = qn::gradient_norm_workspace_bytes(qn::c_api::to_call(function, args).args);
  });
}

qn_status qn_gradient_norm_selected_kernel(const qn_gradient_norm_args* args, char* name,
                                           int64_t name_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_buffer(function, "name", name, name_bytes);
    const qn::c_api::GradientNormCall call = qn::c_api::to_call(function, args);
    qn::c_api::copy_whole(function, qn::selected_kernel(call.args), name, name_bytes);
  });
}
