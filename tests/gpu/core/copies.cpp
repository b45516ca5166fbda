// Asynchronous copies, and the mbarriers that tell of them.
#include <algorithm>

#include "access.h"

namespace {

Run copy_async(const Decoder& d) {
  Target to = target_of(d, 0);
  Decoder::Address from = d.address(1);
  to.space = Space::shared;
  const Target source{Space::global, from.base, from.offset};
  const uint32_t bytes = uint32_t(d.immediate(2));
  const bool cached = d.has("ca");
  if (!(bytes == 16 || (cached && (bytes == 4 || bytes == 8)))) d.unknown("size");
  // The third number is the bytes taken from global memory (the rest is zero), unless it is a cache
  // policy.
  const bool sized = d.operands() > 3 && !(d.has("L2::cache_hint") && d.operands() == 4);
  bool predicate = false;
  Register given = d.read(std::to_string(bytes), 4);
  if (sized) {
    given = d.any_read(d.operand(3), 4);
    predicate = given.bytes == 1;
  }
  return [=](Warp& w, Mask m) {
    Access shared(w, m, to), global(w, m, source);
    Mask reads = 0;
    uint32_t n[32];
    for (Mask rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      n[l] = predicate ? (w.at<uint8_t>(given)[l] & 1 ? 0 : bytes) : w.at<uint32_t>(given)[l];
      if (n[l] > bytes)
        throw Fault(
            "bounds",
            "cp.async of " + std::to_string(n[l]) + " bytes out of " + std::to_string(bytes), l);
      if (n[l]) reads |= 1u << l;
      w.block.shared.begin_copy(w.observer, l, uint32_t(shared.address[l]), bytes);
    }
    for (uint32_t size :
         {1u, 2u, 4u, 8u, 16u}) {  // whole copies at once, clipped ones by their own size
      Mask whole = 0;
      for (Mask rest = reads; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        whole |= Mask(n[l] == size) << l;
        if (global.address[l] % bytes)
          throw Fault("alignment",
                      "global address " + hex(global.address[l]) + " is not a multiple of " +
                          std::to_string(bytes),
                      l);
      }
      if (whole) Heap::instance().access(whole, global.address, int(size), Use::read);
      reads &= ~whole;
    }
    for (Mask rest = reads; rest; rest &= rest - 1) {  // 3, 5, 6 ... bytes
      int l = __builtin_ctz(rest);
      for (uint32_t i = 0; i < n[l]; ++i) {
        uint64_t at[32];
        at[l] = global.address[l] + i;
        Heap::instance().access(1u << l, at, 1, Use::read);
      }
    }
    count_wavefronts(*w.block.current, m, shared.address, int(bytes));
    for (Mask rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      Copy copy{l, uint32_t(shared.address[l]), bytes, n[l], global.address[l], w.group[l], false};
      if (w.block.random() & 1) {  // lands now, else when it is waited for
        std::memcpy(w.block.shared.data() + copy.to, reinterpret_cast<void*>(copy.from),
                    copy.given);
        std::memset(w.block.shared.data() + copy.to + copy.given, 0, bytes - copy.given);
        copy.done = true;
      }
      w.copies.push_back(copy);
    }
  };
}

Run copy_group(const Decoder& d) {
  if (d.has("commit_group")) {
    return [](Warp& w, Mask m) { lanes(m, [&](int l) { ++w.group[l]; }); };
  }
  if (d.has("wait_all")) {
    return [](Warp& w, Mask m) {
      lanes(m, [&](int l) { ++w.group[l]; });
      w.complete_copies(m, 0);
    };
  }
  const uint32_t pending = uint32_t(d.immediate(0));
  return [=](Warp& w, Mask m) { w.complete_copies(m, pending); };
}

// ---- bulk copies and mbarriers

struct Barriers {
  Target target;
  MBarrier& find(Warp& w, Mask m) const {
    Access a(w, m, target);
    int l = __builtin_ctz(m);
    if (a.space != Space::shared) throw Fault("barrier", "mbarrier outside shared memory", l);
    return at(w, l, uint32_t(a.address[l]));
  }
  static MBarrier& at(Warp& w, int lane, uint32_t address) {
    auto found = w.block.mbarriers.find(address);
    if (found == w.block.mbarriers.end())
      throw Fault("barrier", "no mbarrier was initialised at shared address " + hex(address), lane);
    return found->second;
  }
};

void release(Warp& w, Mask m, MBarrier& b) {
  Observer& o = w.observer;
  Clocks mine = o.seen;
  if (m == (w.live & ~w.exited)) mine.at[o.id] = o.clock;
  b.seen.join(mine);
  b.fenced.join(o.fenced);
  ++o.clock;
}

Run bulk_copy(const Decoder& d) {
  // cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [shared], [global], bytes,
  // [mbarrier]
  if (d.has("tensor") || d.has("multicast::cluster")) d.unknown();
  if (d.parts.size() < 5 || d.parts[3].compare(0, 6, "shared") != 0 || d.parts[4] != "global")
    d.unknown();
  Decoder::Address to = d.address(0), from = d.address(1), barrier = d.address(3);
  const Target shared{Space::shared, to.base, to.offset},
      global{Space::global, from.base, from.offset},
      done{Space::shared, barrier.base, barrier.offset};
  Register size = d.read(2, 4);
  return [=](Warp& w, Mask m) {
    Access s(w, m, shared), g(w, m, global), b(w, m, done);
    for (Mask rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      uint32_t n = w.at<uint32_t>(size)[l];
      if (n % 16 || s.address[l] % 16 || g.address[l] % 16)
        throw Fault("alignment", "cp.async.bulk needs multiples of 16 bytes", l);
      Barriers::at(w, l, uint32_t(b.address[l]));
      for (uint32_t i = 0; i < n; i += 128) {  // counted as full lines
        uint64_t at[32];
        Mask lines = 0;
        for (uint32_t j = 0; j < 8 && i + 16 * j < n; ++j)
          at[j] = g.address[l] + i + 16 * j, lines |= 1u << j;
        Heap::instance().access(lines, at, 16, Use::read);
        for (uint32_t j = i; j < std::min(n, i + 128); j += 16)
          w.block.shared.begin_copy(w.observer, l, uint32_t(s.address[l] + j), 16);
      }
      w.block.bulk.push_back({uint32_t(s.address[l]), n, uint32_t(b.address[l]), g.address[l]});
    }
  };
}

Run mbarrier(const Decoder& d) {
  const std::string op = d.parts.at(1);
  const bool has_state = op == "arrive" && d.operand(0)[0] != '[';
  const size_t at =
      op == "init" || op == "inval" || op == "expect_tx" || (op == "arrive" && !has_state) ? 0 : 1;
  const Barriers barriers{target_of(d, at)};
  if (op == "init") {
    Register count = d.read(1, 4);
    const Target target = barriers.target;
    return [=](Warp& w, Mask m) {
      Access a(w, m, target);
      for (Mask rest = m; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        w.block.shared.write(w.observer, l, uint32_t(a.address[l]), 8);
        uint32_t n = w.at<uint32_t>(count)[l];
        w.block.mbarriers[uint32_t(a.address[l])] = MBarrier{n, n, 0, 0, {}, {}};
      }
    };
  }
  if (op == "inval") return [=](Warp&, Mask) {};
  if (op == "expect_tx" || op == "arrive") {
    const bool expects = op == "expect_tx" || d.has("expect_tx"), arrives = op == "arrive";
    const bool counted = d.operands() > at + 1;
    Register amount = counted ? d.read(at + 1, 4) : d.read("1", 4);
    Register state = has_state && d.operand(0) != "_" ? d.write(0, 8) : Register{};
    if (d.has("drop") || d.has("noComplete")) d.unknown();
    return [=](Warp& w, Mask m) {
      MBarrier& b = barriers.find(w, m);
      if (arrives) release(w, m, b);
      for (Mask rest = m; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        uint32_t n = w.at<uint32_t>(amount)[l];
        if (state.bytes) w.at<uint64_t>(state)[l] = b.phase;
        if (expects) b.transactions += n;
        if (!arrives) continue;
        uint32_t arrivals = expects ? 1 : n;
        if (arrivals > b.pending)
          throw Fault("barrier", "more arrivals at an mbarrier than it expects", l);
        b.pending -= arrivals;
        w.block.advance(b);
      }
    };
  }
  if (op == "try_wait" || op == "test_wait") {
    Register done = d.write(0, 1);
    const bool parity = d.has("parity");
    Register phase = d.read(2, parity ? 4 : 8);
    return [=](Warp& w, Mask m) {
      MBarrier& b = barriers.find(w, m);
      bool any = false;
      lanes(m, [&](int l) {
        bool complete = parity ? (b.phase & 1) != w.at<uint32_t>(phase)[l]
                               : b.phase != w.at<uint64_t>(phase)[l];
        w.at<uint8_t>(done)[l] = complete;
        any |= complete;
      });
      if (any) {
        w.observer.seen.join(b.seen);
        w.observer.fenced.join(b.fenced);
        w.block.idle = 0;
      } else {
        ++w.block.idle;
      }
    };
  }
  d.unknown();
}

}  // namespace

void Warp::complete_copies(Mask mask, uint32_t pending_groups) {
  auto due = [&](const Copy& c) {
    return (mask >> c.lane & 1) && c.group + pending_groups < group[c.lane];
  };
  for (const Copy& c : copies) {
    if (!due(c)) continue;
    if (!c.done) {
      std::memcpy(block.shared.data() + c.to, reinterpret_cast<void*>(c.from), c.given);
      std::memset(block.shared.data() + c.to + c.given, 0, c.bytes - c.given);
    }
    block.shared.end_copy(observer, c.lane, c.to, int(c.bytes));
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

void Block::advance(MBarrier& b) {
  if (b.pending || b.transactions) return;
  b.pending = b.expected;
  ++b.phase;
  idle = 0;
}

void Block::land(size_t i) {
  BulkCopy copy = bulk[i];
  bulk.erase(bulk.begin() + i);
  std::memcpy(shared.data() + copy.shared, reinterpret_cast<void*>(copy.global), copy.bytes);
  for (uint32_t j = 0; j < copy.bytes; j += 16) shared.end_copy(async, 0, copy.shared + j, 16);
  MBarrier& b = mbarriers.at(copy.barrier);
  b.seen.at[async_agent] = std::max(b.seen.at[async_agent], async.clock);
  ++async.clock;
  b.transactions -= copy.bytes;
  advance(b);
}

Run compile_copies(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "mbarrier") return mbarrier(d);
  if (name == "createpolicy") {
    Register to = d.write(0, 8);
    return [=](Warp& w, Mask m) { lanes(m, [&](int l) { w.at<uint64_t>(to)[l] = 0; }); };
  }
  if (name == "cp" && d.has("async")) {
    if (d.has("bulk")) return bulk_copy(d);
    if (d.has("commit_group") || d.has("wait_group") || d.has("wait_all")) return copy_group(d);
    if (d.has("ca") || d.has("cg")) return copy_async(d);
  }
  return {};
}
