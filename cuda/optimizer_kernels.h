// The optimizers' kernels: their tables, and the host side of each entry. The arguments have been
// validated; everything is queued on the stream, nothing allocates or waits.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "qlora_native/optimizer.h"

namespace qlora_native::cuda {

KernelTable<OptimizerStepArgs> optimizer_step_kernels();
KernelTable<GradientNormArgs> gradient_norm_kernels();

int64_t optimizer_step_simt_workspace_bytes(const OptimizerStepArgs& args);
void optimizer_step_simt(const OptimizerStepArgs& args, Workspace workspace, Stream stream);

int64_t gradient_norm_simt_workspace_bytes(const GradientNormArgs& args);
void gradient_norm_simt(const GradientNormArgs& args, Workspace workspace, Stream stream);

}  // namespace qlora_native::cuda
