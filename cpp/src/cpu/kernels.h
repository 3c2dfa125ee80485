// The CPU kernels and the parts they share. A kernel is a driver, which splits the work over
// threads, and an inner function for one instruction set. backend.cpp joins the two.
//
// A file for an instruction set defines no inline function that other files have too, the standard
// library's strings for one: the linker keeps one copy of each for the whole program, and that one
// could then be the copy that old processors cannot run.
#pragma once

#include <cstdint>
#include <string>

#include "optimizer_math.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native::cpu {

// ---- quantize ----

/// Writes the codes of blocks [first, last) to args.output.packed and their absmax to
/// absmax[first..last).
using EncodeBlocksFn = void (*)(const QuantizeArgs& args, int64_t first, int64_t last,
                                float* absmax);
void encode_blocks_scalar(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax);
void encode_blocks_avx2(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax);
void encode_blocks_avx512(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax);

int64_t quantize_workspace_bytes(const QuantizeArgs& args);
void run_quantize(const QuantizeArgs& args, Workspace workspace, EncodeBlocksFn encode);

/// Offset, absmax2 and codes of absmax[0..blocks), see quantize_4bit. `partials` holds one double
/// for each group.
void double_quantize(const float* absmax, int64_t blocks, const float* pinned_offset,
                     const MutableAbsmax& out, double* partials);

// ---- dequantize ----

/// Decodes blocks [first, last) to args.output.
using DecodeBlocksFn = void (*)(const DequantizeArgs& args, int64_t first, int64_t last);
void decode_blocks_scalar(const DequantizeArgs& args, int64_t first, int64_t last);
void decode_blocks_avx2(const DequantizeArgs& args, int64_t first, int64_t last);
void decode_blocks_avx512(const DequantizeArgs& args, int64_t first, int64_t last);

void run_dequantize(const DequantizeArgs& args, DecodeBlocksFn decode);

/// Decodes elements [begin, begin + count) of the weight to fp32. The reference of every other
/// decoder.
void decode_elements(const QuantizedView& weight, int64_t begin, int64_t count, float* out);

// ---- optimizer ----

/// What a step has in common for all tensors.
struct StepCall {
  OptimizerAlgorithm algorithm;
  bool stochastic_rounding;
  uint64_t seed;
};

/// Updates elements [first, last) of a tensor; `first` is where a block of its state starts, and
/// `last` too unless it is the end.
using StepElementsFn = void (*)(const StepCall& call, const OptimizerTensor& tensor,
                                const StepScalars& scalars, int64_t first, int64_t last);
void step_elements_scalar(const StepCall& call, const OptimizerTensor& tensor,
                          const StepScalars& scalars, int64_t first, int64_t last);
void step_elements_avx2(const StepCall& call, const OptimizerTensor& tensor,
                        const StepScalars& scalars, int64_t first, int64_t last);
void step_elements_avx512(const StepCall& call, const OptimizerTensor& tensor,
                          const StepScalars& scalars, int64_t first, int64_t last);

int64_t optimizer_step_workspace_bytes(const OptimizerStepArgs& args);
void run_optimizer_step(const OptimizerStepArgs& args, Workspace workspace, StepElementsFn step);

int64_t gradient_norm_workspace_bytes(const GradientNormArgs& args);
void gradient_norm_scalar(const GradientNormArgs& args, Workspace workspace);

// ---- adapters: the factor is kept in fp32 panels ----

int64_t lora_workspace_bytes(const LoraProjectArgs& args);
int64_t lora_workspace_bytes(const LoraUpdateArgs& args);
void lora_project_scalar(const LoraProjectArgs& args, Workspace workspace);
void lora_update_scalar(const LoraUpdateArgs& args, Workspace workspace);
void lora_gradient_scalar(const LoraGradientArgs& args, Workspace workspace);

// ---- matmul, reference ----

void matmul_scalar(const MatmulArgs& args, Workspace workspace);
void matmul_transposed_scalar(const MatmulTransposedArgs& args, Workspace workspace);

// ---- matmul, vector kernels: all keep an fp32 copy of X, or dY, in an order of their own ----

int64_t matmul_workspace_bytes(const MatmulArgs& args);
int64_t matmul_transposed_workspace_bytes(const MatmulTransposedArgs& args);

/// Throws InvalidArgument: the workspace was large enough for fewer threads.
[[noreturn]] void refuse_workspace(const char* kernel, int64_t size_bytes);

// ---- matmul, few rows of X: the weights are decoded in registers ----

/// Whether every row of W starts at a block: what the gemv kernels need.
bool rows_hold_whole_blocks(const QuantizedView& weight, std::string* why_not);

void gemv_avx2(const MatmulArgs& args, Workspace workspace);
void gemv_avx512(const MatmulArgs& args, Workspace workspace);

void gemv_transposed_avx2(const MatmulTransposedArgs& args, Workspace workspace);
void gemv_transposed_avx512(const MatmulTransposedArgs& args, Workspace workspace);

// ---- matmul, many rows of X: the weights are decoded to panels of fp32 ----

void gemm_avx2(const MatmulArgs& args, Workspace workspace);
void gemm_avx512(const MatmulArgs& args, Workspace workspace);

void gemm_transposed_avx2(const MatmulTransposedArgs& args, Workspace workspace);
void gemm_transposed_avx512(const MatmulTransposedArgs& args, Workspace workspace);

// ---- matmul of bfloat16 on AMX: the weights are decoded to tiles of bfloat16 ----

int64_t gemm_amx_workspace_bytes(const MatmulArgs& args);
int64_t gemm_amx_workspace_bytes(const MatmulTransposedArgs& args);
/// With no less it runs, on a single thread.
int64_t gemm_amx_least_workspace_bytes(const MatmulArgs& args);
int64_t gemm_amx_least_workspace_bytes(const MatmulTransposedArgs& args);

void gemm_amx(const MatmulArgs& args, Workspace workspace);
void gemm_transposed_amx(const MatmulTransposedArgs& args, Workspace workspace);

// ---- grouped matmul: products with one matrix, many at a time ----

/// How the rows of a group are multiplied.
template <class Args>
struct ProductKernel {
  void (*run)(const Args& args, Workspace workspace);
  int64_t (*workspace_bytes)(const Args& args) = nullptr;        ///< null: none
  int64_t (*least_workspace_bytes)(const Args& args) = nullptr;  ///< for a single thread
};

template <class Args>
using ChooseProductFn = ProductKernel<Args> (*)(const Args& args);

/// The rows of the group that has most.
int64_t largest_group(const GroupEnds& ends);

int64_t grouped_workspace_bytes(const GroupedMatmulArgs& args, ChooseProductFn<MatmulArgs> choose);
int64_t grouped_workspace_bytes(const GroupedMatmulTransposedArgs& args,
                                ChooseProductFn<MatmulTransposedArgs> choose);

/// `choose` says how each group is multiplied.
void run_grouped(const GroupedMatmulArgs& args, Workspace workspace,
                 ChooseProductFn<MatmulArgs> choose);
void run_grouped(const GroupedMatmulTransposedArgs& args, Workspace workspace,
                 ChooseProductFn<MatmulTransposedArgs> choose);

}  // namespace qlora_native::cpu
