/* Two tensors with everything that an optimizer's step uses. */
#pragma once

#include "qlora_native/c_api_optimizer.h"

enum { SIZE = 700, BLOCKS = 3 };

/* One tensor with fp32 state and one with 8-bit state. */
typedef struct model {
  float param[2][SIZE], grad[2][SIZE], moment[SIZE], square[SIZE], step[2];
  uint8_t moment_codes[SIZE], square_codes[SIZE];
  float absmax1[BLOCKS], absmax2[BLOCKS];
  qn_optimizer_tensor tensors[2];
  qn_optimizer_group group;
  const qn_optimizer_tensor* tensor_list[2];
  const qn_optimizer_group* group_list[1];
  qn_optimizer_args args;
} model;

/* Free it with free(). */
model* make_model(void);
