#include "memory.h"

#include <algorithm>
#include <cstdio>

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Heap& Heap::instance() {
  static Heap* heap = new Heap;  // never destroyed: tensors are freed after static destructors ran
  return *heap;
}

void Heap::add(uint64_t base, uint64_t size, bool writable) {
  std::lock_guard<std::mutex> lock(mutex_);
  allocations_[base] = Allocation{base, size, writable, {}, {}, {}};
  last_ = nullptr;
}

void Heap::remove(uint64_t base) {
  std::lock_guard<std::mutex> lock(mutex_);
  allocations_.erase(base);
  last_ = nullptr;
}

void Heap::begin_launch(uint32_t blocks) {
  if (next_ > (1u << 30)) {  // the stamps are used up: start anew
    next_ = 0;
    for (auto& [base, a] : allocations_) a.writer.clear(), a.reader.clear();
  }
  first_ = next_;
  next_ += blocks + 1;
  for (auto& [base, a] : allocations_) a.traffic = {};
  releases_.clear();
}

void Heap::begin_block(uint32_t index) {
  me_ = first_ + 1 + index;
  released_ = false;
  observed_.clear();
  acquired_.assign(next_ - first_, false);
}

Allocation& Heap::find(uint64_t address, int bytes, int lane) {
  if (last_ && address >= last_->base && address + bytes <= last_->base + last_->size)
    return *last_;
  auto after = allocations_.upper_bound(address);
  if (after != allocations_.begin()) {
    Allocation& a = std::prev(after)->second;
    if (address + bytes <= a.base + a.size) return *(last_ = &a);
    throw Fault("bounds",
                "global address " + hex(address) + " is " + std::to_string(address - a.base) +
                    " bytes into a tensor of " + std::to_string(a.size),
                lane);
  }
  throw Fault("bounds", "global address " + hex(address) + " lies in no tensor", lane);
}

void Heap::check(Allocation& a, uint64_t offset, int bytes, Use use, int lane) {
  if (a.writer.empty()) a.writer.assign(a.size, 0), a.reader.assign(a.size, 0);
  if (use != Use::read && !a.writable) throw Fault("bounds", "write to constant memory", lane);
  uint32_t* writer = a.writer.data() + offset;
  uint32_t* reader = a.reader.data() + offset;
  const uint32_t mine = me_ | (use == Use::atomic ? atomic_bit : 0);
  for (int i = 0; i < bytes; ++i) {
    const bool both_atomic = use == Use::atomic && (writer[i] & atomic_bit);
    if (!both_atomic && foreign(writer[i])) {
      throw Fault("race",
                  "byte " + std::to_string(offset + i) +
                      " of a global tensor was written by block " +
                      std::to_string((writer[i] & ~atomic_bit) - first_ - 1) + " of this launch",
                  lane);
    }
    if (use == Use::read) {
      a.traffic.read_unique += reader[i] <= first_;
      reader[i] = reader[i] <= first_ || reader[i] == me_ ? me_ : many;
      continue;
    }
    if (reader[i] == many || foreign(reader[i])) {
      throw Fault("race",
                  "byte " + std::to_string(offset + i) +
                      " of a global tensor is written after another block read it",
                  lane);
    }
    a.traffic.written_unique += (writer[i] & ~atomic_bit) <= first_;
    writer[i] = mine;
  }
}

void Heap::access(Mask mask, const uint64_t* address, int bytes, Use use) {
  struct Line {
    uint64_t address;
    Allocation* allocation;
    std::array<uint64_t, 2> bytes;
  } lines[32];
  int n = 0;
  for (Mask m = mask; m; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t at = address[lane];
    if (at % bytes) {
      throw Fault("alignment",
                  "global address " + hex(at) + " is not a multiple of " + std::to_string(bytes),
                  lane);
    }
    Allocation& a = find(at, bytes, lane);
    check(a, at - a.base, bytes, use, lane);
    const uint64_t line = at / 128;
    int i = n - 1;
    while (i >= 0 && (lines[i].address != line || lines[i].allocation != &a)) --i;
    if (i < 0) lines[i = n++] = {line, &a, {}};
    lines[i].bytes[at / 64 % 2] |= ((1ull << bytes) - 1) << at % 64;
  }
  for (int i = 0; i < n; ++i) {
    Traffic& t = lines[i].allocation->traffic;
    uint64_t touched = 0, sectors = 0;
    for (uint64_t half : lines[i].bytes) {
      touched += __builtin_popcountll(half);
      sectors += bool(half & 0xffffffffu) + bool(half >> 32);
    }
    const bool partial = touched < 128;
    if (use == Use::read) {
      t.read += touched, t.read_sectors += 32 * sectors, ++t.read_lines,
          t.partial_read_lines += partial;
    } else {
      t.written += touched, t.written_sectors += 32 * sectors, ++t.written_lines,
          t.partial_written_lines += partial;
    }
  }
}

void Heap::synchronise(uint64_t address, bool release, bool acquire) {
  std::vector<uint32_t>& before = releases_[address];
  observed_.insert(observed_.end(), before.begin(), before.end());
  if (acquire) {
    for (uint32_t block : observed_) acquired_[block] = true;
    observed_.clear();
  }
  if (release || released_) before.push_back(me_ - first_ - 1);
}

Shared::Shared(size_t size)
    : bytes_(size, 0xff),
      writer_(size),
      reader_(size),
      other_reader_(size),
      generic_(size),
      in_flight_(size / 4 + 1),
      async_readers_(size / 4 + 1) {}

void Shared::check_bounds(int lane, uint32_t address, int bytes) const {
  if (uint64_t(address) + bytes > bytes_.size()) {
    throw Fault("bounds",
                "shared address " + hex(address) + " with " + std::to_string(bytes_.size()) +
                    " bytes of shared memory",
                lane);
  }
  if (bytes <= 16 && address % bytes) {
    throw Fault("alignment",
                "shared address " + hex(address) + " is not a multiple of " + std::to_string(bytes),
                lane);
  }
}

void Shared::check_async(int lane, uint32_t address, int bytes, bool write) const {
  for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i) {
    if (in_flight_[i])
      throw Fault("in-flight", "shared address " + hex(address) + " has a copy in flight", lane);
    if (write && async_readers_[i]) {
      throw Fault("in-flight", "shared address " + hex(address) + " is being read by wgmma", lane);
    }
  }
}

static std::string thread_name(uint32_t stamp) {
  if ((stamp >> 6 & 63) == async_agent) return "a bulk copy";
  std::string lane = (stamp & 63) < 32 ? " lane " + std::to_string(stamp & 63) : "";
  return "warp " + std::to_string(stamp >> 6 & 63) + lane;
}

void Shared::check_writer(const Observer& who, int lane, uint32_t address, int bytes,
                          bool async_proxy, const uint8_t* value) const {
  const uint32_t* writer = writer_.data() + address;
  uint32_t previous = 0;
  for (int i = 0; i < bytes; ++i) {
    if (writer[i] == previous && !async_proxy) continue;
    if (!writer[i]) continue;
    if (!ordered(writer[i], who, lane)) {
      if (value && value[i] == bytes_[address + i]) continue;
      previous = writer[i];
      throw Fault("race",
                  "shared address " + hex(address + i) + " was written by " +
                      thread_name(previous) + " with no synchronisation since",
                  lane);
    }
    previous = writer[i];
    if (async_proxy && generic_[address + i] &&
        previous >> 12 > who.fenced.at[previous >> 6 & 63]) {
      throw Fault("proxy",
                  "shared address " + hex(address + i) + " was written by " +
                      thread_name(previous) + " with no fence.proxy.async since",
                  lane);
    }
  }
}

void Shared::check_readers(const Observer& who, int lane, uint32_t address, int bytes) const {
  uint32_t good = 0, also_good = 0;
  for (int i = 0; i < bytes; ++i) {
    const uint32_t a = reader_[address + i], b = other_reader_[address + i];
    if ((a == good || !a) && (b == also_good || !b)) continue;
    for (uint32_t reader : {a, b}) {
      if (reader && !ordered(reader, who, lane)) {
        throw Fault("race",
                    "shared address " + hex(address + i) + " was read by " + thread_name(reader) +
                        " with no synchronisation since",
                    lane);
      }
    }
    good = a, also_good = b;
  }
}

void Shared::mark_reader(const Observer& who, int lane, uint32_t address, int bytes) {
  const uint32_t me = stamp(who, lane), same_warp = me >> 6;
  uint32_t *reader = reader_.data() + address, *other = other_reader_.data() + address;
  for (int i = 0; i < bytes; ++i) {
    const uint32_t old = reader[i];
    const bool mine = (old >> 6 & 63) == uint32_t(who.id);
    other[i] = old && !mine ? old : other[i];
    reader[i] = old >> 6 == same_warp && old != me ? (same_warp << 6 | many_lanes) : me;
  }
}

void Shared::mark_writer(const Observer& who, int lane, uint32_t address, int bytes, bool generic) {
  const uint32_t me = stamp(who, lane);
  std::fill_n(writer_.begin() + address, bytes, me);
  std::fill_n(reader_.begin() + address, bytes, 0);
  std::fill_n(other_reader_.begin() + address, bytes, 0);
  std::fill_n(generic_.begin() + address, bytes, generic);
}

void Shared::read(const Observer& who, int lane, uint32_t address, int bytes, bool async_proxy) {
  check_bounds(lane, address, bytes);
  check_async(lane, address, bytes, false);
  for (int i = 0; i < bytes; ++i) {
    if (!writer_[address + i]) {
      throw Fault("uninitialised", "shared address " + hex(address + i) + " was never written",
                  lane);
    }
  }
  check_writer(who, lane, address, bytes, async_proxy);
  if (!async_proxy) mark_reader(who, lane, address, bytes);
}

void Shared::write(const Observer& who, int lane, uint32_t address, int bytes,
                   const uint8_t* value) {
  check_bounds(lane, address, bytes);
  check_async(lane, address, bytes, true);
  check_writer(who, lane, address, bytes, false, value);
  check_readers(who, lane, address, bytes);
  mark_writer(who, lane, address, bytes, true);
}

void Shared::atomic(const Observer& who, int lane, uint32_t address, int bytes) {
  check_bounds(lane, address, bytes);
  check_async(lane, address, bytes, true);
  if ((writer_[address] & 63) != atomic_lane) check_writer(who, lane, address, bytes, false);
  if (!writer_[address])
    throw Fault("uninitialised", "shared address " + hex(address) + " was never written", lane);
  check_readers(who, lane, address, bytes);
  mark_writer(who, atomic_lane, address, bytes, true);
}

void Shared::begin_copy(const Observer& who, int lane, uint32_t address, int bytes) {
  check_bounds(lane, address, bytes);
  check_async(lane, address, bytes, true);
  check_writer(who, lane, address, bytes, false);
  check_readers(who, lane, address, bytes);
  count(in_flight_, address, bytes, 1);
}

void Shared::end_copy(const Observer& who, int lane, uint32_t address, int bytes) {
  count(in_flight_, address, bytes, -1);
  mark_writer(who, lane, address, bytes, false);
}

void Shared::end_async_read(const Observer& who, uint32_t address, int bytes) {
  count(async_readers_, address, bytes, -1);
  mark_reader(who, many_lanes, address, bytes);
}
