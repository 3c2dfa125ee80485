#include "qlora_native/c_api_paged_optimizer.h"

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_memory_arguments.h"
#include "c_api_optimizer_arguments.h"
#include "c_api_struct.h"
#include "qlora_native/paged_optimizer.h"

namespace qn = qlora_native;

qn_status qn_paged_optimizer_step(const qn_paged_optimizer_args* args, void* workspace,
                                  int64_t workspace_bytes, void* stream) {
  return qn::c_api::guarded(__func__, [&](const char* function) {
    const qn_paged_optimizer_args given = qn::c_api::read_struct(function, "args", args);
    const qn::c_api::OptimizerCall step = qn::c_api::to_call(function, given.step);
    qn::paged_optimizer_step(
        step.args, qn::c_api::pool_of(function, given.pool),
        qn::c_api::ranges_of(function, given.data, given.size_bytes, given.count), given.part_bytes,
        qn::c_api::to_workspace(function, workspace, workspace_bytes),
        qn::Stream::from_handle(stream));
  });
}
