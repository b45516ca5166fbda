// Branches, barriers, fences, warp-wide exchange, special registers.
#include <algorithm>

#include "compiler.h"

void Warp::converge(Mask mask, Mask needed, const char* what) const {
  if (mask == (needed & live & ~exited)) return;
  throw Fault("divergence", std::string(what) + " reached by part of a warp: lanes " + hex(mask) +
                                " of " + hex(needed & live));
}

void Warp::jump(Mask mask, uint32_t target) {
  Fragment& here = fragments.front();
  if (mask == here.mask) {
    here.pc = target;
  } else {
    here.mask &= ~mask;
    fragments.push_back({target, mask, here.stack});
  }
}

void Warp::leave(Mask mask) {
  exited |= mask;
  Fragment& here = fragments.front();
  here.mask &= ~mask;
  if (!here.mask) fragments.erase(fragments.begin());
}

static Clocks with_own(const Clocks& clocks, const Observer& o) {
  Clocks c = clocks;
  c.at[o.id] = o.clock;
  return c;
}

static void synchronise(const std::vector<Warp*>& warps) {
  Clocks seen, fenced;
  for (Warp* w : warps) {
    seen.join(with_own(w->observer.seen, w->observer));
    fenced.join(w->observer.fenced);
  }
  for (Warp* w : warps) {
    w->observer.seen = seen;
    w->observer.fenced = fenced;
    ++w->observer.clock;
  }
}

void Block::arrive(Warp& warp, uint32_t id, uint32_t threads, bool wait) {
  if (threads == 0) threads = size[0] * size[1] * size[2];
  if (id > 15 || threads % 32) {
    if (id > 15 || threads != size[0] * size[1] * size[2]) {
      throw Fault("barrier",
                  "barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads");
    }
  }
  Barrier& b = barriers[id];
  if (b.arrived && b.expected != threads) {
    throw Fault("barrier", "barrier " + std::to_string(id) + " used with " +
                               std::to_string(threads) + " and " + std::to_string(b.expected) +
                               " threads");
  }
  b.expected = threads;
  b.arrived += __builtin_popcount(warp.live);
  b.participants.push_back(&warp);
  if (wait) b.waiting.push_back(&warp);
  warp.waiting = wait;
  if (b.arrived > b.expected)
    throw Fault("barrier",
                "more threads arrive at barrier " + std::to_string(id) + " than it expects");
  if (b.arrived < b.expected) return;
  synchronise(b.participants);
  for (Warp* w : b.waiting) w->waiting = false;
  b = Barrier{};
}

static Run barrier(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "bar" && d.has("warp")) {
    Register needed = d.read(0, 4);
    return [=](Warp& w, Mask m) {
      w.converge(m, w.at<uint32_t>(needed)[__builtin_ctz(m)], "bar.warp.sync");
      w.observer.seen.at[w.observer.id] = w.observer.clock++;
    };
  }
  if (d.has("red")) d.unknown();
  bool wait = d.has("sync");
  if (!wait && !d.has("arrive")) d.unknown();
  Register id = d.read(0, 4), threads = d.operands() > 1 ? d.read(1, 4) : d.read("0", 4);
  return [=](Warp& w, Mask m) {
    w.converge(m, ~0u, "barrier");
    if (w.exited)
      throw Fault("divergence", "barrier reached by a warp some of whose threads have exited");
    int lane = __builtin_ctz(m);
    w.block.arrive(w, w.at<uint32_t>(id)[lane], w.at<uint32_t>(threads)[lane], wait);
  };
}

static Run fence(const Decoder& d) {
  if (d.has("proxy")) {
    if (d.opcode().find("proxy.async") == std::string::npos) d.unknown();
    return [](Warp& w, Mask) {
      Observer& o = w.observer;
      o.fenced.join(with_own(o.seen, o));
      ++o.clock;
    };
  }
  bool device = !d.has("cta");
  return [=](Warp&, Mask) {
    if (device) Heap::instance().fence();
  };
}

static Run shuffle(const Decoder& d) {
  std::vector<std::string> results = split(d.operand(0), '|');
  Register to = d.write(results[0], 4), from = d.read(1, 4), b = d.read(2, 4), c = d.read(3, 4),
           needed = d.read(4, 4);
  bool with_predicate = results.size() > 1;
  Register in_range = with_predicate ? d.write(results[1], 1) : Register{};
  enum {
    idx,
    up,
    down,
    bfly
  } mode = d.has("up")     ? up
           : d.has("down") ? down
           : d.has("bfly") ? bfly
                           : idx;
  return [=](Warp& w, Mask m) {
    w.converge(m, w.at<uint32_t>(needed)[__builtin_ctz(m)], "shfl.sync");
    uint32_t source[32];
    std::copy_n(w.at<uint32_t>(from), 32, source);
    for (Mask rest = m; rest; rest &= rest - 1) {
      int lane = __builtin_ctz(rest);
      int by = w.at<uint32_t>(b)[lane] & 31, clamp = w.at<uint32_t>(c)[lane] & 31,
          segment = w.at<uint32_t>(c)[lane] >> 8 & 31;
      int last = (lane & segment) | (clamp & ~segment), first = lane & segment, j = lane;
      bool valid = true;
      switch (mode) {
        case up:
          j = lane - by, valid = j >= last;
          break;
        case down:
          j = lane + by, valid = j <= last;
          break;
        case bfly:
          j = lane ^ by, valid = j <= last;
          break;
        case idx:
          j = first | (by & ~segment), valid = j <= last;
          break;
      }
      if (!valid) j = lane;
      if (!(m >> j & 1))
        throw Fault("divergence",
                    "shfl.sync reads lane " + std::to_string(j) + ", which takes no part", lane);
      w.at<uint32_t>(to)[lane] = source[j];
      if (with_predicate) w.at<uint8_t>(in_range)[lane] = valid;
    }
  };
}

static Run vote(const Decoder& d) {
  bool negated = d.operand(1)[0] == '!';
  Register source = d.read(d.operand(1).substr(negated), 1), needed = d.read(2, 4);
  bool ballot = d.has("ballot"), all = d.has("all"), any = d.has("any");
  Register to = d.write(0, ballot ? 4 : 1);
  return [=](Warp& w, Mask m) {
    w.converge(m, w.at<uint32_t>(needed)[__builtin_ctz(m)], "vote.sync");
    Mask p = (negated ? ~w.predicate(source) : w.predicate(source)) & m;
    bool result = all ? p == m : any ? p != 0 : p == m || p == 0;
    lanes(m, [&](int l) {
      if (ballot)
        w.at<uint32_t>(to)[l] = p;
      else
        w.at<uint8_t>(to)[l] = result;
    });
  };
}

template <class T>
static Run match(const Decoder& d) {
  std::vector<std::string> results = split(d.operand(0), '|');
  Register to = d.write(results[0], 4), from = d.read(1, sizeof(T)), needed = d.read(2, 4);
  bool all = d.has("all");
  Register same = results.size() > 1 ? d.write(results[1], 1) : Register{};
  return [=](Warp& w, Mask m) {
    w.converge(m, w.at<uint32_t>(needed)[__builtin_ctz(m)], "match.sync");
    const T* v = w.at<T>(from);
    lanes(m, [&](int l) {
      Mask equal = 0;
      for (int k = 0; k < 32; ++k) equal |= Mask((m >> k & 1) && v[k] == v[l]) << k;
      w.at<uint32_t>(to)[l] = all ? (equal == m ? m : 0) : equal;
      if (same.bytes) w.at<uint8_t>(same)[l] = equal == m;
    });
  };
}

template <class T>
static Run reduce(const Decoder& d) {
  Register to = d.write(0, 4), from = d.read(1, 4), needed = d.read(2, 4);
  std::string op = d.parts[2];
  return [=](Warp& w, Mask m) {
    w.converge(m, w.at<uint32_t>(needed)[__builtin_ctz(m)], "redux.sync");
    const T* v = w.at<T>(from);
    T r = v[__builtin_ctz(m)];
    for (Mask rest = m & (m - 1); rest; rest &= rest - 1) {
      T x = v[__builtin_ctz(rest)];
      r = op == "add"   ? r + x
          : op == "min" ? std::min(r, x)
          : op == "max" ? std::max(r, x)
          : op == "and" ? r & x
          : op == "or"  ? r | x
                        : r ^ x;
    }
    lanes(m, [&](int l) { w.at<T>(to)[l] = r; });
  };
}

static Run call(const Decoder& d) {
  // call{.uni} (results), name, (arguments)
  std::vector<std::string> operands = d.statement.operands;
  auto group = [&](std::string text) {
    std::vector<std::string> names;
    for (std::string part : split(text.substr(1, text.size() - 2), ',')) {
      part.erase(std::remove_if(part.begin(), part.end(), ::isspace), part.end());
      if (!part.empty()) names.push_back(part);
    }
    return names;
  };
  std::vector<std::string> results, arguments;
  size_t at = 0;
  if (operands.at(0)[0] == '(') results = group(operands[at++]);
  std::string name = operands.at(at++);
  if (at < operands.size()) arguments = group(operands[at]);
  auto found = d.compiler.module.functions.find(name);
  if (found == d.compiler.module.functions.end()) d.unknown("no such function");
  const Function& f = found->second;
  d.compiler.declare_formals(f);
  struct Move {
    uint32_t to, from, bytes;
  };
  std::vector<Move> in, out;
  auto& variables = d.compiler.variables;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Variable& formal = variables.at(f.parameters.at(i).name);
    in.push_back({uint32_t(formal.address), uint32_t(variables.at(arguments[i]).address),
                  uint32_t(formal.bytes)});
  }
  for (size_t i = 0; i < results.size(); ++i) {
    const Variable& formal = variables.at(f.results.at(i).name);
    out.push_back({uint32_t(variables.at(results[i]).address), uint32_t(formal.address),
                   uint32_t(formal.bytes)});
  }
  std::shared_ptr<uint32_t>& entry = d.compiler.entries[name];
  if (!entry) {
    entry = std::make_shared<uint32_t>();
    d.compiler.pending.push_back(name);
  }
  // Runs twice: it enters the function, which returns to this very instruction for the results.
  return [=, entry = entry](Warp& w, Mask m) {
    auto move = [&](const std::vector<Move>& moves, Mask mask) {
      lanes(mask, [&](int l) {
        uint8_t* frame = w.local.data() + size_t(l) * w.program.local_bytes;
        for (const Move& x : moves) std::copy_n(frame + x.from, x.bytes, frame + x.to);
      });
    };
    Fragment& here = w.fragments.front();
    if (!here.stack.empty() && here.stack.back() >> 31) {  // the lanes come back, see `leave`
      here.stack.pop_back();
      move(out, m);
      return;
    }
    move(in, m);
    uint32_t self = here.pc - 1;
    w.jump(m, *entry);
    Fragment& jumped = m == w.fragments.front().mask ? w.fragments.front() : w.fragments.back();
    jumped.stack.push_back(self);
  };
}

static Run leave(const Decoder& d) {
  bool returns = d.parts[0] == "ret" && !d.compiler.current->entry;
  return [=](Warp& w, Mask m) {
    if (!returns) return w.leave(m);
    Fragment& here = w.fragments.front();
    uint32_t caller = here.stack.back();
    w.jump(m, caller);
    Fragment& jumped = m == w.fragments.front().mask ? w.fragments.front() : w.fragments.back();
    jumped.stack.back() |= 1u << 31;
  };
}

Run compile_control(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "bra") {
    uint32_t target = d.target(d.operand(0));
    return [=](Warp& w, Mask m) { w.jump(m, target); };
  }
  if (name == "ret" || name == "exit") return leave(d);
  if (name == "call") return call(d);
  if (name == "trap") return [](Warp&, Mask m) { throw Fault("trap", "trap", __builtin_ctz(m)); };
  if (name == "bar" || name == "barrier") return barrier(d);
  if (name == "membar" || name == "fence") {
    if (d.has("mbarrier_init")) return [](Warp&, Mask) {};
    return fence(d);
  }
  if (name == "shfl") return shuffle(d);
  if (name == "vote") return vote(d);
  if (name == "match") return type_bytes(d.type()) == 8 ? match<uint64_t>(d) : match<uint32_t>(d);
  if (name == "redux") return d.type() == "s32" ? reduce<int32_t>(d) : reduce<uint32_t>(d);
  if (name == "activemask") {
    Register to = d.write(0, 4);
    return [=](Warp& w, Mask m) { lanes(m, [&](int l) { w.at<uint32_t>(to)[l] = m; }); };
  }
  if (name == "elect") {
    std::vector<std::string> results = split(d.operand(0), '|');
    Register leader = d.write(results.at(0), 4), elected = d.write(results.at(1), 1),
             needed = d.read(1, 4);
    return [=](Warp& w, Mask m) {
      w.converge(m, w.at<uint32_t>(needed)[__builtin_ctz(m)], "elect.sync");
      lanes(m, [&](int l) {
        w.at<uint32_t>(leader)[l] = __builtin_ctz(m);
        w.at<uint8_t>(elected)[l] = l == __builtin_ctz(m);
      });
    };
  }
  if (name == "mov" && (d.operand(1) == "%clock" || d.operand(1) == "%clock64" ||
                        d.operand(1) == "%clock_lo" || d.operand(1) == "%globaltimer")) {
    uint32_t bytes = type_bytes(d.type());
    Register to = d.write(0, bytes);
    return [=](Warp& w, Mask m) {
      lanes(m, [&](int l) {
        if (bytes == 4)
          w.at<uint32_t>(to)[l] = uint32_t(w.block.steps);
        else
          w.at<uint64_t>(to)[l] = w.block.steps;
      });
    };
  }
  for (const char* hint : {"griddepcontrol", "setmaxnreg", "prefetch", "prefetchu", "nanosleep",
                           "pmevent", "discard", "applypriority"}) {
    if (name == hint) return [](Warp&, Mask) {};
  }
  return {};
}
