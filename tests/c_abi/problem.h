/* A weight on the CPU with the memory for it, and what plain C loops make of it. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "qlora_native/c_api.h"

typedef struct problem {
  int64_t rows, cols, block_size;
  qn_quant_type quant_type;
  bool double_quant;
  int64_t numel;
  qn_weight_sizes sizes;
  float* input;   /* [numel] */
  float* decoded; /* [numel] */
  qn_weight weight;
} problem;

enum { UNTOUCHED = 0xA5 }; /* fills every output beforehand */

extern const float custom_values[16];

/* Input in about [-1, 1] with some zeros, outputs untouched. */
problem make_problem(int64_t rows, int64_t cols, int64_t block_size, qn_quant_type quant_type,
                     bool double_quant);
void free_problem(problem* p);

qn_quantize_args quantize_args(const problem* p);
qn_dequantize_args dequantize_args(const problem* p);
void quantize(const problem* p);
void dequantize(const problem* p);
bool weight_is_untouched(const problem* p);

/* Memory filled with UNTOUCHED, at least one byte; the workspace's is aligned as it has to be. */
void* filled_memory(int64_t bytes);
void* workspace_memory(int64_t bytes);

/* Numbers that look random, the same in every run, in [-1, 1). */
float number(uint32_t* state);
uint16_t bfloat16_of(float x); /* rounds to nearest, ties to even */
float float_of(uint16_t bfloat16);
