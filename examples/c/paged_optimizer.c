/* Minimizes a sum of squares with AdamW whose 8-bit state lies in paged memory: on a GPU the state
 * comes to the device for the step, in parts, and goes back; here, on the CPU, it stays. */
#include <qlora_native/c_api_paged_optimizer.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
  SIZE = 1000,
  STATE_BLOCK = 256,
  BLOCKS = (SIZE + STATE_BLOCK - 1) / STATE_BLOCK,
  STEPS = 300
};
enum { MOMENT1, MOMENT2, ABSMAX1, ABSMAX2, ARRAYS };

static float param[SIZE], grad[SIZE], target[SIZE];

static void check(qn_status status) {
  if (status == QN_OK) return;
  fprintf(stderr, "%s: %s\n", qn_status_string(status), qn_last_error_message());
  exit(1);
}

int main(void) {
  for (int i = 0; i < SIZE; ++i) target[i] = sinf((float)i);

  const qn_paged_pool_options options = {.struct_size = sizeof(options), .device_type = QN_CPU};
  qn_paged_pool* pool = NULL;
  check(qn_paged_pool_create(&options, &pool));
  const int64_t sizes[ARRAYS] = {SIZE, SIZE, BLOCKS * sizeof(float), BLOCKS * sizeof(float)};
  void* state[ARRAYS];
  for (int a = 0; a < ARRAYS; ++a) check(qn_paged_pool_allocate(pool, sizes[a], &state[a], NULL));
  /* Fresh memory may be written to. The codes that stand for 0: */
  for (int i = 0; i < SIZE; ++i) ((uint8_t*)state[MOMENT1])[i] = 127;
  for (int i = 0; i < SIZE; ++i) ((uint8_t*)state[MOMENT2])[i] = 0;
  for (int b = 0; b < BLOCKS; ++b) {
    ((float*)state[ABSMAX1])[b] = 0.0f;
    ((float*)state[ABSMAX2])[b] = 0.0f;
  }

  float steps_taken = 0;
  const qn_optimizer_tensor tensor = {.struct_size = sizeof(tensor),
                                      .param = param,
                                      .grad = grad,
                                      .state1 = state[MOMENT1],
                                      .state2 = state[MOMENT2],
                                      .absmax1 = state[ABSMAX1],
                                      .absmax2 = state[ABSMAX2],
                                      .step = &steps_taken,
                                      .numel = SIZE,
                                      .state_format = QN_STATE_DYNAMIC_8BIT};
  const qn_optimizer_group group = {
      .struct_size = sizeof(group), .lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
  const qn_optimizer_tensor* const tensors[] = {&tensor};
  const qn_optimizer_group* const groups[] = {&group};
  const qn_optimizer_args step = {.struct_size = sizeof(step),
                                  .tensors = tensors,
                                  .groups = groups,
                                  .num_tensors = 1,
                                  .num_groups = 1,
                                  .algorithm = QN_ADAMW,
                                  .device_type = QN_CPU};
  const qn_paged_optimizer_args paged = {.struct_size = sizeof(paged),
                                         .step = &step,
                                         .pool = pool,
                                         .data = state,
                                         .size_bytes = sizes,
                                         .count = ARRAYS,
                                         .part_bytes = 1 << 20};

  int64_t bytes = 0;
  check(qn_optimizer_step_workspace_bytes(&step, &bytes));
  const size_t unit = QN_WORKSPACE_ALIGNMENT;
  void* workspace = aligned_alloc(unit, ((size_t)bytes / unit + 1) * unit);
  if (workspace == NULL) return 1;
  for (int s = 0; s <= STEPS; ++s) {
    double loss = 0;
    for (int i = 0; i < SIZE; ++i) {
      grad[i] = param[i] - target[i];
      loss += 0.5 * grad[i] * grad[i] / SIZE;
    }
    if (s % 100 == 0) printf("loss after %3d steps: %.1e\n", s, loss);
    check(qn_paged_optimizer_step(&paged, workspace, bytes, NULL));
  }
  free(workspace);
  check(qn_paged_pool_destroy(pool)); /* and the state with it */
  return 0;
}
