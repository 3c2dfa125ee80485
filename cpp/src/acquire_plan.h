// The order in which ranges are going to be acquired, and how far that has come.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "qlora_native/memory.h"

namespace qlora_native {

class AcquirePlan {
 public:
  void assign(std::span<const PagedRange> ranges) {
    ranges_.assign(ranges.begin(), ranges.end());
    next_ = ahead_ = 0;
  }

  /// Takes note of acquired ranges; what was planned before the last of them is not waited for.
  void advance(std::span<const PagedRange> acquired) {
    for (const PagedRange& range : acquired) {
      const auto from = ranges_.begin() + static_cast<ptrdiff_t>(next_);
      const auto found = std::find(from, ranges_.end(), range);
      if (found != ranges_.end()) next_ = static_cast<size_t>(found - ranges_.begin()) + 1;
    }
    ahead_ = std::max(ahead_, next_);
  }

  bool is_over() const { return next_ == ranges_.size(); }

  /// The ranges that come next and have been brought, and those that come after them.
  std::span<const PagedRange> ahead() const {
    return std::span(ranges_).subspan(next_, ahead_ - next_);
  }
  std::span<const PagedRange> beyond() const { return std::span(ranges_).subspan(ahead_); }

  /// The first `count` of `beyond()` have been brought.
  void mark_brought(size_t count) { ahead_ += count; }

  /// Takes out what overlaps `gone`.
  void drop(PagedRange gone) {
    const auto* const begin = static_cast<const char*>(gone.data);
    const auto overlaps = [&](const PagedRange& range) {
      const auto* const data = static_cast<const char*>(range.data);
      return data < begin + gone.size_bytes && begin < data + range.size_bytes;
    };
    ranges_.erase(
        std::remove_if(ranges_.begin() + static_cast<ptrdiff_t>(next_), ranges_.end(), overlaps),
        ranges_.end());
    ahead_ = next_;
  }

 private:
  std::vector<PagedRange> ranges_;
  size_t next_ = 0;
  size_t ahead_ = 0;
};

}  // namespace qlora_native
