// Paged memory of the CPU: memory that the operating system pages; nothing to move.
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "backend.h"
#include "qlora_native/error.h"

namespace qlora_native::cpu {
namespace {

class HostDriver final : public PagedDriver {
 public:
  Backing backing() const override { return Backing::kHost; }

  void* allocate_region(int64_t size_bytes) override {
    // Pages of the system's own, which get them back at once.
    void* const data = mmap(nullptr, static_cast<size_t>(size_bytes), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      throw OutOfMemory("the system has no region of " + std::to_string(size_bytes) + " bytes (" +
                        std::strerror(errno) + ")");
    }
    return data;
  }
  void free_region(void* data, int64_t size_bytes) noexcept override {
    static_cast<void>(munmap(data, static_cast<size_t>(size_bytes)));
  }

  // Work on the CPU is over when its call returns: there is no order to keep.
  Stream to_device_stream() override { return Stream::none(); }
  Stream to_host_stream() override { return Stream::none(); }
  bool is_capturing(Stream) override { return false; }
  PagedEvent record(Stream) override { return nullptr; }
  void wait(Stream, const PagedEvent&) override {}
  bool is_done(const PagedEvent&) override { return true; }
  void wait_on_host(const PagedEvent&) override {}

  void* allocate_staging(int64_t) override { refuse(); }
  void free_staging(void*) noexcept override {}
  void move_to_device(PagedRange) override { refuse(); }
  void move_to_host(PagedRange) override { refuse(); }
  void copy_to_device(void*, const void*, int64_t) override { refuse(); }
  void copy_to_host(void*, const void*, int64_t) override { refuse(); }

 private:
  [[noreturn]] static void refuse() { throw Error("the CPU moves no paged memory"); }
};

void check_device(Device device) {
  if (device.index != 0) throw InvalidArgument("there is no CPU " + std::to_string(device.index));
}

BackingChoice choose_backing(Device device) {
  check_device(device);
  return {Backing::kHost, "the CPU's own memory, which the operating system pages"};
}

std::unique_ptr<PagedDriver> make_driver(Device device, Backing) {
  check_device(device);
  return std::make_unique<HostDriver>();
}

}  // namespace

const PagedMemoryTable& paged_memory() {
  static constexpr PagedMemoryTable kTable{choose_backing, make_driver};
  return kTable;
}

}  // namespace qlora_native::cpu
