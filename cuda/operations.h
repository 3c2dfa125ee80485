// The CUDA kernels' host side, one function per entry of the tables in backend.cpp. The arguments
// have been validated and describe at least one output element; everything is queued on the stream,
// nothing allocates or waits.
#pragma once

#include <cstdint>
#include <string>

#include "qlora_native/dequantize.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native::cuda {

int64_t quantize_simt_workspace_bytes(const QuantizeArgs& args);
void quantize_simt(const QuantizeArgs& args, Workspace workspace, Stream stream);

void dequantize_simt(const DequantizeArgs& args, Workspace workspace, Stream stream);

void gemv_simt(const MatmulArgs& args, Workspace workspace, Stream stream);
/// Whether the GEMV is the better choice for these arguments than the tiled kernel.
bool prefers_gemv(const MatmulArgs& args);

// The tensor-core products for small M: `supports` leaves out what every kernel asks for (natural
// alignment).
bool is_gemv_mma_usable(Device device, std::string* why_not);
bool supports_gemv_mma(const MatmulArgs& args, std::string* why_not);
void gemv_mma(const MatmulArgs& args, Workspace workspace, Stream stream);

bool is_gemm_mma_usable(Device device, std::string* why_not);
bool supports_gemm_mma(const MatmulArgs& args, std::string* why_not);
bool prefers_gemm_mma(const MatmulArgs& args);
int64_t gemm_mma_workspace_bytes(const MatmulArgs& args);
void gemm_mma(const MatmulArgs& args, Workspace workspace, Stream stream);

// The products on Hopper's tensor cores, from the same codes in both directions.
bool is_gemm_sm90a_usable(Device device, std::string* why_not);
bool supports_gemm_sm90a(const MatmulArgs& args, std::string* why_not);
bool supports_gemm_transposed_sm90a(const MatmulTransposedArgs& args, std::string* why_not);
bool prefers_gemm_sm90a(const MatmulArgs& args);
bool dense_beats_gemm_sm90a(const MatmulArgs& args);
bool dense_beats_gemm_transposed_sm90a(const MatmulTransposedArgs& args);
int64_t gemm_sm90a_workspace_bytes(const MatmulArgs& args);
int64_t gemm_transposed_sm90a_workspace_bytes(const MatmulTransposedArgs& args);
void gemm_sm90a(const MatmulArgs& args, Workspace workspace, Stream stream);
void gemm_transposed_sm90a(const MatmulTransposedArgs& args, Workspace workspace, Stream stream);

// The products on the tensor cores of sm_80 and newer, likewise.
bool supports_gemm_sm80(const MatmulArgs& args, std::string* why_not);
bool supports_gemm_transposed_sm80(const MatmulTransposedArgs& args, std::string* why_not);
bool dense_beats_gemm_sm80(const MatmulArgs& args);
bool dense_beats_gemm_transposed_sm80(const MatmulTransposedArgs& args);
int64_t gemm_sm80_workspace_bytes(const MatmulArgs& args);
int64_t gemm_transposed_sm80_workspace_bytes(const MatmulTransposedArgs& args);
void gemm_sm80(const MatmulArgs& args, Workspace workspace, Stream stream);
void gemm_transposed_sm80(const MatmulTransposedArgs& args, Workspace workspace, Stream stream);

void gemm_simt(const MatmulArgs& args, Workspace workspace, Stream stream);
void gemm_transposed_simt(const MatmulTransposedArgs& args, Workspace workspace, Stream stream);

// The products of groups, in one launch each.
bool supports_grouped_mma(const GroupedMatmulArgs& args, std::string* why_not);
bool supports_grouped_transposed_mma(const GroupedMatmulTransposedArgs& args, std::string* why_not);
void grouped_matmul_mma(const GroupedMatmulArgs& args, Workspace workspace, Stream stream);
void grouped_matmul_transposed_mma(const GroupedMatmulTransposedArgs& args, Workspace workspace,
                                   Stream stream);

void grouped_matmul_simt(const GroupedMatmulArgs& args, Workspace workspace, Stream stream);
void grouped_matmul_transposed_simt(const GroupedMatmulTransposedArgs& args, Workspace workspace,
                                    Stream stream);

int64_t optimizer_step_simt_workspace_bytes(const OptimizerStepArgs& args);
void optimizer_step_simt(const OptimizerStepArgs& args, Workspace workspace, Stream stream);

int64_t gradient_norm_simt_workspace_bytes(const GradientNormArgs& args);
void gradient_norm_simt(const GradientNormArgs& args, Workspace workspace, Stream stream);

void lora_project_simt(const LoraProjectArgs& args, Workspace workspace, Stream stream);
void lora_update_simt(const LoraUpdateArgs& args, Workspace workspace, Stream stream);
void lora_gradient_simt(const LoraGradientArgs& args, Workspace workspace, Stream stream);
int64_t lora_project_mma_workspace_bytes(const LoraProjectArgs& args);
void lora_project_mma(const LoraProjectArgs& args, Workspace workspace, Stream stream);
int64_t lora_update_mma_workspace_bytes(const LoraUpdateArgs& args);
void lora_update_mma(const LoraUpdateArgs& args, Workspace workspace, Stream stream);
void lora_gradient_mma(const LoraGradientArgs& args, Workspace workspace, Stream stream);

}  // namespace qlora_native::cuda
