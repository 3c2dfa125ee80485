#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

#include "cpu/float_environment.h"
#include "qlora_native/device.h"
#include "qlora_native/error.h"

namespace qlora_native {
namespace {

int hardware_threads() {
#if defined(__linux__)
  // The affinity mask, unlike hardware_concurrency(), counts only what a container or taskset
  // leaves.
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0 && CPU_COUNT(&mask) > 0)
    return CPU_COUNT(&mask);
#endif
  const unsigned threads = std::thread::hardware_concurrency();
  return threads > 0 ? static_cast<int>(threads) : 1;
}

std::atomic<int>& thread_setting() {
  static std::atomic<int> setting{hardware_threads()};
  return setting;
}

std::atomic<CpuExecutor>& executor_setting() {
  static std::atomic<CpuExecutor> setting{nullptr};
  return setting;
}

}  // namespace

int cpu_threads() noexcept { return thread_setting().load(std::memory_order_relaxed); }

void set_cpu_threads(int threads) {
  if (threads < 1) {
    throw InvalidArgument("set_cpu_threads: " + std::to_string(threads) +
                          " threads, expected 1 or more");
  }
  thread_setting().store(threads, std::memory_order_relaxed);
}

namespace cpu {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

/// Spins until `done()` or until about `spin_time` has passed; says whether `done()`.
template <class Predicate>
bool spin_until(Predicate done, std::chrono::microseconds spin_time) {
  const auto deadline = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

/// Set while the thread runs a call of parallel_for: nested calls run inline.
thread_local bool inside_parallel_for = false;

class InsideScope {
 public:
  InsideScope() : previous_(inside_parallel_for) { inside_parallel_for = true; }
  ~InsideScope() { inside_parallel_for = previous_; }
  InsideScope(const InsideScope&) = delete;
  InsideScope& operator=(const InsideScope&) = delete;

 private:
  bool previous_;
};

/// One call of parallel_for: indices are handed out in chunks to whoever works on it.
class Job {
 public:
  Job(int64_t range, int64_t grain, detail::RangeFn fn, void* context)
      : range_(range), grain_(grain), fn_(fn), context_(context) {}

  /// Takes chunks until there are none left. Does not throw.
  void work() {
    const InsideScope inside;
    const DefaultFloatScope float_scope;
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= range_) return;
      try {
        fn_(context_, begin, range_ - begin < grain_ ? range_ : begin + grain_);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(range_, std::memory_order_relaxed);
      }
    }
  }

  void rethrow_error() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t range_;
  const int64_t grain_;
  const detail::RangeFn fn_;
  void* const context_;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  alignas(64) std::atomic<int64_t> next_{0};
};

/// The library's own threads. One job at a time. The job is set while it is closed and no worker is
/// inside it: a worker enters by raising `inside_` and then looking at `open_`, the caller leaves
/// by clearing `open_` and then waiting for `inside_` to be 0, so one of the two always sees the
/// other. A worker that wakes up late finds the job closed and costs the caller nothing.
class Pool {
 public:
  /// False, and nothing ran, when another thread uses the pool.
  bool try_run(Job& job, int threads) {
    std::unique_lock<std::mutex> lock(caller_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    start_workers(threads - 1);

    job_ = &job;
    allowed_workers_ = threads - 1;
    open_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();

    job.work();
    open_.store(false);
    const auto all_left = [this] { return inside_.load() == 0; };
    while (!spin_until(all_left, std::chrono::microseconds(50))) std::this_thread::yield();
    return true;
  }

 private:
  void start_workers(int count) {
    while (started_ < count) {
      const int index = started_;
      try {
        std::thread([this, index] { worker_main(index); }).detach();
      } catch (const std::system_error&) {
        return;  // Out of threads: the caller and the workers there are do all of the work.
      }
      ++started_;
    }
  }

  void worker_main(int index) {
    uint32_t seen = 0;
    for (;;) {
      const auto has_news = [this, seen] { return generation_.load() != seen; };
      // Back-to-back operations find the workers awake; an idle process does not burn its cores.
      if (!spin_until(has_news, std::chrono::microseconds(30))) generation_.wait(seen);
      seen = generation_.load();
      inside_.fetch_add(1);
      if (open_.load() && index < allowed_workers_) job_->work();
      inside_.fetch_sub(1);
    }
  }

  std::mutex caller_;
  int started_ = 0;
  Job* job_ = nullptr;
  int allowed_workers_ = 0;
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

/// Never destroyed: its workers may still be asleep in it when the process ends.
std::atomic<Pool*> the_pool{nullptr};

/// A forked child has none of its parent's threads, and they may have been in the middle of
/// something: the child leaves them alone and starts threads of its own at its first call.
void forget_threads_after_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    the_pool.store(nullptr, std::memory_order_release);
    executor_setting().store(nullptr, std::memory_order_release);
  });
  static_cast<void>(registered);
}

Pool& pool() {
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (current) return *current;
  forget_threads_after_fork();
  auto* fresh = new Pool;
  if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

namespace detail {

void parallel_for(int64_t range, int64_t grain, RangeFn fn, void* context) {
  if (range <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t chunks = range / grain + (range % grain != 0);
  const auto threads = static_cast<int>(chunks < cpu_threads() ? chunks : cpu_threads());
  if (threads == 1 || inside_parallel_for) {
    const InsideScope inside;
    const DefaultFloatScope float_scope;
    fn(context, 0, range);
    return;
  }
  Job job(range, grain, fn, context);
  if (const CpuExecutor executor = executor_setting().load(std::memory_order_acquire)) {
    executor(threads, [](void* shared) { static_cast<Job*>(shared)->work(); }, &job);
  } else if (!pool().try_run(job, threads)) {
    job.work();
  }
  job.rethrow_error();
}

}  // namespace detail
}  // namespace cpu

void set_cpu_executor(CpuExecutor executor) noexcept {
  cpu::forget_threads_after_fork();
  executor_setting().store(executor, std::memory_order_release);
}

}  // namespace qlora_native
