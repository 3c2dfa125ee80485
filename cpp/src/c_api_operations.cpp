// The operations of the C ABI, what they need, and which kernel they would run.
#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_struct.h"
#include "qlora_native/kernels.h"

namespace qn = qlora_native;
using qn::Stream;
using qn::c_api::check_buffer;
using qn::c_api::check_pointer;
using qn::c_api::guarded;
using qn::c_api::to_args;
using qn::c_api::to_workspace;

namespace {

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
    const uint64_t size = qn::c_api::accepted_size(function, "plan", plan);
    const qn::MatmulPlan answer = query(to_args(function, args));
    qn_matmul_plan filled{};
    filled.workspace_bytes = answer.workspace_bytes;
    filled.prefers_dense = answer.prefers_dense ? 1 : 0;
    qn::c_api::write_struct(plan, size, filled);
  });
}

template <class Args>
qn_status write_selected(const char* name, const Args* args, char* buffer, int64_t bytes) {
  return guarded(name, [&](const char* function) {
    check_buffer(function, "name", buffer, bytes);
    qn::c_api::copy_whole(function, qn::selected_kernel(to_args(function, args)), buffer, bytes);
  });
}

}  // namespace

qn_status qn_quantize_4bit(const qn_quantize_args* args, void* workspace, int64_t workspace_bytes,
                           void* stream) {
  return guarded(__func__, [&](const char* function) {
    qn::quantize_4bit(to_args(function, args), to_workspace(function, workspace, workspace_bytes),
                      Stream::from_handle(stream));
  });
}

qn_status qn_quantize_4bit_workspace_bytes(const qn_quantize_args* args, int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::quantize_4bit_workspace_bytes, args, workspace_bytes);
}

qn_status qn_quantize_4bit_selected_kernel(const qn_quantize_args* args, char* name,
                                           int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_dequantize_4bit(const qn_dequantize_args* args, void* stream) {
  return guarded(__func__, [&](const char* function) {
    qn::dequantize_4bit(to_args(function, args), Stream::from_handle(stream));
  });
}

qn_status qn_dequantize_4bit_selected_kernel(const qn_dequantize_args* args, char* name,
                                             int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_matmul_4bit(const qn_matmul_args* args, void* workspace, int64_t workspace_bytes,
                         void* stream) {
  return guarded(__func__, [&](const char* function) {
    qn::matmul_4bit(to_args(function, args), to_workspace(function, workspace, workspace_bytes),
                    Stream::from_handle(stream));
  });
}

qn_status qn_matmul_4bit_workspace_bytes(const qn_matmul_args* args, int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::matmul_4bit_workspace_bytes, args, workspace_bytes);
}

qn_status qn_matmul_4bit_plan(const qn_matmul_args* args, qn_matmul_plan* plan) {
  return write_plan(__func__, qn::matmul_4bit_plan, args, plan);
}

qn_status qn_matmul_4bit_selected_kernel(const qn_matmul_args* args, char* name,
                                         int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_matmul_4bit_transposed(const qn_matmul_transposed_args* args, void* workspace,
                                    int64_t workspace_bytes, void* stream) {
  return guarded(__func__, [&](const char* function) {
    qn::matmul_4bit_transposed(to_args(function, args),
                               to_workspace(function, workspace, workspace_bytes),
                               Stream::from_handle(stream));
  });
}

qn_status qn_matmul_4bit_transposed_workspace_bytes(const qn_matmul_transposed_args* args,
                                                    int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::matmul_4bit_transposed_workspace_bytes, args, workspace_bytes);
}

qn_status qn_matmul_4bit_transposed_plan(const qn_matmul_transposed_args* args,
                                         qn_matmul_plan* plan) {
  return write_plan(__func__, qn::matmul_4bit_transposed_plan, args, plan);
}

qn_status qn_matmul_4bit_transposed_selected_kernel(const qn_matmul_transposed_args* args,
                                                    char* name, int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}
