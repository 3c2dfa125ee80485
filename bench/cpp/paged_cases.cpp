#include "paged_cases.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "columns.h"
#include "host_link.h"
#include "qlora_native/memory.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kBudgetsPerPass = 4;
constexpr int64_t kResidentRanges = 224;  // a LoRA's optimizer state: many small tensors

/// A pool full of ranges of one size, whose bytes say which range and which pass they are of.
class State {
 public:
  State(Machine& machine, qn::Backing backing, int64_t budget_bytes, int64_t ranges,
        int64_t range_bytes)
      : machine_(machine),
        pool_({.device = machine.device(),
               .backing = backing,
               .region_bytes = ranges * range_bytes,
               .device_budget_bytes = budget_bytes}) {
    for (int64_t i = 0; i < ranges; ++i) {
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
      machine_.synchronize();
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
    machine_.synchronize();
  }

  /// Off the device and back.
  void round_trip() {
    const qn::Stream stream = machine_.stream();
    pool_.evict(ranges_, stream);
    pool_.prefetch(ranges_, stream);
    acquire_all();
    machine_.synchronize();
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

struct PagedCase {
  const char* name;
  const char* description;
  qn::Backing backing;
  int64_t budget_bytes;
  int64_t ranges;
  int64_t range_bytes;
  void (State::*run)();
  double link_rate;  ///< what the moved bytes are compared with; 0 when nothing is to move
};

Timed prepare(Machine& machine, const PagedCase& wanted) {
  const auto state = std::make_shared<State>(machine, wanted.backing, wanted.budget_bytes,
                                             wanted.ranges, wanted.range_bytes);
  state->verify();
  const auto replay = [state, run = wanted.run] {
    const auto begin = std::chrono::steady_clock::now();
    ((*state).*run)();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  // The second one is as all that follow.
  replay();
  const int64_t before = state->moved_bytes();
  replay();
  return {.replay = replay,
          .bytes = static_cast<double>(state->moved_bytes() - before),
          .ceiling = wanted.link_rate};
}

Case case_of(Machine& machine, const PagedCase& wanted) {
  Case made;
  made.name = std::string("paged/") + qn::name(wanted.backing) + "/" + wanted.name + "/" +
              std::to_string(wanted.ranges);
  made.heading = std::string(qn::name(wanted.backing)) +
                 (wanted.backing == qn::Backing::kPinned
                      ? ", staging cache of " + std::to_string(wanted.budget_bytes / kMiB) + " MiB"
                      : "");
  made.facts = {{"op", "paged"},
                {"case", wanted.name},
                {"description", wanted.description},
                {"backing", qn::name(wanted.backing)},
                {"budget_bytes", wanted.budget_bytes},
                {"ranges", wanted.ranges},
                {"range_bytes", wanted.range_bytes}};
  made.prepare = [&machine, wanted] { return prepare(machine, wanted); };
  return made;
}

std::vector<PagedCase> cases_of(qn::Backing backing, int64_t budget, const LinkRates& link) {
  const int64_t small = std::min(kMiB / 8, budget / kMiB * (kMiB / 256));
  std::vector<PagedCase> cases = {{"acquire", "acquire what is there", backing, budget,
                                   kResidentRanges, small, &State::acquire_all, 0}};
  if (backing == qn::Backing::kPinned) {
    for (const int64_t parts : {8, 16, 64}) {
      cases.push_back({"pass", "a pass over 4 budgets", backing, budget, kBudgetsPerPass * parts,
                       budget / parts, &State::pass, link.both});
    }
  }
  if (backing == qn::Backing::kManaged) {
    // One direction after the other.
    const double rate = 2 / (1 / link.to_device + 1 / link.to_host);
    for (const int64_t range : {kMiB, 16 * kMiB}) {
      cases.push_back({"round_trip", "evict and prefetch", backing, budget,
                       std::max<int64_t>(1, 2 * budget / range), range, &State::round_trip, rate});
    }
  }
  return cases;
}

std::vector<qn::Backing> backings_of(const Options& options, qn::Device device) {
  std::vector<qn::Backing> there = {qn::Backing::kHost};
  if (device.is_cuda()) {
    there = {qn::Backing::kPinned};
    if (qn::automatic_backing(device).backing == qn::Backing::kManaged) {
      there.push_back(qn::Backing::kManaged);
    }
  }
  if (options.backings.empty()) return there;
  for (const qn::Backing wanted : options.backings) {
    if (std::find(there.begin(), there.end(), wanted) == there.end()) {
      throw std::invalid_argument(std::string("--backing: '") + qn::name(wanted) + "' is not for " +
                                  qn::to_string(device) + ": " +
                                  qn::automatic_backing(device).reason);
    }
  }
  return options.backings;
}

}  // namespace

Plan paged_plan(const Options& options, Machine& machine) {
  const int64_t budget = options.budget_mib * kMiB;
  const std::vector<qn::Backing> backings = backings_of(options, machine.device());
  const LinkRates link =
      machine.device().is_cuda() ? measure_link(2 * budget, options.min_seconds) : LinkRates{};
  Plan plan;
  plan.ceiling = "link";
  if (machine.device().is_cuda()) {
    char note[160];
    std::snprintf(note, sizeof note,
                  "link: %.1f GB/s to the device, %.1f to the host, %.1f both at once,\n"
                  "  by cudaMemcpyAsync from and to pinned memory",
                  link.to_device * 1e-9, link.to_host * 1e-9, link.both * 1e-9);
    plan.notes.push_back(note);
  } else {
    plan.notes.push_back("nothing moves on a CPU: the host's cost of an acquire alone");
  }
  for (const qn::Backing backing : backings) {
    for (const PagedCase& wanted : cases_of(backing, budget, link)) {
      plan.cases.push_back(case_of(machine, wanted));
    }
  }
  plan.columns = columns_of(
      {{text_column("work", -24, "description"), number_column("ranges", 8, "ranges", "%.0f"),
        number_column("KiB each", 10, "range_bytes", "%.0f", 1.0 / 1024)},
       time_columns(),
       rate_columns(plan.ceiling)});
  return plan;
}

}  // namespace bench
