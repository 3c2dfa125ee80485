// Products of bfloat16 on AMX: out[M, C] = A[M, D] * B[D, C], where A is X or dY, and B is W^T or W.
//
//   A is packed once, into the workspace, as tiles [ceil(M / 16)][D / 32]. A task owns a panel of
//   columns of out. Depth by depth it decodes that panel of B to tiles, [columns / 16][depth / 32],
//   and multiplies it with all tiles of A, two by two, adding to sums in fp32 that stay, like the
//   panel, in the task's part of the workspace, and in the cache.
//
//   A task is one of cpu_threads() calls, which draw panels until there are none left: each has a
//   part of the workspace of its own. An element's sum does not depend on who computes it.
#include <atomic>

#include "cpu/amx.h"
#include "cpu/kernels.h"
#include "cpu/panels_bf16.h"
#include "cpu/parallel.h"
#include "qlora_native/device.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kMaxPassRows = 512;  ///< rows of A whose sums a task keeps

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// Rows of X up to which sums stay in registers along all of K. With a tile more X, read for every 16 rows of W, costs
/// more than decoded panels of W that are written and read.
constexpr int64_t kMaxStreamingRows = 3 * kGroup;
/// A decoded panel takes at most 256 KiB: its share of a level 2 cache of 1 MiB.
constexpr int64_t kMaxPanelColumns = 256;
constexpr int64_t kPanelDepth = 512;
/// Short sums of many columns while there are few rows: longer runs of a row of W are read.
constexpr int64_t kFewRows = 64;
constexpr int64_t kFewRowsDepth = 256;

/// How a product is cut.
struct Plan {
  bool is_streaming;      ///< see multiply_streaming
  int64_t m_groups;       ///< of sixteen rows of A, all of them
  int64_t pass_groups;    ///< most of them whose sums a task keeps
  int64_t steps;          ///< tiles along D, a multiple of kPieceSteps
  int64_t depth;          ///< of a panel, a multiple of kPieceDepth
  int64_t panel_columns;  ///< a multiple of kChunk or, for W^T, of two groups
  int64_t panels;
  int64_t scales;  ///< floats
  int64_t parts;   ///< concurrent tasks

  int64_t a_elems() const { return m_groups * steps * kTileElems; }
  int64_t panel_elems() const { return panel_columns * depth; }
  int64_t sums_elems() const { return panel_columns * pass_groups * kGroup; }
  int64_t part_bytes() const { return panel_elems() * 2 + (sums_elems() + scales) * 4; }
  int64_t workspace_bytes() const { return a_elems() * 2 + parts * part_bytes(); }
  int64_t least_workspace_bytes() const { return a_elems() * 2 + part_bytes(); }
};

/// Four panels for each thread even out what the threads get done, if that leaves at least `least`
/// columns.
int64_t panel_columns(int64_t columns, int64_t least, int64_t most) {
  return std::clamp(round_up(columns / (4 * cpu_threads()), least), least, most);
}

/// What both directions have in common; `plan` has a panel's columns.
Plan with_sizes(Plan plan, int64_t m, int64_t columns, int64_t depth) {
  plan.m_groups = (m + kGroup - 1) / kGroup;
  plan.pass_groups =
      std::min(plan.m_groups, (plan.is_streaming ? kMaxStreamingRows : kMaxPassRows) / kGroup);
  plan.steps = round_up(std::max<int64_t>(depth, 1), kPieceDepth) / kStepDepth;
  if (!plan.is_streaming) plan.depth = std::min(plan.depth, plan.steps * kStepDepth);
  plan.panels = (columns + plan.panel_columns - 1) / plan.panel_columns;
  plan.parts = std::min<int64_t>(cpu_threads(), plan.panels);
  return plan;
}

Plan plan_of(const MatmulArgs& args) {
  constexpr int64_t kLeast = 2 * kGroup;
  Plan plan{};
  plan.is_streaming = args.x.rows <= kMaxStreamingRows;
  plan.depth = plan.is_streaming ? 2 * kPieceDepth : kPanelDepth;
  plan.panel_columns =
      plan.is_streaming ? kLeast : panel_columns(args.weight.rows, kLeast, kMaxPanelColumns);
  plan.scales = plan.panel_columns * kSegmentScales;
  return with_sizes(plan, args.x.rows, args.weight.rows, args.weight.cols);
}

Plan plan_of(const MatmulTransposedArgs& args) {
  const bool has_few_rows = args.dy.rows <= kFewRows;
  Plan plan{};
  plan.depth = has_few_rows ? kFewRowsDepth : kPanelDepth;
  plan.panel_columns = panel_columns(args.weight.cols, 2 * kChunk,
                                     has_few_rows ? kMaxPairColumns : kMaxPanelColumns);
  return with_sizes(plan, args.dy.rows, args.weight.cols, args.weight.rows);
}

/// What a task has of the workspace.
struct Part {
  uint16_t* panel;
  float* sums;
  float* scales;
};

/// `rows` x `cols` tiles of sums along `steps` steps, two by two.
void multiply_block(const Strips& a, int64_t rows, const Strips& b, int64_t cols, int64_t steps,
                    bool is_first, Sums sums) {
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t j = 0; j < cols; j += 2) {
      const Sums c{sums.tiles + i * sums.row + j * kSumsElems, sums.row};
      const auto run = [&](auto multiply) { multiply(a.from(i), b.from(j), steps, is_first, c); };
      if (i + 1 < rows) {
        j + 1 < cols ? run(multiply_tiles<2, 2>) : run(multiply_tiles<2, 1>);
      } else {
        j + 1 < cols ? run(multiply_tiles<1, 2>) : run(multiply_tiles<1, 1>);
      }
    }
  }
}

/// Runs fn(part, panel) for every panel.
template <class Fn>
void for_each_panel(const Plan& plan, char* parts, Fn&& fn) {
  // A thread draws neighbours: the rows that it fetches ahead are its own, not the other core's.
  const int64_t run = std::max<int64_t>(1, plan.panels / (8 * plan.parts));
  std::atomic<int64_t> next{0};
  parallel_for(plan.parts, 1, [&](int64_t first, int64_t) {
    const TileScope tiles;
    char* const memory = parts + first * plan.part_bytes();
    Part part;
    part.panel = static_cast<uint16_t*>(static_cast<void*>(memory));
    part.sums = static_cast<float*>(static_cast<void*>(memory + plan.panel_elems() * 2));
    part.scales = part.sums + plan.sums_elems();
    for (;;) {
      const int64_t begin = next.fetch_add(run, std::memory_order_relaxed);
      if (begin >= plan.panels) return;
      for (int64_t panel = begin; panel < std::min(begin + run, plan.panels); ++panel) {
        fn(part, panel);
      }
    }
  });
}

/// Runs fn(first row of a group of A, first column of a piece, its tiles) for all of A.
template <class Fn>
void for_each_piece_of_a(const Plan& plan, uint16_t* a, Fn&& fn) {
  constexpr int64_t kPiecesPerTask = 32;
  const int64_t pieces = plan.steps / kPieceSteps;
  parallel_for(plan.m_groups * pieces, kPiecesPerTask, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      fn(i / pieces * kGroup, i % pieces * kPieceDepth, a + i * kPieceSteps * kTileElems);
    }
  });
}

// ---- Y = X W^T: tiles of W times tiles of X^T are tiles of Y^T ----

/// Sums [n][m] of sixteen rows of Y, from m0 on, and sixteen columns, from n0 on.
void store_transposed_tile(const MatmulArgs& args, int64_t m0, int64_t n0, const float* sums) {
  float rows[kGroup][kGroup];
  Avx512::transpose(sums, kGroup, rows[0], kGroup);
  const int64_t columns = std::min(kGroup, args.y.cols - n0);
  const auto mask = static_cast<__mmask16>((1u << columns) - 1);
  __m512 bias = _mm512_setzero_ps();
  if (args.bias.data) {
    const void* p = element_address(args.bias.data, n0, DType::kBFloat16);
    bias = Avx512::widen_bfloat16(_mm256_maskz_loadu_epi16(mask, p));
  }
  for (int64_t m = 0; m < std::min(kGroup, args.y.rows - m0); ++m) {
    void* out = element_address(args.y.data, (m0 + m) * args.y.row_stride + n0, DType::kBFloat16);
    const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(rows[m]), bias);
    _mm256_mask_storeu_epi16(out, mask, Avx512::round_to_bfloat16(sum));
  }
}

/// Few rows of X: kRowGroups groups of rows of W, from n0 on, times all kCols groups of X. The sums stay in
/// registers along all of K. A piece of W is decoded while the one before is multiplied, in portions so small that the
/// processor executes both at a time.
template <int kRowGroups, int kCols>
void multiply_streaming(const MatmulArgs& args, const Plan& plan, const Strips& x, const Part& part,
                        int64_t n0) {
  constexpr int64_t kRows = kRowGroups * kGroup;
  constexpr int64_t kStrip = kPieceSteps * kTileElems;
  constexpr int64_t kPortion = kRows / kPieceSteps;  // rows that are decoded in a step
  const int64_t depth = plan.steps * kStepDepth;
  uint16_t* current = part.panel;
  uint16_t* next = part.panel + kRowGroups * kStrip;
  const auto decode = [&](int64_t portion, int64_t d0, uint16_t* tiles) {
    const int64_t r = portion * kPortion;
    decode_rows(args.weight, n0 + r, kPortion, d0, kPieceDepth, part.scales + r * kSegmentScales,
                tiles + r / kGroup * kStrip + r % kGroup * kStepDepth);
  };
  decode_row_scales(args.weight, n0, kRows, 0, part.scales);
  for (int64_t portion = 0; portion < kPieceSteps; ++portion) decode(portion, 0, current);
  clear_sums<kRowGroups, kCols>();
  for (int64_t d0 = 0; d0 < depth; d0 += kPieceDepth) {
    const int64_t next_d0 = d0 + kPieceDepth;
    if (next_d0 % kSegment == 0 && next_d0 < depth) {
      decode_row_scales(args.weight, n0, kRows, next_d0, part.scales);
    }
    for (int64_t step = 0; step < kPieceSteps; ++step) {
      multiply_step<kRowGroups, kCols>({current + step * kTileElems, kStrip, kTileElems},
                                       x.at_step(d0 / kStepDepth + step));
      if (next_d0 < depth) decode(step, next_d0, next);
    }
    std::swap(current, next);
  }
  store_sums<kRowGroups, kCols>({part.sums, kCols * kSumsElems});
  for (int64_t i = 0; i < kRowGroups * kCols; ++i) {
    const int64_t n = n0 + i / kCols * kGroup;
    if (n < args.weight.rows) {
      store_transposed_tile(args, i % kCols * kGroup, n, part.sums + i * kSumsElems);
    }
  }
}

/// W is decoded once, for all rows of X.
void stream_panel(const MatmulArgs& args, const Plan& plan, const uint16_t* x, const Part& part,
                  int64_t panel) {
  const int64_t n0 = panel * plan.panel_columns;
  const Strips strips{x, plan.steps * kTileElems, kTileElems};
  if (plan.m_groups == 1) {
    multiply_streaming<2, 1>(args, plan, strips, part, n0);
  } else if (plan.m_groups == 2) {
    multiply_streaming<2, 2>(args, plan, strips, part, n0);
  } else {
    multiply_streaming<1, 3>(args, plan, strips, part, n0);
    multiply_streaming<1, 3>(args, plan, strips, part, n0 + kGroup);
  }
}

void multiply_panel(const MatmulArgs& args, const Plan& plan, const uint16_t* x, const Part& part,
                    int64_t panel) {
  if (plan.is_streaming) return stream_panel(args, plan, x, part, panel);
  const int64_t n0 = panel * plan.panel_columns;
  const int64_t n_groups =
      (std::min(plan.panel_columns, args.weight.rows - n0) + kGroup - 1) / kGroup;
  const int64_t x_strip = plan.steps * kTileElems;
  for (int64_t g0 = 0; g0 < plan.m_groups; g0 += plan.pass_groups) {
    const int64_t groups = std::min(plan.pass_groups, plan.m_groups - g0);
    const int64_t c_strip = groups * kSumsElems;
    for (int64_t d0 = 0; d0 < plan.steps * kStepDepth; d0 += plan.depth) {
      const int64_t depth = std::min(plan.depth, plan.steps * kStepDepth - d0);
      const int64_t steps = depth / kStepDepth;
      const int64_t strip = steps * kTileElems;
      if (d0 % kSegment == 0) {
        decode_row_scales(args.weight, n0, n_groups * kGroup, d0, part.scales);
      }
      for (int64_t n = 0; n < n_groups; ++n) {
        decode_rows(args.weight, n0 + n * kGroup, kGroup, d0, depth,
                    part.scales + n * kGroup * kSegmentScales, part.panel + n * strip);
      }
      const Strips w{part.panel, strip, kTileElems};
      const Strips xd{x + g0 * x_strip + d0 * kGroup, x_strip, kTileElems};
      // A pair of strips of X meets all of W before the next: both stay in the caches.
      for (int64_t g = 0; g < groups; g += 2) {
        multiply_block(w, n_groups, xd.from(g), std::min<int64_t>(2, groups - g), steps, d0 == 0,
                       {part.sums + g * kSumsElems, c_strip});
      }
    }
    for (int64_t n = 0; n < n_groups; ++n) {
      for (int64_t g = 0; g < groups; ++g) {
        store_transposed_tile(args, (g0 + g) * kGroup, n0 + n * kGroup,
                              part.sums + n * c_strip + g * kSumsElems);
      }
    }
  }
}

// ---- dX = dY W: tiles of dY times tiles of W; four tiles of sums make a chunk of columns ----

/// Four sums [m][c] for sixteen rows of dX, from m0 on, and a chunk of columns, from k0 on.
void store_chunk(const MatmulTransposedArgs& args, int64_t m0, int64_t k0, const float* sums) {
  const int64_t columns = std::min(kChunk, args.dx.cols - k0);
  const uint64_t mask = columns == kChunk ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t m = 0; m < std::min(kGroup, args.dx.rows - m0); ++m) {
    const auto column = [&](int e) {
      const __m512 sum = _mm512_loadu_ps(sums + e * kSumsElems + m * kGroup);
      return _mm512_cvtepu16_epi32(Avx512::round_to_bfloat16(sum));
    };
    const __m512i even = _mm512_or_si512(column(0), _mm512_slli_epi32(column(1), 16));
    const __m512i odd = _mm512_or_si512(column(2), _mm512_slli_epi32(column(3), 16));
    char* out = static_cast<char*>(
        element_address(args.dx.data, (m0 + m) * args.dx.row_stride + k0, DType::kBFloat16));
    _mm512_mask_storeu_epi16(out, static_cast<__mmask32>(mask),
                             _mm512_permutex2var_epi32(even, low, odd));
    _mm512_mask_storeu_epi16(out + 64, static_cast<__mmask32>(mask >> 32),
                             _mm512_permutex2var_epi32(even, high, odd));
  }
}

void multiply_panel(const MatmulTransposedArgs& args, const Plan& plan, const uint16_t* dy,
                    const Part& part, int64_t panel) {
  const int64_t k0 = panel * plan.panel_columns;
  const int64_t columns = std::min(plan.panel_columns, round_up(args.weight.cols - k0, kChunk));
  const int64_t k_groups = columns / kGroup;
  const int64_t dy_strip = plan.steps * kTileElems;
  const int64_t c_strip = k_groups * kSumsElems;
  for (int64_t g0 = 0; g0 < plan.m_groups; g0 += plan.pass_groups) {
    const int64_t groups = std::min(plan.pass_groups, plan.m_groups - g0);
    for (int64_t d0 = 0; d0 < plan.steps * kStepDepth; d0 += plan.depth) {
      const int64_t depth = std::min(plan.depth, plan.steps * kStepDepth - d0);
      decode_row_pairs(args.weight, d0, depth, k0, columns, part.panel);
      const Strips dyd{dy + g0 * dy_strip + d0 * kGroup, dy_strip, kTileElems};
      const Strips w{part.panel, kTileElems, k_groups * kTileElems};
      multiply_block(dyd, groups, w, k_groups, depth / kStepDepth, d0 == 0, {part.sums, c_strip});
    }
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < columns; c += kChunk) {
        store_chunk(args, (g0 + g) * kGroup, k0 + c,
                    part.sums + g * c_strip + c / kGroup * kSumsElems);
      }
    }
  }
}

/// Multiplies all panels. Another thread may have changed the number of threads since the workspace
/// was made: the tasks are as many as it has room for. Throws when that is none.
template <class Args>
void multiply(const Args& args, Workspace workspace, const uint16_t* a, Plan plan) {
  char* const parts = static_cast<char*>(workspace.data) + plan.a_elems() * 2;
  const int64_t room = (workspace.size_bytes - plan.a_elems() * 2) / plan.part_bytes();
  if (room < 1) refuse_workspace("gemm_amx", workspace.size_bytes);
  plan.parts = std::min(plan.parts, room);
  for_each_panel(plan, parts, [&](const Part& part, int64_t panel) {
    multiply_panel(args, plan, a, part, panel);
  });
}

}  // namespace

int64_t gemm_amx_workspace_bytes(const MatmulArgs& args) { return plan_of(args).workspace_bytes(); }
int64_t gemm_amx_workspace_bytes(const MatmulTransposedArgs& args) {
  return plan_of(args).workspace_bytes();
}

int64_t gemm_amx_least_workspace_bytes(const MatmulArgs& args) {
  return plan_of(args).least_workspace_bytes();
}
int64_t gemm_amx_least_workspace_bytes(const MatmulTransposedArgs& args) {
  return plan_of(args).least_workspace_bytes();
}

void gemm_amx(const MatmulArgs& args, Workspace workspace) {
  const Plan plan = plan_of(args);
  auto* x = static_cast<uint16_t*>(workspace.data);
  for_each_piece_of_a(plan, x, [&](int64_t m0, int64_t d0, uint16_t* tiles) {
    pack_columns(args.x, m0, d0, tiles);
  });
  multiply(args, workspace, x, plan);
}

void gemm_transposed_amx(const MatmulTransposedArgs& args, Workspace workspace) {
  const Plan plan = plan_of(args);
  auto* dy = static_cast<uint16_t*>(workspace.data);
  for_each_piece_of_a(plan, dy, [&](int64_t m0, int64_t d0, uint16_t* tiles) {
    for (int64_t step = 0; step < kPieceSteps; ++step) {
      pack_rows(args.dy, m0, d0 + step * kStepDepth, tiles + step * kTileElems);
    }
  });
  multiply(args, workspace, dy, plan);
}

}  // namespace qlora_native::cpu
