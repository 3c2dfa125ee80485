/* The C ABI's optimizer steps whose state lies in paged memory. paged_optimizer.h says how a step is
 * cut into parts; c_api.h has the rules that hold here too. */
#pragma once

#include "qlora_native/c_api_memory.h"
#include "qlora_native/c_api_optimizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qn_paged_optimizer_args {
  uint64_t struct_size;
  /* state1, state2, absmax1, absmax2 and master of its tensors may lie in allocations of the pool,
   * by the addresses that the pool gave out; everything else is on the pool's device. */
  const qn_optimizer_args* step;
  qn_paged_pool* pool;
  void* const* data;         /* [count] the allocations that hold state, in any order */
  const int64_t* size_bytes; /* [count] */
  int64_t count;
  int64_t part_bytes; /* above 0: state that is on the device at once */
} qn_paged_optimizer_args;

/* As qn_optimizer_step, with the same results; replaces the plan of the pool. `workspace`: at least
 * what qn_optimizer_step_workspace_bytes says of args->step. When a part could not be brought, the
 * parts before it have been updated.
 * Errors: those of qn_optimizer_step and qn_paged_pool_acquire. */
QN_API qn_status qn_paged_optimizer_step(const qn_paged_optimizer_args* args, void* workspace,
                                         int64_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
