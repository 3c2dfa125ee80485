// What the functions of one operation of the C ABI do: run it, and answer for its workspace, plan and
// kernel. `to_args(function, args)` makes C's struct the operation's arguments; it is found beside the
// struct's conversion.
#pragma once

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_struct.h"
#include "qlora_native/kernels.h"
#include "qlora_native/stream.h"

namespace qlora_native::c_api {

template <class Operation, class Args>
qn_status run(const char* name, Operation operation, const Args* args, void* workspace,
              int64_t workspace_bytes, void* stream) {
  return guarded(name, [&](const char* function) {
    operation(to_args(function, args), to_workspace(function, workspace, workspace_bytes),
              Stream::from_handle(stream));
  });
}

template <class Query, class Args>
qn_status write_bytes(const char* name, Query query, const Args* args, int64_t* bytes) {
  return guarded(name, [&](const char* function) {
    check_pointer(function, "workspace_bytes", bytes, alignof(int64_t));
    *bytes = query(to_args(function, args));
  });
}

template <class Query, class Args>
qn_status write_plan(const char* name, Query query, const Args* args, qn_matmul_plan* plan) {
  return guarded(name, [&](const char* function) {
    const uint64_t size = accepted_size(function, "plan", plan);
    const MatmulPlan answer = query(to_args(function, args));
    qn_matmul_plan filled{};
    filled.workspace_bytes = answer.workspace_bytes;
    filled.prefers_dense = answer.prefers_dense ? 1 : 0;
    write_struct(plan, size, filled);
  });
}

template <class Args>
qn_status write_selected(const char* name, const Args* args, char* buffer, int64_t bytes) {
  return guarded(name, [&](const char* function) {
    check_buffer(function, "name", buffer, bytes);
    copy_whole(function, qlora_native::selected_kernel(to_args(function, args)), buffer, bytes);
  });
}

}  // namespace qlora_native::c_api
