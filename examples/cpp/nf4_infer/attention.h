// Causal attention over a cache of keys and values.
#pragma once

#include <cstdint>

#include "config.h"
#include "tensor.h"

namespace llama {

/// Keys and values of one layer, a row per position, for positions that are there already.
struct KvCache {
  Matrix keys, values;  ///< [capacity, kv_heads * head_dim]
};

/// Each row of `queries` [m, heads * head_dim], of the positions `first`, first + 1, ..., attends to
/// the positions up to its own, which `cache` holds. Several heads share one of keys and values
/// (grouped-query attention). The result has the shape of `queries`.
Matrix attention(const Config& config, const Matrix& queries, const KvCache& cache, int64_t first);

}  // namespace llama
