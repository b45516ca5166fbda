// The addresses of an instruction's lanes: their space, whether they are allowed, what they cost.
#include "access.h"

#include <algorithm>

namespace {

constexpr uint64_t window_mask = 0xffull << 56;

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

Target target_of(const Decoder& d, size_t operand) {
  Decoder::Address a = d.address(operand);
  return {space_of(d, a), a.base, a.offset};
}

Access::Access(Warp& w, Mask mask, const Target& t, int bytes, Use use, const uint8_t* values)
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

Access::Access(Warp& w, Mask mask, const Target& t) : space(t.space) { evaluate(w, mask, t); }

void Access::evaluate(Warp& w, Mask mask, const Target& t) {
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

void Access::global(Mask mask, int bytes, Use use) {
  Heap::instance().access(mask, address, bytes, use);
  for (Mask m = mask; m; m &= m - 1)
    at[__builtin_ctz(m)] = reinterpret_cast<uint8_t*>(address[__builtin_ctz(m)]);
}

void Access::shared(Warp& w, Mask mask, int bytes, Use use, const uint8_t* values) {
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

void Access::local(Warp& w, Mask mask, int bytes) {
  const uint64_t size = w.program.local_bytes;
  for (Mask m = mask; m; m &= m - 1) {
    int l = __builtin_ctz(m);
    if (address[l] + bytes > size || address[l] % bytes)
      throw Fault("bounds", "local address " + hex(address[l]), l);
    at[l] = w.local.data() + l * size + address[l];
  }
}

void Access::param(Warp& w, Mask mask, int bytes, Use use) {
  if (use != Use::read)
    throw Fault("bounds", "write to a kernel's parameters", __builtin_ctz(mask));
  for (Mask m = mask; m; m &= m - 1) {
    int l = __builtin_ctz(m);
    if (address[l] + bytes > w.program.param_bytes)
      throw Fault("bounds", "parameter address " + hex(address[l]), l);
    at[l] = w.block.params.data() + address[l];
  }
}

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
