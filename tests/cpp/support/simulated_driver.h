// A device that exists only in order: operations wait in streams, and run one at a time, from any
// stream whose next one may run. What lacks an event shows as wrong bytes sooner or later.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "paged_driver.h"

namespace qlora_native::testing {

class SimulatedDriver final : public PagedDriver {
 public:
  explicit SimulatedDriver(Backing backing, uint64_t seed = 1) : backing_(backing), random_(seed) {}
  ~SimulatedDriver() override;

  /// Work of the caller's; runs in the order of its stream.
  void queue(Stream stream, std::function<void()> work);
  /// Runs up to `count` operations; stops when none may run.
  void run(int count);
  /// Runs everything; throws std::logic_error when something waits forever.
  void drain();

  /// The call number `calls` from now (1: the next one) throws, unless it is 0.
  void fail_after(int calls) { calls_to_failure_ = calls; }
  void set_memory_limit(int64_t size_bytes) { limit_bytes_ = size_bytes; }
  void set_capturing(Stream stream, bool is_capturing);

  int64_t region_bytes() const { return region_bytes_; }
  int regions() const { return static_cast<int>(regions_.size()); }
  int64_t staging_bytes() const { return staging_bytes_; }
  int calls() const { return calls_; }
  const std::vector<PagedRange>& moves_to_device() const { return moves_to_device_; }
  const std::vector<PagedRange>& moves_to_host() const { return moves_to_host_; }

  Backing backing() const override { return backing_; }
  void* allocate_region(int64_t size_bytes) override;
  void free_region(void* data, int64_t size_bytes) noexcept override;
  void* allocate_staging(int64_t size_bytes) override;
  void free_staging(void* data) noexcept override;
  Stream to_device_stream() override { return Stream::from_handle(&to_device_); }
  Stream to_host_stream() override { return Stream::from_handle(&to_host_); }
  bool is_capturing(Stream stream) override;
  PagedEvent record(Stream stream) override;
  void wait(Stream stream, const PagedEvent& event) override;
  bool is_done(const PagedEvent& event) override;
  void wait_on_host(const PagedEvent& event) override;
  void move_to_device(PagedRange range) override;
  void move_to_host(PagedRange range) override;
  void copy_to_device(void* staged, const void* host, int64_t size_bytes) override;
  void copy_to_host(void* host, const void* staged, int64_t size_bytes) override;

 private:
  struct Operation {
    PagedEvent waits_for;
    std::function<void()> run;
  };

  void count_call();
  bool step();
  void* take(int64_t size_bytes);

  const Backing backing_;
  std::mt19937_64 random_;
  std::map<void*, std::deque<Operation>> streams_;
  std::set<void*> captured_;
  std::map<void*, int64_t> regions_;
  int64_t region_bytes_ = 0;
  int64_t staging_bytes_ = 0;
  int64_t limit_bytes_ = int64_t{1} << 40;
  int calls_ = 0;
  int calls_to_failure_ = 0;
  std::vector<PagedRange> moves_to_device_;
  std::vector<PagedRange> moves_to_host_;
  char to_device_ = 0;
  char to_host_ = 0;
};

}  // namespace qlora_native::testing
