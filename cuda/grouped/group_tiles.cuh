// From the number of a tile to its group, its rows and its columns, by what the device knows alone:
// where each group ends.
#pragma once

#include <cstdint>

#include "device/warp_reduce.cuh"

namespace qlora_native::cuda {

/// Where the groups' ends lie: a kernel parameter.
struct GroupEndsOnDevice {
  const void* data;
  bool is_64bit;
  int64_t groups;
  int64_t rows;  ///< of all groups, and of none
};

/// A part of the output. `group` is the number of groups for rows of none.
struct GroupTile {
  int64_t group;
  int64_t row0;
  int64_t end_row;  ///< of the group; the tile may end before
  int64_t column_tile;
};

/// Numbers the tiles: those of a group before those of the next, those of a column of a group before
/// those of the next column, so that neighbouring thread blocks read the same weights. A warp looks
/// at 32 groups at a time; all lanes of it call everything, with the same arguments.
///
/// An end that is out of order or of range counts as the nearest that is not.
class GroupTiles {
 public:
  __device__ __forceinline__ GroupTiles(const GroupEndsOnDevice& ends, int tile_rows,
                                        int64_t column_tiles)
      : ends_(ends),
        tile_rows_(tile_rows),
        column_tiles_(column_tiles),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    look_at_chunk(0);
  }

  /// Writes tile `number`, which is not below that of the previous call, to `tile`; false when there
  /// are not so many.
  __device__ __forceinline__ bool find(int64_t number, GroupTile* tile) {
    while (number >= tiles_before_ + tiles_in_chunk_) {
      if (chunk_ + kWarpSize > ends_.groups) return false;
      tiles_before_ += tiles_in_chunk_;
      const int64_t start = __shfl_sync(kAllLanes, end_, kWarpSize - 1);
      chunk_ += kWarpSize;
      look_at_chunk(start);
    }
    const int64_t in_chunk = number - tiles_before_;
    const unsigned owner =
        __ballot_sync(kAllLanes, in_chunk >= first_tile_ && in_chunk < first_tile_ + tiles_);
    const int lane = __ffs(static_cast<int>(owner)) - 1;
    const int64_t start = __shfl_sync(kAllLanes, start_, lane);
    const int64_t end = __shfl_sync(kAllLanes, end_, lane);
    const int64_t in_group = in_chunk - __shfl_sync(kAllLanes, first_tile_, lane);
    const int64_t row_tiles = row_tiles_of(start, end);
    tile->group = chunk_ + lane;
    tile->row0 = start + in_group % row_tiles * tile_rows_;
    tile->end_row = end;
    tile->column_tile = in_group / row_tiles;
    return true;
  }

 private:
  __device__ __forceinline__ int64_t row_tiles_of(int64_t start, int64_t end) const {
    return (end - start + tile_rows_ - 1) / tile_rows_;
  }

  __device__ __forceinline__ int64_t load_end(int64_t group) const {
    // What comes after the last group ends where the rows do.
    if (group >= ends_.groups) return ends_.rows;
    if (ends_.is_64bit) return static_cast<const int64_t*>(ends_.data)[group];
    return static_cast<const int32_t*>(ends_.data)[group];
  }

  /// Groups chunk_ .. chunk_ + 31, of which the first starts at row `start`.
  __device__ __forceinline__ void look_at_chunk(int64_t start) {
    end_ = load_end(chunk_ + lane_);
    if (end_ > ends_.rows) end_ = ends_.rows;
    if (end_ < start) end_ = start;
#pragma unroll
    for (int stride = 1; stride < kWarpSize; stride *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, end_, stride);
      if (lane_ >= stride && before > end_) end_ = before;
    }
    start_ = __shfl_up_sync(kAllLanes, end_, 1);
    if (lane_ == 0) start_ = start;
    tiles_ = row_tiles_of(start_, end_) * column_tiles_;
    int64_t sum = tiles_;
#pragma unroll
    for (int stride = 1; stride < kWarpSize; stride *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, sum, stride);
      if (lane_ >= stride) sum += before;
    }
    first_tile_ = sum - tiles_;
    tiles_in_chunk_ = __shfl_sync(kAllLanes, sum, kWarpSize - 1);
  }

  const GroupEndsOnDevice& ends_;
  int tile_rows_;
  int64_t column_tiles_;
  int lane_;
  int64_t chunk_ = 0;         ///< its first group
  int64_t tiles_before_ = 0;  ///< of groups before it
  int64_t tiles_in_chunk_ = 0;
  // Of the lane's group; first_tile_ counts from the chunk's first.
  int64_t start_ = 0;
  int64_t end_ = 0;
  int64_t first_tile_ = 0;
  int64_t tiles_ = 0;
};

}  // namespace qlora_native::cuda
