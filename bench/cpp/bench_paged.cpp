// Paged memory: what it moves per second, relative to the link between host and device, and what an
// acquire costs the host when nothing has to be moved.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "host_link.h"
#include "machine.h"
#include "qlora_native/memory.h"

namespace {

namespace qn = qlora_native;
using bench::Machine;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kBudgetBytes = 256 * kMiB;
constexpr int64_t kStateBytes = 4 * kBudgetBytes;
constexpr int64_t kManagedBytes = 512 * kMiB;
constexpr double kGiga = 1e9;

/// A pool full of ranges of one size, whose bytes say which range and which pass they are of.
class State {
 public:
  State(Machine& machine, qn::Backing backing, int64_t total_bytes, int64_t range_bytes)
      : machine_(machine),
        pool_({.device = machine.device(),
               .backing = backing,
               .region_bytes = total_bytes,
               .device_budget_bytes = kBudgetBytes}) {
    for (int64_t begin = 0; begin < total_bytes; begin += range_bytes) {
      buffers_.emplace_back(pool_, range_bytes, machine.stream());
      ranges_.push_back(buffers_.back().range());
      std::memset(ranges_.back().data, value_of(ranges_.size() - 1, 0),
                  static_cast<size_t>(range_bytes));
    }
  }

  /// A pass in which every byte is read and replaced, and a look at what arrived.
  void verify() {
    const qn::Stream stream = machine_.stream();
    std::vector<char> bytes(static_cast<size_t>(ranges_[0].size_bytes));
    pool_.plan(ranges_);
    for (size_t i = 0; i < ranges_.size(); ++i) {
      void* const address = pool_.acquire(ranges_[i], qn::Access::kReadWrite, stream);
      bench::synchronize(stream);
      machine_.copy_to_host(bytes.data(), address, ranges_[i].size_bytes);
      expect(bytes, value_of(i, 0), "on the device");
      std::memset(bytes.data(), value_of(i, 1), bytes.size());
      machine_.copy_to_device(address, bytes.data(), ranges_[i].size_bytes);
      pool_.release(ranges_[i], stream);
    }
    pool_.evict(ranges_, stream);
    for (size_t i = 0; i < ranges_.size(); ++i) {
      std::memcpy(bytes.data(), pool_.host_view(ranges_[i], stream), bytes.size());
      expect(bytes, value_of(i, 1), "on the host");
    }
  }

  /// Queues what an optimizer's step over the whole state moves; waits for the last of it.
  void pass() {
    const qn::Stream stream = machine_.stream();
    pool_.plan(ranges_);
    for (const qn::PagedRange& range : ranges_) {
      pool_.acquire(range, qn::Access::kReadWrite, stream);
      pool_.release(range, stream);
    }
    bench::synchronize(stream);
  }

  /// Off the device and back.
  void round_trip() {
    const qn::Stream stream = machine_.stream();
    pool_.evict(ranges_, stream);
    pool_.prefetch(ranges_, stream);
    acquire_all();
    bench::synchronize(stream);
  }

  void acquire_all() {
    addresses_.resize(ranges_.size());
    pool_.acquire(ranges_, qn::Access::kReadWrite, addresses_, machine_.stream());
    pool_.release(ranges_, machine_.stream());
  }

  int64_t moved_bytes() const {
    const qn::PagedPoolStats stats = pool_.stats();
    return stats.bytes_to_device + stats.bytes_to_host;
  }

 private:
  static char value_of(size_t range, int pass) {
    return static_cast<char>(range * 7 + static_cast<size_t>(pass) * 101 + 1);
  }
  static void expect(const std::vector<char>& bytes, char value, const char* where) {
    if (std::all_of(bytes.begin(), bytes.end(), [=](char byte) { return byte == value; })) return;
    throw std::runtime_error(std::string("wrong bytes ") + where);
  }

  Machine& machine_;
  qn::PagedPool pool_;
  std::vector<qn::PagedBuffer> buffers_;
  std::vector<qn::PagedRange> ranges_;
  std::vector<void*> addresses_;
};

struct Case {
  std::string name;
  qn::Backing backing;
  int64_t total_bytes;
  int64_t range_bytes;
  void (State::*run)();
  /// What the moved bytes are compared with; null when nothing is meant to move.
  double (*link_rate)(const bench::LinkRates& rates);
};

void measure(benchmark::State& state, Machine& machine, const Case& wanted, bool& failed) {
  try {
    State memory(machine, wanted.backing, wanted.total_bytes, wanted.range_bytes);
    memory.verify();
    const double link = wanted.link_rate == nullptr
                            ? 0
                            : wanted.link_rate(bench::measure_link(wanted.total_bytes / 2));
    (memory.*wanted.run)();
    std::vector<double> rates;
    for (auto unused : state) {
      static_cast<void>(unused);
      const int64_t before = memory.moved_bytes();
      const auto begin = std::chrono::steady_clock::now();
      (memory.*wanted.run)();
      const auto time = std::chrono::steady_clock::now() - begin;
      const double seconds = std::chrono::duration<double>(time).count();
      state.SetIterationTime(seconds);
      rates.push_back(static_cast<double>(memory.moved_bytes() - before) / seconds);
    }
    if (wanted.link_rate == nullptr) return;
    const auto middle = rates.begin() + static_cast<ptrdiff_t>(rates.size() / 2);
    std::nth_element(rates.begin(), middle, rates.end());
    state.counters["GB/s"] = *middle / kGiga;
    state.counters["link_GB/s"] = link / kGiga;
    state.counters["of_link"] = *middle / link;
  } catch (const std::exception& error) {
    failed = true;
    state.SkipWithError(error.what());
  }
}

std::vector<Case> cases_of(qn::Device device) {
  // A LoRA's optimizer state: many small tensors that are there.
  const auto resident = [](qn::Backing backing) {
    return Case{"acquire_224_resident", backing, 224 * 128 * 1024, 128 * 1024,
                &State::acquire_all,    nullptr};
  };
  if (device.is_cpu()) return {resident(qn::Backing::kHost)};
  std::vector<Case> cases = {resident(qn::Backing::kPinned)};
  for (const int64_t parts : {8, 16, 64}) {
    cases.push_back({"pass_over_4_budgets/ranges_of_budget/" + std::to_string(parts),
                     qn::Backing::kPinned, kStateBytes, kBudgetBytes / parts, &State::pass,
                     [](const bench::LinkRates& rates) { return rates.both; }});
  }
  if (qn::automatic_backing(device).backing != qn::Backing::kManaged) return cases;
  cases.push_back(resident(qn::Backing::kManaged));
  for (const int64_t mib : {1, 16}) {
    cases.push_back({"evict_and_prefetch/MiB/" + std::to_string(mib), qn::Backing::kManaged,
                     kManagedBytes, mib * kMiB, &State::round_trip,
                     [](const bench::LinkRates& rates) {
                       // One direction after the other.
                       return 2 / (1 / rates.to_device + 1 / rates.to_host);
                     }});
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  bool failed = false;
  try {
    std::vector<std::unique_ptr<Machine>> machines;
    machines.push_back(bench::make_cpu_machine());
    if (auto machine = bench::make_cuda_machine()) machines.push_back(std::move(machine));
    for (const auto& machine : machines) {
      const std::string device = qn::name(machine->device().type);
      benchmark::AddCustomContext(device, machine->name());
      for (const Case& added : cases_of(machine->device())) {
        const std::string name = device + "/" + qn::name(added.backing) + "/" + added.name;
        benchmark::RegisterBenchmark(name.c_str(),
                                     [&machine, &failed, added](benchmark::State& state) {
                                       measure(state, *machine, added, failed);
                                     })
            ->UseManualTime()
            ->Unit(benchmark::kMicrosecond);
      }
    }
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << "\n";
    return 1;
  }
  return failed ? 1 : 0;
}
