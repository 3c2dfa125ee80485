// A set of bytes, kept as disjoint intervals of addresses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

#include "qlora_native/memory.h"

namespace qlora_native {

class ByteSet {
 public:
  void add(PagedRange range) {
    char* begin = begin_of(range);
    char* end = end_of(range);
    if (begin == end) return;
    auto piece = first_touching(begin);
    while (piece != pieces_.end() && piece->first <= end) {
      begin = std::min(begin, piece->first);
      end = std::max(end, piece->second);
      total_ -= piece->second - piece->first;
      piece = pieces_.erase(piece);
    }
    pieces_.emplace_hint(piece, begin, end);
    total_ += end - begin;
  }

  /// Returns how many bytes were in the set.
  int64_t remove(PagedRange range) {
    char* const begin = begin_of(range);
    char* const end = end_of(range);
    const int64_t before = total_;
    auto piece = first_touching(begin);
    while (piece != pieces_.end() && piece->first < end) {
      char* const piece_begin = piece->first;
      char* const piece_end = piece->second;
      total_ -= piece_end - piece_begin;
      piece = pieces_.erase(piece);
      if (piece_begin < begin) keep(piece_begin, std::min(begin, piece_end));
      if (piece_end > end) keep(std::max(end, piece_begin), piece_end);
    }
    return before - total_;
  }

  /// Calls `function(PagedRange)` for each part of `range` that is not in the set, in order.
  template <class Function>
  void for_each_gap(PagedRange range, const Function& function) const {
    char* position = begin_of(range);
    char* const end = end_of(range);
    for (auto piece = first_touching(position); position < end; ++piece) {
      if (piece == pieces_.end() || piece->first >= end) {
        function(PagedRange{position, end - position});
        return;
      }
      if (piece->first > position) function(PagedRange{position, piece->first - position});
      position = std::max(position, piece->second);
    }
  }

  int64_t size_bytes() const { return total_; }

 private:
  static char* begin_of(PagedRange range) { return static_cast<char*>(range.data); }
  static char* end_of(PagedRange range) { return begin_of(range) + range.size_bytes; }

  /// The first interval that ends at `address` or behind it.
  std::map<char*, char*>::const_iterator first_touching(char* address) const {
    const auto next = pieces_.upper_bound(address);
    if (next == pieces_.begin()) return next;
    const auto previous = std::prev(next);
    return previous->second >= address ? previous : next;
  }
  std::map<char*, char*>::iterator first_touching(char* address) {
    const auto next = pieces_.upper_bound(address);
    if (next == pieces_.begin()) return next;
    const auto previous = std::prev(next);
    return previous->second >= address ? previous : next;
  }
  void keep(char* begin, char* end) {
    pieces_.emplace(begin, end);
    total_ += end - begin;
  }

  std::map<char*, char*> pieces_;  ///< begin -> end; neither overlap nor touch
  int64_t total_ = 0;
};

}  // namespace qlora_native
