// Loads, stores, atomics, and the asynchronous copies.
#include <algorithm>

#include "compiler.h"

namespace {

constexpr uint64_t window_mask = 0xffull << 56;

enum class Space { generic, global, shared, local, param };

Space space_of(const Decoder& d, const Decoder::Address& address) {
  if (address.space == "local") return Space::local;  // also the .param variables of calls
  for (const std::string& part : d.parts) {
    const std::string name = part.substr(0, part.find(':'));
    if (name == "global" || name == "const") return Space::global;
    if (name == "shared") {
      if (part == "shared::cluster" && d.parts[0] != "cp" && d.parts[0] != "mbarrier")
        d.unknown("clusters");
      return Space::shared;
    }
    if (name == "local") return Space::local;
    if (name == "param") return Space::param;
  }
  return Space::generic;
}

}  // namespace

// Counts the wavefronts of a shared-memory access: lanes go in groups which together move 128
// bytes, and within a group each of the 32 banks serves one 4-byte word a wavefront.
void count_wavefronts(Instruction& i, Mask mask, const uint64_t* address, int bytes) {
  const int group = bytes <= 4 ? 32 : 128 / bytes;
  for (int first = 0; first < 32; first += group) {
    Mask members = mask >> first & (group == 32 ? ~0u : (1u << group) - 1);
    if (!members) continue;
    uint64_t words[64];
    int n = 0, load[32] = {};
    for (; members; members &= members - 1) {
      uint64_t at = address[first + __builtin_ctz(members)];
      for (uint64_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
        if (std::find(words, words + n, word) == words + n) words[n++] = word, ++load[word % 32];
      }
    }
    i.wavefronts += *std::max_element(load, load + 32);
    i.ideal_wavefronts += (n + 31) / 32;
  }
}

namespace {

struct Target {
  Space space;
  Register base;
  int64_t offset;
};

Target target_of(const Decoder& d, size_t operand) {
  Decoder::Address a = d.address(operand);
  return {space_of(d, a), a.base, a.offset};
}

// Evaluates the addresses of a warp, resolves a generic space, checks and counts; gives host
// pointers.
struct Access {
  uint8_t* at[32];
  uint64_t address[32];
  Space space;

  // `values`: what a store brings, `bytes` for each lane.
  Access(Warp& w, Mask mask, const Target& t, int bytes, Use use, const uint8_t* values = nullptr)
      : space(t.space) {
    evaluate(w, mask, t);
    if (space == Space::global)
      global(mask, bytes, use);
    else if (space == Space::shared)
      shared(w, mask, bytes, use, values);
    else if (space == Space::local)
      local(w, mask, bytes);
    else
      param(w, mask, bytes, use);
  }

  // Addresses only, with the space resolved.
  Access(Warp& w, Mask mask, const Target& t) : space(t.space) { evaluate(w, mask, t); }

  void evaluate(Warp& w, Mask mask, const Target& t) {
    for (Mask m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      address[l] =
          (t.base.bytes == 4 ? w.at<uint32_t>(t.base)[l] : w.at<uint64_t>(t.base)[l]) + t.offset;
    }
    if (space != Space::generic) return;
    uint64_t window = address[__builtin_ctz(mask)] & window_mask;
    for (Mask m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if ((address[l] & window_mask) != window)
        throw Fault("bounds", "a generic access to two address spaces", l);
      address[l] -= window;
    }
    space = window == shared_window  ? Space::shared
            : window == local_window ? Space::local
            : window == param_window ? Space::param
                                     : Space::global;
  }
  void global(Mask mask, int bytes, Use use) {
    Heap::instance().access(mask, address, bytes, use);
    for (Mask m = mask; m; m &= m - 1)
      at[__builtin_ctz(m)] = reinterpret_cast<uint8_t*>(address[__builtin_ctz(m)]);
  }
  void shared(Warp& w, Mask mask, int bytes, Use use, const uint8_t* values) {
    Shared& s = w.block.shared;
    for (Mask m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (address[l] >> 32) throw Fault("bounds", "shared address " + hex(address[l]), l);
      if (use == Use::read)
        s.read(w.observer, l, address[l], bytes);
      else if (use == Use::atomic)
        s.atomic(w.observer, l, address[l], bytes);
      else
        s.write(w.observer, l, address[l], bytes, values + l * bytes);
      at[l] = s.data() + address[l];
      if (use == Use::write)
        std::memcpy(at[l], values + l * bytes, bytes);  // before the next lane's check
    }
    count_wavefronts(*w.block.current, mask, address, bytes);
  }
  void local(Warp& w, Mask mask, int bytes) {
    const uint64_t size = w.program.local_bytes;
    for (Mask m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (address[l] + bytes > size || address[l] % bytes)
        throw Fault("bounds", "local address " + hex(address[l]), l);
      at[l] = w.local.data() + l * size + address[l];
    }
  }
  void param(Warp& w, Mask mask, int bytes, Use use) {
    if (use != Use::read)
      throw Fault("bounds", "write to a kernel's parameters", __builtin_ctz(mask));
    for (Mask m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (address[l] + bytes > w.program.param_bytes)
        throw Fault("bounds", "parameter address " + hex(address[l]), l);
      at[l] = w.block.params.data() + address[l];
    }
  }
};

bool is_signed_type(const std::string& type) { return type[0] == 's'; }

uint32_t vector_length(const Decoder& d) {
  return d.has("v2") ? 2 : d.has("v4") ? 4 : d.has("v8") ? 8 : 1;
}

Run load(const Decoder& d) {
  const std::string type = d.types.back();
  const uint32_t bytes = type_bytes(type), n = vector_length(d);
  std::vector<Register> to;
  for (const std::string& name : d.elements(0)) to.push_back(d.any_write(name, bytes));
  if (to.size() != n) d.unknown("vector length");
  for (Register r : to) {
    if (r.bytes < bytes) d.unknown("register size");
  }
  const Target target = target_of(d, 1);
  const bool extend = is_signed_type(type);
  const bool acquires = d.has("acquire");
  return [=](Warp& w, Mask m) {
    Access a(w, m, target, bytes * n, Use::read);
    if (acquires && a.space == Space::global) Heap::instance().fence();
    lanes(m, [&](int l) {
      for (uint32_t i = 0; i < n; ++i) {
        uint8_t* out = w.at<uint8_t>(to[i]) + l * to[i].bytes;
        const uint8_t* in = a.at[l] + i * bytes;
        std::memcpy(out, in, bytes);
        if (to[i].bytes > bytes)
          std::memset(out + bytes, extend && in[bytes - 1] & 128 ? 255 : 0, to[i].bytes - bytes);
      }
    });
  };
}

Run store(const Decoder& d) {
  const std::string type = d.types.back();
  const uint32_t bytes = type_bytes(type), n = vector_length(d);
  std::vector<Register> from;
  for (const std::string& name : d.elements(1)) from.push_back(d.any_read(name, bytes, type));
  if (from.size() != n) d.unknown("vector length");
  for (Register r : from) {
    if (r.bytes < bytes) d.unknown("register size");
  }
  const Target target = target_of(d, 0);
  if (d.has("release")) d.unknown("use a fence");
  return [=](Warp& w, Mask m) {
    uint8_t values[32 * 64];
    lanes(m, [&](int l) {
      for (uint32_t i = 0; i < n; ++i)
        std::memcpy(values + (l * n + i) * bytes, w.at<uint8_t>(from[i]) + l * from[i].bytes,
                    bytes);
    });
    Access a(w, m, target, bytes * n, Use::write, values);
    for (Mask rest = m; rest;
         rest &= rest - 1) {  // in lane order: the last of two lanes on one address wins
      int l = __builtin_ctz(rest);
      std::memcpy(a.at[l], values + l * n * bytes, n * bytes);
    }
  };
}

// ---- atomics

template <class T>
T combine(const std::string& op, T old, T x, T y) {
  if constexpr (std::is_integral_v<T>) {
    if (op == "and") return old & x;
    if (op == "or") return old | x;
    if (op == "xor") return old ^ x;
    if (op == "inc") return old >= x ? T(0) : T(old + 1);
    if (op == "dec") return old == 0 || old > x ? x : T(old - 1);
    if (op == "cas") return old == x ? y : old;
    if (op == "add") return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x));
  } else if (op == "add") {
    if constexpr (is_small_float<T>)
      return T(float(old) + float(x));
    else
      return old + x;
  }
  if (op == "min") return x < old ? x : old;
  if (op == "max") return old < x ? x : old;
  return x;  // exch
}

template <class T>
Pair<T> combine(const std::string& op, Pair<T> old, Pair<T> x, Pair<T> y) {
  return {combine(op, old.low, x.low, y.low), combine(op, old.high, x.high, y.high)};
}

template <class T>
Run atomic(const Decoder& d) {
  static const std::set<std::string> known = {"add", "and", "or",   "xor", "inc",
                                              "dec", "cas", "exch", "min", "max"};
  std::string op;
  for (const std::string& part : d.parts) {
    if (known.count(part)) op = part;
  }
  if (op.empty()) d.unknown();
  const bool returns = d.parts[0] == "atom", swaps = op == "cas";
  const uint32_t n = vector_length(d), first = returns ? 1 : 0;
  const Target target = target_of(d, first);
  std::vector<Register> to, x, y;
  if (returns) {
    for (const std::string& name : d.elements(0)) to.push_back(d.write(name, sizeof(T)));
  }
  for (const std::string& name : d.elements(first + 1))
    x.push_back(d.read(name, sizeof(T), d.types.back()));
  y = x;
  if (swaps) y = {d.read(first + 2, sizeof(T), d.types.back())};
  const bool release = d.has("release") || d.has("acq_rel"),
             acquire = d.has("acquire") || d.has("acq_rel");
  return [=](Warp& w, Mask m) {
    Access a(w, m, target, sizeof(T) * n, Use::atomic);
    for (Mask rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      if (a.space == Space::global) Heap::instance().synchronise(a.address[l], release, acquire);
      for (uint32_t i = 0; i < n; ++i) {
        T old, next;
        std::memcpy(&old, a.at[l] + i * sizeof(T), sizeof old);
        next = combine(op, old, w.at<T>(x[i])[l], w.at<T>(y[i])[l]);
        std::memcpy(a.at[l] + i * sizeof(T), &next, sizeof next);
        if (returns) w.at<T>(to[i])[l] = old;
      }
    }
  };
}

Run atomic_any(const Decoder& d) {
  const std::string& type = d.types.back();
  if (type == "f32") return atomic<float>(d);
  if (type == "f64") return atomic<double>(d);
  if (type == "f16") return atomic<Half>(d);
  if (type == "bf16") return atomic<BFloat>(d);
  if (type == "f16x2") return atomic<Pair<Half>>(d);
  if (type == "bf16x2") return atomic<Pair<BFloat>>(d);
  if (type == "s32") return atomic<int32_t>(d);
  if (type == "s64") return atomic<int64_t>(d);
  if (type == "b16") return atomic<uint16_t>(d);
  return type_bytes(type) == 8 ? atomic<uint64_t>(d) : atomic<uint32_t>(d);
}

// ---- cp.async

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

Run compile_memory(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "ld" || name == "ldu") return load(d);
  if (name == "st") return store(d);
  if (name == "atom" || name == "red") {
    if (d.has("async")) d.unknown();
    return atomic_any(d);
  }
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
