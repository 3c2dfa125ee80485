// The operations of the C ABI, what they need, and which kernel they would run.
#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_operation.h"

namespace qn = qlora_native;
using qn::Stream;
using qn::c_api::guarded;
using qn::c_api::run;
using qn::c_api::to_args;
using qn::c_api::write_bytes;
using qn::c_api::write_plan;
using qn::c_api::write_selected;

qn_status qn_quantize_4bit(const qn_quantize_args* args, void* workspace, int64_t workspace_bytes,
                           void* stream) {
  return run(__func__, qn::quantize_4bit, args, workspace, workspace_bytes, stream);
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
  return run(__func__, qn::matmul_4bit, args, workspace, workspace_bytes, stream);
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
  return run(__func__, qn::matmul_4bit_transposed, args, workspace, workspace_bytes, stream);
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

qn_status qn_grouped_matmul_4bit(const qn_grouped_matmul_args* args, void* workspace,
                                 int64_t workspace_bytes, void* stream) {
  return run(__func__, qn::grouped_matmul_4bit, args, workspace, workspace_bytes, stream);
}

qn_status qn_grouped_matmul_4bit_workspace_bytes(const qn_grouped_matmul_args* args,
                                                 int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::grouped_matmul_4bit_workspace_bytes, args, workspace_bytes);
}

qn_status qn_grouped_matmul_4bit_plan(const qn_grouped_matmul_args* args, qn_matmul_plan* plan) {
  return write_plan(__func__, qn::grouped_matmul_4bit_plan, args, plan);
}

qn_status qn_grouped_matmul_4bit_selected_kernel(const qn_grouped_matmul_args* args, char* name,
                                                 int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_grouped_matmul_4bit_transposed(const qn_grouped_matmul_transposed_args* args,
                                            void* workspace, int64_t workspace_bytes,
                                            void* stream) {
  return run(__func__, qn::grouped_matmul_4bit_transposed, args, workspace, workspace_bytes,
             stream);
}

qn_status qn_grouped_matmul_4bit_transposed_workspace_bytes(
    const qn_grouped_matmul_transposed_args* args, int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::grouped_matmul_4bit_transposed_workspace_bytes, args,
                     workspace_bytes);
}

qn_status qn_grouped_matmul_4bit_transposed_plan(const qn_grouped_matmul_transposed_args* args,
                                                 qn_matmul_plan* plan) {
  return write_plan(__func__, qn::grouped_matmul_4bit_transposed_plan, args, plan);
}

qn_status qn_grouped_matmul_4bit_transposed_selected_kernel(
    const qn_grouped_matmul_transposed_args* args, char* name, int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}
