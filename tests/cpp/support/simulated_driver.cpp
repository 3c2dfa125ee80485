#include "support/simulated_driver.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "qlora_native/error.h"

namespace qlora_native::testing {
namespace {

constexpr int kFreed = 0xdd;

bool is_set(const PagedEvent& event) { return *static_cast<const bool*>(event.get()); }

}  // namespace

SimulatedDriver::~SimulatedDriver() {
  for (const auto& [data, size_bytes] : regions_) std::free(data);
}

void SimulatedDriver::count_call() {
  ++calls_;
  if (calls_to_failure_ > 0 && --calls_to_failure_ == 0) throw CudaError(999, "injected");
}

void SimulatedDriver::queue(Stream stream, std::function<void()> work) {
  streams_[stream.handle()].push_back({nullptr, std::move(work)});
}

bool SimulatedDriver::step() {
  std::vector<std::deque<Operation>*> ready;
  for (auto& [handle, operations] : streams_) {
    if (operations.empty()) continue;
    const PagedEvent& event = operations.front().waits_for;
    if (!event || is_set(event)) ready.push_back(&operations);
  }
  if (ready.empty()) return false;
  std::deque<Operation>& chosen = *ready[random_() % ready.size()];
  const Operation operation = std::move(chosen.front());
  chosen.pop_front();
  if (operation.run) operation.run();
  return true;
}

void SimulatedDriver::run(int count) {
  while (count-- > 0 && step()) continue;
}

void SimulatedDriver::drain() {
  while (step()) continue;
  for (const auto& [handle, operations] : streams_) {
    if (!operations.empty()) throw std::logic_error("an operation waits forever");
  }
}

void SimulatedDriver::set_capturing(Stream stream, bool is_capturing) {
  if (is_capturing) {
    captured_.insert(stream.handle());
  } else {
    captured_.erase(stream.handle());
  }
}

void* SimulatedDriver::take(int64_t size_bytes) {
  if (size_bytes > limit_bytes_ - region_bytes_ - staging_bytes_) {
    throw OutOfMemory("simulated memory is limited to " + std::to_string(limit_bytes_) + " bytes");
  }
  void* const data = std::aligned_alloc(kPagedAlignment, static_cast<size_t>(size_bytes));
  std::memset(data, kFreed, static_cast<size_t>(size_bytes));
  return data;
}

void* SimulatedDriver::allocate_region(int64_t size_bytes) {
  count_call();
  void* const data = take(size_bytes);
  regions_[data] = size_bytes;
  region_bytes_ += size_bytes;
  return data;
}

void SimulatedDriver::free_region(void* data, int64_t size_bytes) noexcept {
  while (step()) continue;  // as cudaFree waits
  region_bytes_ -= size_bytes;
  regions_.erase(data);
  std::free(data);
}

void* SimulatedDriver::allocate_staging(int64_t size_bytes) {
  count_call();
  void* const data = take(size_bytes);
  staging_bytes_ = size_bytes;
  return data;
}

void SimulatedDriver::free_staging(void* data) noexcept {
  while (step()) continue;
  staging_bytes_ = 0;
  std::free(data);
}

bool SimulatedDriver::is_capturing(Stream stream) { return captured_.count(stream.handle()) > 0; }

PagedEvent SimulatedDriver::record(Stream stream) {
  count_call();
  auto done = std::make_shared<bool>(false);
  queue(stream, [done] { *done = true; });
  return done;
}

void SimulatedDriver::wait(Stream stream, const PagedEvent& event) {
  count_call();
  if (event) streams_[stream.handle()].push_back({event, nullptr});
}

bool SimulatedDriver::is_done(const PagedEvent& event) {
  count_call();
  return !event || is_set(event);
}

void SimulatedDriver::wait_on_host(const PagedEvent& event) {
  count_call();
  while (!is_set(event)) {
    if (!step()) throw std::logic_error("the host waits forever");
  }
}

void SimulatedDriver::move_to_device(PagedRange range) {
  count_call();
  moves_to_device_.push_back(range);
}

void SimulatedDriver::move_to_host(PagedRange range) {
  count_call();
  moves_to_host_.push_back(range);
}

void SimulatedDriver::copy_to_device(void* staged, const void* host, int64_t size_bytes) {
  count_call();
  queue(to_device_stream(), [=] { std::memcpy(staged, host, static_cast<size_t>(size_bytes)); });
}

void SimulatedDriver::copy_to_host(void* host, const void* staged, int64_t size_bytes) {
  count_call();
  queue(to_host_stream(), [=] { std::memcpy(host, staged, static_cast<size_t>(size_bytes)); });
}

}  // namespace qlora_native::testing
