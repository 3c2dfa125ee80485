#include "problem.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

const float custom_values[16] = {-1.0f, -0.75f,  -0.6f, -0.4f, -0.3f, -0.2f, -0.125f, -0.03125f,
                                 0.0f,  0.0625f, 0.15f, 0.25f, 0.35f, 0.5f,  0.7f,    0.9f};

float number(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

uint16_t bfloat16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float float_of(uint16_t bfloat16) {
  const uint32_t bits = (uint32_t)bfloat16 << 16;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

void* filled_memory(int64_t bytes) {
  const size_t size = bytes > 0 ? (size_t)bytes : 1;
  void* data = malloc(size);
  if (data == NULL) abort();
  return memset(data, UNTOUCHED, size);
}

void* workspace_memory(int64_t bytes) {
  const size_t unit = QN_WORKSPACE_ALIGNMENT;
  void* data = aligned_alloc(unit, ((size_t)bytes + unit - 1) / unit * unit + unit);
  if (data == NULL) abort();
  return data;
}

problem make_problem(int64_t rows, int64_t cols, int64_t block_size, qn_quant_type quant_type,
                     bool double_quant) {
  problem p = {.rows = rows,
               .cols = cols,
               .block_size = block_size,
               .quant_type = quant_type,
               .double_quant = double_quant,
               .numel = rows * cols,
               .sizes = {.struct_size = sizeof(qn_weight_sizes)}};
  CHECK_OK(qn_describe_weight(rows, cols, block_size, &p.sizes));
  p.input = filled_memory(p.numel * 4);
  p.decoded = filled_memory(p.numel * 4);
  uint32_t state = 7;
  for (int64_t i = 0; i < p.numel; ++i) p.input[i] = i % 11 == 3 ? 0.0f : number(&state);
  /* A block of zeros. */
  for (int64_t i = block_size; i < 2 * block_size && i < p.numel; ++i) p.input[i] = 0.0f;
  p.weight = (qn_weight){.struct_size = sizeof(qn_weight),
                         .packed = filled_memory(p.sizes.packed_bytes),
                         .rows = rows,
                         .cols = cols,
                         .block_size = block_size,
                         .custom_values = quant_type == QN_CUSTOM ? custom_values : NULL,
                         .quant_type = quant_type,
                         .device_type = QN_CPU};
  if (double_quant) {
    p.weight.absmax_codes = filled_memory(p.sizes.num_blocks);
    p.weight.absmax2 = filled_memory(p.sizes.num_groups * 4);
    p.weight.offset = filled_memory(4);
  } else {
    p.weight.absmax = filled_memory(p.sizes.num_blocks * 4);
  }
  return p;
}

void free_problem(problem* p) {
  free(p->input);
  free(p->decoded);
  free(p->weight.packed);
  free(p->weight.absmax);
  free(p->weight.absmax_codes);
  free(p->weight.absmax2);
  free(p->weight.offset);
}

qn_quantize_args quantize_args(const problem* p) {
  return (qn_quantize_args){.struct_size = sizeof(qn_quantize_args),
                            .input = p->input,
                            .output = &p->weight,
                            .dtype = QN_FLOAT32};
}

qn_dequantize_args dequantize_args(const problem* p) {
  return (qn_dequantize_args){.struct_size = sizeof(qn_dequantize_args),
                              .weight = &p->weight,
                              .output = p->decoded,
                              .dtype = QN_FLOAT32};
}

void quantize(const problem* p) {
  const qn_quantize_args args = quantize_args(p);
  int64_t bytes = -1;
  CHECK_OK(qn_quantize_4bit_workspace_bytes(&args, &bytes));
  void* workspace = workspace_memory(bytes);
  CHECK_OK(qn_quantize_4bit(&args, workspace, bytes, NULL));
  free(workspace);
}

void dequantize(const problem* p) {
  const qn_dequantize_args args = dequantize_args(p);
  CHECK_OK(qn_dequantize_4bit(&args, NULL));
}

bool weight_is_untouched(const problem* p) {
  const qn_weight* w = &p->weight;
  const size_t blocks = (size_t)p->sizes.num_blocks;
  if (!is_filled(w->packed, UNTOUCHED, (size_t)p->sizes.packed_bytes)) return false;
  if (!p->double_quant) return is_filled(w->absmax, UNTOUCHED, blocks * 4);
  return is_filled(w->absmax_codes, UNTOUCHED, blocks) &&
         is_filled(w->absmax2, UNTOUCHED, (size_t)p->sizes.num_groups * 4) &&
         is_filled(w->offset, UNTOUCHED, 4);
}
