// torch's CPU allocator while the machine is in use: each tensor is poisoned with NaN, lies between
// unmapped gaps and is known to the machine by its exact size.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "memory.h"

namespace {

constexpr size_t gap = size_t(1) << 20, reserved = size_t(1) << 44;

class Arena final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &Arena::release, c10::Device(c10::DeviceType::CPU)};
    const size_t mapped = (bytes + 4095) / 4096 * 4096;
    char* block;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      block = start() + end_;
      end_ += (mapped + gap + 4095) / 4096 * 4096;
      if (end_ > reserved) throw std::bad_alloc();
    }
    if (mmap(block, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
             0) == MAP_FAILED)
      throw std::bad_alloc();
    std::memset(block, 0xff, bytes);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      sizes_[block] = mapped;
    }
    Heap::instance().add(reinterpret_cast<uint64_t>(block), bytes, true);
    return {block, block, &Arena::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Arena::release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  static Arena& instance() {
    static Arena* arena = new Arena;  // outlives every tensor
    return *arena;
  }

 private:
  static void release(void* block) {
    if (!block) return;
    Heap::instance().remove(reinterpret_cast<uint64_t>(block));
    Arena& a = instance();
    std::lock_guard<std::mutex> lock(a.mutex_);
    auto found = a.sizes_.find(block);
    // Mapped away rather than returned: a pointer kept too long meets no other tensor.
    mmap(block, found->second, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
         -1, 0);
    a.sizes_.erase(found);
  }
  char* start() {
    if (!base_) {
      void* p =
          mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      base_ = static_cast<char*>(p);
    }
    return base_;
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  size_t end_ = gap;
  std::unordered_map<void*, size_t> sizes_;
};

c10::Allocator* ordinary = nullptr;

}  // namespace

extern "C" {

void arena_install() {
  if (!ordinary) ordinary = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&Arena::instance(), 100);
}

void arena_remove() { c10::SetCPUAllocator(ordinary, 100); }
}
