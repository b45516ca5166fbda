// Global and shared memory with the shadow that finds races, wild addresses and data not yet there.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using Mask = uint32_t;

struct Fault : std::runtime_error {
  Fault(std::string kind, const std::string& message, int lane = -1)
      : std::runtime_error(message), kind(std::move(kind)), lane(lane) {}
  std::string kind;
  int lane;
};

std::string hex(uint64_t value);

// Address windows of the generic address space; below them lies global memory, at its host address.
constexpr uint64_t shared_window = 1ull << 56, local_window = 2ull << 56, param_window = 3ull << 56;

struct Traffic {
  uint64_t read = 0, written = 0;  // distinct bytes of each warp instruction, summed
  uint64_t read_sectors = 0, written_sectors = 0;  // bytes of the 32-byte sectors touched
  uint64_t read_unique = 0, written_unique = 0;    // distinct bytes of the launch
  uint64_t read_lines = 0, written_lines = 0;      // 128-byte lines touched
  uint64_t partial_read_lines = 0, partial_written_lines = 0;
};

enum class Use { read, write, atomic };

struct Allocation {
  uint64_t base, size;
  bool writable;
  Traffic traffic;
  std::vector<uint32_t> writer, reader;  // per byte: the last block that used it, see Heap::stamp
};

// Global memory: host memory of registered allocations. Blocks run one after another, so what is
// checked is that two blocks never use one byte, one of them writing, unless atomics and fences
// order them.
class Heap {
 public:
  static Heap& instance();
  void add(uint64_t base, uint64_t size, bool writable);
  void remove(uint64_t base);

  void begin_launch(uint32_t blocks);
  void begin_block(uint32_t index);
  void fence() {  // publishes what the block wrote, and lets it see what it has observed by atomics
    released_ = true;
    for (uint32_t block : observed_) acquired_[block] = true;
    observed_.clear();
  }
  // Checks and counts one warp instruction.
  void access(Mask mask, const uint64_t* address, int bytes, Use use);
  void synchronise(uint64_t address, bool release, bool acquire);
  std::map<uint64_t, Allocation>& allocations() { return allocations_; }

 private:
  Allocation& find(uint64_t address, int bytes, int lane);
  void check(Allocation& a, uint64_t offset, int bytes, Use use, int lane);
  bool foreign(uint32_t stamp) const {
    stamp &= ~atomic_bit;
    return stamp > first_ && stamp != me_ && !acquired_[stamp - first_ - 1];
  }
  static constexpr uint32_t atomic_bit = 1u << 31, many = (1u << 31) - 1;

  std::mutex mutex_;
  std::map<uint64_t, Allocation> allocations_;
  Allocation* last_ = nullptr;
  uint32_t first_ = 0, next_ = 0, me_ = 0;  // stamp of block i of this launch: first_ + 1 + i
  bool released_ = false;
  std::vector<uint32_t> observed_;
  std::vector<bool> acquired_;
  std::unordered_map<uint64_t, std::vector<uint32_t>> releases_;  // by address of the atomic
};

// What one warp, or one asynchronous agent, knows of the progress of all the others (a vector
// clock).
constexpr int max_agents = 33, async_agent = 32;
struct Clocks {
  std::array<uint32_t, max_agents> at{};
  void join(const Clocks& other) {
    for (int i = 0; i < max_agents; ++i) at[i] = std::max(at[i], other.at[i]);
  }
};

struct Observer {
  int id = 0;
  uint32_t clock = 1;  // stamps this agent's accesses
  Clocks seen,
      fenced;  // accesses ordered before it; generic writes it may use through the async proxy
};

// Shared memory of one block. Stamps of bytes: clock << 12 | agent << 6 | lane.
class Shared {
 public:
  static constexpr uint32_t many_lanes = 32, atomic_lane = 33;
  explicit Shared(size_t size);
  uint8_t* data() { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

  void read(const Observer& who, int lane, uint32_t address, int bytes, bool async_proxy = false);
  // Threads may store one value twice (compilers do, of replicated data): `value` is what the store
  // brings.
  void write(const Observer& who, int lane, uint32_t address, int bytes,
             const uint8_t* value = nullptr);
  void atomic(const Observer& who, int lane, uint32_t address, int bytes);

  void begin_copy(const Observer& who, int lane, uint32_t address,
                  int bytes);  // cp.async: in flight until ...
  void end_copy(const Observer& who, int lane, uint32_t address, int bytes);
  void begin_async_read(uint32_t address, int bytes) { count(async_readers_, address, bytes, 1); }
  void end_async_read(const Observer& who, uint32_t address, int bytes);

 private:
  void check_bounds(int lane, uint32_t address, int bytes) const;
  void check_writer(const Observer& who, int lane, uint32_t address, int bytes, bool async_proxy,
                    const uint8_t* value = nullptr) const;
  void check_readers(const Observer& who, int lane, uint32_t address, int bytes) const;
  void check_async(int lane, uint32_t address, int bytes, bool write) const;
  void mark_reader(const Observer& who, int lane, uint32_t address, int bytes);
  void mark_writer(const Observer& who, int lane, uint32_t address, int bytes, bool generic);
  static void count(std::vector<uint8_t>& counts, uint32_t address, int bytes, int change) {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i) counts[i] += change;
  }
  static bool ordered(uint32_t stamp, const Observer& who, int lane) {
    uint32_t agent = stamp >> 6 & 63, clock = stamp >> 12;
    return clock <= who.seen.at[agent] || (int(agent) == who.id && (stamp & 63) == uint32_t(lane));
  }
  static uint32_t stamp(const Observer& who, int lane) {
    if (who.clock >> 20) throw Fault("limit", "more than a million synchronisations in a block");
    return who.clock << 12 | uint32_t(who.id) << 6 | uint32_t(lane);
  }

  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> writer_, reader_, other_reader_;  // other_reader_: the last of another warp
  std::vector<uint8_t> generic_;                          // written by an ordinary store
  std::vector<uint8_t> in_flight_, async_readers_;        // per 4 bytes
};
