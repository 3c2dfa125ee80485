// The AMX tile registers, eight tiles of 16 rows of 64 bytes, and products of tiles. Plain functions
// around the instructions: the compilers' own intrinsics take literal tile numbers only, so
// templates cannot use them, and GCC 12's do not say that they read memory.
//
// Every tile is always whole; what has fewer rows or columns is padded with zeros in memory.
#pragma once

#include <cstdint>

namespace qlora_native::cpu {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;

/// The operand of ldtilecfg and sttilecfg.
struct alignas(64) TileConfig {
  uint8_t palette = 0;  ///< 0: no tiles
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig whole_tiles() {
  TileConfig config;
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = kTileRowBytes;
    config.rows[tile] = kTileRows;
  }
  return config;
}

/// The calling thread has eight whole tiles while in scope. Afterwards it has the configuration it
/// had before: torch's own kernels remember which one they set. What the tiles held is lost.
class TileScope {
 public:
  TileScope() {
    static constexpr TileConfig kWholeTiles = whole_tiles();
    __asm__ volatile("sttilecfg %0" : "=m"(previous_));
    __asm__ volatile("ldtilecfg %0" : : "m"(kWholeTiles));
  }
  ~TileScope() {
    if (previous_.palette == 0) {
      // Back to the initial state: nothing to save on a context switch.
      __asm__ volatile("tilerelease");
    } else {
      __asm__ volatile("ldtilecfg %0" : : "m"(previous_));
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig previous_;
};

template <int kTile>
void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

/// Rows lie one behind the other.
template <int kTile>
void tile_load(const void* tile) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                   :
                   : "i"(kTile), "r"(tile), "r"(kTileRowBytes)
                   : "memory");
}

template <int kTile>
void tile_store(void* tile) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                   :
                   : "i"(kTile), "r"(tile), "r"(kTileRowBytes)
                   : "memory");
}

/// C[16][16] += A[16][32] * B[32][16] in fp32, A and B of bfloat16. B holds pairs of rows: its
/// element (d, c) is at [d / 2][c][d % 2]. Rounds to nearest whatever the thread is set to, and
/// takes subnormal numbers for zero.
template <int kC, int kA, int kB>
void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

constexpr int64_t kSumsElems = kTileRows * kTileRowBytes / 4;  ///< of a tile of fp32

/// Tiles in memory: neighbours along the sum are `step` elements apart, neighbours in the other
/// direction `strip`.
struct Strips {
  const uint16_t* tiles;
  int64_t strip;
  int64_t step;

  /// The one `first` strips, or steps, further on.
  Strips from(int64_t first) const { return {tiles + first * strip, strip, step}; }
  Strips at_step(int64_t first) const { return {tiles + first * step, strip, step}; }
};

/// Tiles of sums: neighbours in a row are kSumsElems apart, rows `row`.
struct Sums {
  float* tiles;
  int64_t row;
};

// Tiles 0 to 3 are kRows x kCols sums, at most 2 x 2 or 1 x 3, 4 and 5 are of A, 6 and 7 of B; of three columns 5
// has the last.

template <int kRows, int kCols>
void clear_sums() {
  static_assert((kRows <= 2 && kCols <= 2) || (kRows == 1 && kCols == 3));
  tile_zero<0>();
  if constexpr (kCols >= 2) tile_zero<1>();
  if constexpr (kRows == 2 || kCols == 3) tile_zero<2>();
  if constexpr (kRows == 2 && kCols == 2) tile_zero<3>();
}

template <int kRows, int kCols>
void load_sums(const Sums& sums) {
  static_assert(kCols <= 2, "sums of three columns are stored once");
  tile_load<0>(sums.tiles);
  if constexpr (kCols == 2) tile_load<1>(sums.tiles + kSumsElems);
  if constexpr (kRows == 2) tile_load<2>(sums.tiles + sums.row);
  if constexpr (kRows == 2 && kCols == 2) tile_load<3>(sums.tiles + sums.row + kSumsElems);
}

template <int kRows, int kCols>
void store_sums(const Sums& sums) {
  tile_store<0>(sums.tiles);
  if constexpr (kCols >= 2) tile_store<1>(sums.tiles + kSumsElems);
  if constexpr (kCols == 3) tile_store<2>(sums.tiles + 2 * kSumsElems);
  if constexpr (kRows == 2) tile_store<2>(sums.tiles + sums.row);
  if constexpr (kRows == 2 && kCols == 2) tile_store<3>(sums.tiles + sums.row + kSumsElems);
}

/// Adds the products of one step.
template <int kRows, int kCols>
void multiply_step(const Strips& a, const Strips& b) {
  tile_load<4>(a.tiles);
  tile_load<6>(b.tiles);
  tile_multiply_bf16<0, 4, 6>();
  if constexpr (kCols >= 2) {
    tile_load<7>(b.tiles + b.strip);
    tile_multiply_bf16<1, 4, 7>();
  }
  if constexpr (kCols == 3) {
    tile_load<5>(b.tiles + 2 * b.strip);
    tile_multiply_bf16<2, 4, 5>();
  }
  if constexpr (kRows == 2) {
    tile_load<5>(a.tiles + a.strip);
    tile_multiply_bf16<2, 5, 6>();
    if constexpr (kCols == 2) tile_multiply_bf16<3, 5, 7>();
  }
}

/// kRows x kCols sums along `steps` steps.
template <int kRows, int kCols>
void multiply_tiles(const Strips& a, const Strips& b, int64_t steps, bool is_first,
                    const Sums& sums) {
  if (is_first) {
    clear_sums<kRows, kCols>();
  } else {
    load_sums<kRows, kCols>(sums);
  }
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<kRows, kCols>(a.at_step(step), b.at_step(step));
  }
  store_sums<kRows, kCols>(sums);
}

}  // namespace
}  // namespace qlora_native::cpu
