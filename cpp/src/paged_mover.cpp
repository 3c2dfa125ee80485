#include "paged_mover.h"

#include "managed_mover.h"
#include "staging_cache.h"

namespace qlora_native {
namespace {

/// The CPU's own memory: everything is where it belongs.
class HostMover final : public PagedMover {
 public:
  void acquire(std::span<const PagedRange> ranges, Access, std::span<void*> addresses,
               Stream) override {
    for (size_t i = 0; i < ranges.size(); ++i) addresses[i] = ranges[i].data;
  }
  void release(std::span<const PagedRange>, Stream) override {}
  void prefetch(std::span<const PagedRange>) override {}
  void evict(std::span<const PagedRange>, Stream) override {}
  void plan(std::span<const PagedRange>) override {}
  void show_to_host(PagedRange, Stream) override {}
  PagedEvent forget(PagedRange) override { return nullptr; }
  void add_to(PagedPoolStats*) const override {}
};

}  // namespace

std::unique_ptr<PagedMover> make_mover(PagedDriver& driver, int64_t device_budget_bytes) {
  switch (driver.backing()) {
    case Backing::kManaged:
      return std::make_unique<ManagedMover>(driver);
    case Backing::kPinned:
      return std::make_unique<StagingCache>(driver, device_budget_bytes);
    default:
      return std::make_unique<HostMover>();
  }
}

}  // namespace qlora_native
