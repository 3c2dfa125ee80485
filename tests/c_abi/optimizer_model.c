#include "optimizer_model.h"

#include <stdlib.h>
#include <string.h>

#include "problem.h"

model* make_model(void) {
  model* m = calloc(1, sizeof(*m));
  if (m == NULL) abort();
  uint32_t state = 1;
  for (int t = 0; t < 2; ++t) {
    for (int i = 0; i < SIZE; ++i) {
      m->param[t][i] = number(&state);
      m->grad[t][i] = number(&state);
    }
  }
  memset(m->moment_codes, 127, sizeof(m->moment_codes));
  m->tensors[0] = (qn_optimizer_tensor){.struct_size = sizeof(qn_optimizer_tensor),
                                        .param = m->param[0],
                                        .grad = m->grad[0],
                                        .state1 = m->moment,
                                        .state2 = m->square,
                                        .step = &m->step[0],
                                        .numel = SIZE};
  m->tensors[1] = (qn_optimizer_tensor){.struct_size = sizeof(qn_optimizer_tensor),
                                        .param = m->param[1],
                                        .grad = m->grad[1],
                                        .state1 = m->moment_codes,
                                        .state2 = m->square_codes,
                                        .absmax1 = m->absmax1,
                                        .absmax2 = m->absmax2,
                                        .step = &m->step[1],
                                        .numel = SIZE,
                                        .state_format = QN_STATE_DYNAMIC_8BIT};
  m->group = (qn_optimizer_group){.struct_size = sizeof(qn_optimizer_group),
                                  .lr = 0.01,
                                  .beta1 = 0.9,
                                  .beta2 = 0.999,
                                  .eps = 1e-8,
                                  .weight_decay = 0.1};
  for (int t = 0; t < 2; ++t) m->tensor_list[t] = &m->tensors[t];
  m->group_list[0] = &m->group;
  m->args = (qn_optimizer_args){.struct_size = sizeof(qn_optimizer_args),
                                .tensors = m->tensor_list,
                                .groups = m->group_list,
                                .num_tensors = 2,
                                .num_groups = 1};
  return m;
}
