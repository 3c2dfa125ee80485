// Everything in one include.
#pragma once

#include "qlora_native/codebook.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/device.h"
#include "qlora_native/dtype.h"
#include "qlora_native/error.h"
#include "qlora_native/export.h"
#include "qlora_native/kernels.h"
#include "qlora_native/matmul.h"
#include "qlora_native/memory.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/paged_optimizer.h"
#include "qlora_native/quantize.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/version.h"
#include "qlora_native/views.h"
