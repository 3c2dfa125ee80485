// The thread pool behind every operation on the CPU. Its size is cpu_threads() (device.h).
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace qlora_native::cpu {

namespace detail {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t range, int64_t grain, RangeFn fn, void* context);

}  // namespace detail

/// Calls fn(begin, end) so that the calls cover [0, range) exactly once; each call but the last has
/// a multiple of `grain` indices, and starts at one. Returns when all are done. The first exception
/// that a call throws is rethrown here, and calls that have not started by then are dropped.
///
/// Which thread runs which call is not defined, so a result must not depend on it. Runs inline, in
/// one call, when the range is no longer than `grain`, with one thread, when called from inside
/// `fn`, and while another thread uses the pool.
template <class Fn>
void parallel_for(int64_t range, int64_t grain, Fn&& fn) {
  using Callable = std::remove_reference_t<Fn>;
  detail::parallel_for(
      range, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Callable*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
}

}  // namespace qlora_native::cpu
