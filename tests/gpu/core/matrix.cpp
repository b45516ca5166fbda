// ldmatrix, stmatrix, mma.sync and wgmma.
//
// Fragments of mma.sync, wgmma: lane = 4 g + t. With e elements in a 32-bit register, register i of
// A holds row g + 8 (i & 1), columns e t + 4 e (i >> 1) and on; register i of B holds column g,
// rows e t + 4 e i and on; of C and D in fp32, registers 4 j .. 4 j + 3 hold (g, 8 j + 2 t), (g, ..
// + 1), (g + 8, ..), (g + 8, .. + 1).
#include <algorithm>

#include "access.h"

namespace {

Run load_matrix(const Decoder& d, bool store) {
  if (d.type() != "b16" || !d.has("m8n8")) d.unknown();
  const uint32_t n = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  const bool transposed = d.has("trans");
  std::vector<Register> values;
  for (const std::string& name : d.elements(store ? 1 : 0))
    values.push_back(store ? d.read(name, 4) : d.write(name, 4));
  if (values.size() != n) d.unknown("vector length");
  const Decoder::Address at = d.address(store ? 0 : 1);
  const bool generic = d.opcode().find("shared") == std::string::npos;
  return [=](Warp& w, Mask m) {
    w.converge(m, ~0u, store ? "stmatrix" : "ldmatrix");
    Shared& shared = w.block.shared;
    uint64_t rows[32];
    uint8_t matrices[32][16];
    auto element = [&](uint32_t i, int l, int j) {
      int row = l / 4, column = l % 4 * 2 + j;
      if (transposed) std::swap(row, column);
      return &matrices[8 * i + row][2 * column];
    };
    auto transfer = [&](auto move) {
      for (uint32_t i = 0; i < n; ++i) {
        for (int l = 0; l < 32; ++l) {
          for (int j = 0; j < 2; ++j) move(&w.at<uint16_t>(values[i])[2 * l + j], element(i, l, j));
        }
      }
    };
    if (store) transfer([](uint16_t* value, uint8_t* at) { std::memcpy(at, value, 2); });
    for (uint32_t l = 0; l < 8 * n; ++l) {
      rows[l] = (at.base.bytes == 4 ? w.at<uint32_t>(at.base)[l] : w.at<uint64_t>(at.base)[l]) +
                at.offset - (generic ? shared_window : 0);
      if (rows[l] >> 32) throw Fault("bounds", "shared address " + hex(rows[l]), l);
      if (store) {
        shared.write(w.observer, l, uint32_t(rows[l]), 16, matrices[l]);
        std::memcpy(shared.data() + rows[l], matrices[l], 16);
      } else {
        shared.read(w.observer, l, uint32_t(rows[l]), 16);
        std::memcpy(matrices[l], shared.data() + rows[l], 16);
      }
    }
    count_wavefronts(*w.block.current, n == 4 ? ~0u : (1u << 8 * n) - 1, rows, 16);
    if (!store) transfer([](uint16_t* value, uint8_t* at) { std::memcpy(value, at, 2); });
  };
}

// Formats of the operands: `register elements` per 32 bits, and their value in fp32.
struct Tf32 {
  uint32_t bits;
  operator float() const { return truncate_tf32(bits); }
};

template <class T>
constexpr int per_register = 4 / sizeof(T);

template <class T>
void gather_a(Warp& w, const std::vector<Register>& a, float (*out)[32]) {  // out[row][k]
  constexpr int e = per_register<T>;
  for (size_t i = 0; i < a.size(); ++i) {
    const T* x = w.at<T>(a[i]);
    for (int l = 0; l < 32; ++l) {
      for (int j = 0; j < e; ++j)
        out[l / 4 + 8 * (i & 1)][l % 4 * e + j + 4 * e * (i >> 1)] = x[l * e + j];
    }
  }
}

template <class T>
void gather_b(Warp& w, const std::vector<Register>& b, float (*out)[8]) {  // out[k][column]
  constexpr int e = per_register<T>;
  for (size_t i = 0; i < b.size(); ++i) {
    const T* x = w.at<T>(b[i]);
    for (int l = 0; l < 32; ++l) {
      for (int j = 0; j < e; ++j) out[l % 4 * e + j + 4 * e * i][l / 4] = x[l * e + j];
    }
  }
}

// Accumulators as fp32 out[row][column], column block j of 8.
template <class Move>
void each_accumulator(size_t blocks, Move move) {
  for (size_t j = 0; j < blocks; ++j) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i)
        move(4 * j + i, l, l / 4 + 8 * (i >> 1), 8 * j + l % 4 * 2 + (i & 1));
    }
  }
}

struct Accumulators {
  std::vector<Register> registers;
  bool half;
  float get(Warp& w, size_t i, int l) const {
    return half ? float(w.at<Half>(registers[i / 2])[2 * l + i % 2]) : w.at<float>(registers[i])[l];
  }
  void set(Warp& w, size_t i, int l, float x) const {
    if (half)
      w.at<Half>(registers[i / 2])[2 * l + i % 2] = Half(x);
    else
      w.at<float>(registers[i])[l] = x;
  }
};

std::vector<Register> registers_of(const Decoder& d, size_t operand, size_t count, bool write) {
  std::vector<Register> out;
  for (const std::string& name : d.elements(operand))
    out.push_back(write ? d.write(name, 4) : d.read(name, 4));
  if (out.size() != count)
    d.unknown("operand " + std::to_string(operand) + " needs " + std::to_string(count) +
              " registers");
  return out;
}

struct Shape {
  int m = 0, n = 0, k = 0;
};

Shape shape_of(const Decoder& d) {
  for (const std::string& part : d.parts) {
    Shape s;
    if (std::sscanf(part.c_str(), "m%dn%dk%d", &s.m, &s.n, &s.k) == 3) return s;
  }
  d.unknown("shape");
}

template <class T>
Run multiply_16x8(const Decoder& d, int k) {
  constexpr int e = per_register<T>;
  const bool half = d.types.back() == "f16";
  if ((d.type(0) == "f16") != half) d.unknown("accumulators");
  const std::vector<Register> a = registers_of(d, 1, std::max(2 * k / (4 * e), 1), false),
                              b = registers_of(d, 2, k / (4 * e), false);
  const Accumulators in{registers_of(d, 3, half ? 2 : 4, false), half},
      out{registers_of(d, 0, half ? 2 : 4, true), half};
  return [=](Warp& w, Mask m) {
    w.converge(m, ~0u, "mma.sync");
    float x[16][32], y[32][8], sum[16][8];
    gather_a<T>(w, a, x);
    gather_b<T>(w, b, y);
    each_accumulator(
        1, [&](size_t i, int l, int row, int column) { sum[row][column] = in.get(w, i, l); });
    for (int row = 0; row < 16; ++row) {
      for (int i = 0; i < k; ++i) {
        for (int column = 0; column < 8; ++column) sum[row][column] += x[row][i] * y[i][column];
      }
    }
    each_accumulator(
        1, [&](size_t i, int l, int row, int column) { out.set(w, i, l, sum[row][column]); });
  };
}

Run multiply_double(const Decoder& d) {  // m8n8k4
  Register a = d.read(d.elements(1).at(0), 8), b = d.read(d.elements(2).at(0), 8);
  std::vector<Register> in, out;
  for (const std::string& name : d.elements(3)) in.push_back(d.read(name, 8));
  for (const std::string& name : d.elements(0)) out.push_back(d.write(name, 8));
  return [=](Warp& w, Mask m) {
    w.converge(m, ~0u, "mma.sync");
    double sum[2][32];
    for (int l = 0; l < 32; ++l) {
      for (int j = 0; j < 2; ++j) {
        sum[j][l] = w.at<double>(in.at(j))[l];
        for (int k = 0; k < 4; ++k)
          sum[j][l] = std::fma(w.at<double>(a)[l / 4 * 4 + k],
                               w.at<double>(b)[(l % 4 * 2 + j) * 4 + k], sum[j][l]);
      }
    }
    for (int j = 0; j < 2; ++j) std::copy_n(sum[j], 32, w.at<double>(out.at(j)));
  };
}

Run multiply(const Decoder& d) {
  const Shape s = shape_of(d);
  if (d.parts.at(1) != "sync" || !d.has("row") || !d.has("col") || d.has("sp")) d.unknown();
  if (s.m == 8 && s.n == 8 && s.k == 4 && d.type() == "f64") return multiply_double(d);
  if (s.m != 16 || s.n != 8 || d.types.size() != 4) d.unknown("shape");
  const std::string &a = d.types[1], &b = d.types[2];
  if (a != b) d.unknown("operand types");
  if (a == "bf16" && (s.k == 8 || s.k == 16)) return multiply_16x8<BFloat>(d, s.k);
  if (a == "f16" && (s.k == 8 || s.k == 16)) return multiply_16x8<Half>(d, s.k);
  if (a == "tf32" && (s.k == 4 || s.k == 8)) return multiply_16x8<Tf32>(d, s.k);
  d.unknown("shape or type");
}

// ---- wgmma

// An operand in shared memory, described by 64 bits: start, leading and stride byte offsets in
// units of 16, swizzle mode. Its elements lie in core matrices of 8 rows of 16 bytes; swizzling
// exchanges the 16-byte chunks of a row.
struct Tile {
  uint32_t start, leading, stride;
  int swizzle;  // bits of the chunk number that are exchanged: 0, 1, 2, 3

  explicit Tile(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzle(int(4 - (descriptor >> 62)) % 4) {
    if (descriptor >> 49 & 7) throw Fault("wgmma", "a matrix base offset other than 0");
  }
  // The address of the 16-byte chunk that holds element (row, column 0 of the chunk); K-major: rows
  // along M or N, columns along K.
  uint32_t k_major(int row, int chunk) const {
    uint32_t row_bytes = 16u << swizzle;
    uint32_t at =
        start + row / 8 * stride + row % 8 * row_bytes + (swizzle ? chunk * 16 : chunk * leading);
    return swizzled(at);
  }
  // Chunk along M or N, row along K.
  uint32_t mn_major(int k, int chunk) const {
    uint32_t at;
    if (swizzle) {
      const int width = 1 << swizzle;  // chunks in a swizzle row
      at = start + chunk / width * leading + chunk % width * 16 + k / 8 * stride +
           k % 8 * (16u << swizzle);
    } else {
      at = start + chunk * stride + k / 8 * leading + k % 8 * 16;
    }
    return swizzled(at);
  }
  uint32_t swizzled(uint32_t at) const { return at ^ ((at >> 7 & ((1u << swizzle) - 1)) << 4); }
};

struct Wgmma {
  int n, k;
  Accumulators d;
  std::vector<Register> a;
  Register a_descriptor, b_descriptor, scale_d;
  float sign_a, sign_b;
  bool a_from_shared, a_transposed, b_transposed;
  std::string shape;
};

// Reads a [rows, k] operand from shared memory into out[row * stride_row + kk * stride_k], noting
// what it reads.
template <class T>
void read_tile(Warp& w, const Tile& tile, int first_row, int rows, int k, bool mn_major, float* out,
               int stride_row, int stride_k, Multiplication& held) {
  constexpr int e = 16 / sizeof(T);
  Shared& shared = w.block.shared;
  auto chunk = [&](uint32_t at) {
    shared.read(w.observer, Shared::many_lanes, at, 16, true);
    shared.begin_async_read(at, 16);
    held.shared.push_back({at, 16});
    return reinterpret_cast<const T*>(shared.data() + at);
  };
  if (mn_major) {
    for (int kk = 0; kk < k; ++kk) {
      for (int c = 0; c < rows / e; ++c) {
        const T* x = chunk(tile.mn_major(kk, first_row / e + c));
        for (int j = 0; j < e; ++j) out[(c * e + j) * stride_row + kk * stride_k] = x[j];
      }
    }
    return;
  }
  for (int row = 0; row < rows; ++row) {
    for (int c = 0; c < k / e; ++c) {
      const T* x = chunk(tile.k_major(first_row + row, c));
      for (int j = 0; j < e; ++j) out[row * stride_row + (c * e + j) * stride_k] = x[j];
    }
  }
}

template <class T>
void run_wgmma(const Wgmma& g, Warp& w, Mask m) {
  w.converge(m, ~0u, "wgmma.mma_async");
  Multiplication held;
  held.shape = g.shape;
  held.registers = g.d.registers;
  held.registers.insert(held.registers.end(), g.a.begin(), g.a.end());
  for (Register r : held.registers) {
    if (w.stale[r.offset / 64])
      throw Fault("wgmma", "a register of this wgmma was written with no wgmma.fence since");
  }
  for (const auto& group : w.multiplications) {
    for (const Multiplication& other : group) {
      for (Register r : g.d.registers) {
        for (Register q : other.registers) {
          if (q.offset == r.offset && other.shape != g.shape)
            throw Fault("wgmma", "accumulators still held by a wgmma of another shape");
        }
      }
    }
  }
  static thread_local float x[64 * 32], y[32 * 256], sum[16 * 256];  // a[row][k], b[k][column]
  const int n = g.n, k = g.k;
  if (g.a_from_shared) {
    read_tile<T>(w, Tile(w.at<uint64_t>(g.a_descriptor)[0]), 16 * (w.observer.id % 4), 16, k,
                 g.a_transposed, x, 32, 1, held);
  } else {
    gather_a<T>(w, g.a, reinterpret_cast<float (*)[32]>(x));
  }
  read_tile<T>(w, Tile(w.at<uint64_t>(g.b_descriptor)[0]), 0, n, k, g.b_transposed, y, 1, 256,
               held);
  const bool adds = w.at<uint8_t>(g.scale_d)[0] & 1;
  const float sign = g.sign_a * g.sign_b;
  std::fill_n(sum, 16 * 256, 0.0f);
  if (adds)
    each_accumulator(n / 8, [&](size_t i, int l, int row, int column) {
      sum[row * 256 + column] = g.d.get(w, i, l);
    });
  for (int row = 0; row < 16; ++row) {
    for (int i = 0; i < k; ++i) {
      const float a = sign * x[row * 32 + i];
      for (int column = 0; column < n; ++column) sum[row * 256 + column] += a * y[i * 256 + column];
    }
  }
  each_accumulator(n / 8, [&](size_t i, int l, int row, int column) {
    g.d.set(w, i, l, sum[row * 256 + column]);
  });
  for (Register r : held.registers) ++w.held[r.offset / 64];
  w.multiplications.back().push_back(std::move(held));
}

Run warpgroup(const Decoder& d) {
  d.compiler.program.uses_wgmma = true;
  const std::string& op = d.parts.at(1);
  if (op == "fence") {
    return [](Warp& w, Mask m) {
      w.converge(m, ~0u, "wgmma.fence");
      std::fill(w.stale.begin(), w.stale.end(), 0);
    };
  }
  if (op == "commit_group") {
    return [](Warp& w, Mask m) {
      w.converge(m, ~0u, "wgmma.commit_group");
      w.multiplications.emplace_back();
    };
  }
  if (op == "wait_group") {
    const size_t pending = size_t(d.immediate(0));
    return [=](Warp& w, Mask m) {
      w.converge(m, ~0u, "wgmma.wait_group");
      auto& groups = w.multiplications;  // the last is open and not waited for
      while (groups.size() - 1 > pending) {
        for (const Multiplication& x : groups.front()) {
          for (Register r : x.registers) --w.held[r.offset / 64];
          for (auto [address, bytes] : x.shared)
            w.block.shared.end_async_read(w.observer, address, int(bytes));
        }
        groups.erase(groups.begin());
      }
    };
  }
  if (op != "mma_async" || d.has("sp")) d.unknown();
  const Shape s = shape_of(d);
  const std::string type = d.type(1);
  const bool half = d.type(0) == "f16";
  if (s.m != 64 || s.n % 8 || s.n > 256 || d.type(2) != type) d.unknown("shape");
  Wgmma g{};
  g.n = s.n, g.k = s.k;
  g.shape = d.opcode();
  g.d = {registers_of(d, 0, size_t(s.n / (half ? 4 : 2)), true), half};
  g.a_from_shared = d.operand(1)[0] != '{';
  if (g.a_from_shared)
    g.a_descriptor = d.read(1, 8);
  else
    g.a = registers_of(d, 1, 4, false);
  g.b_descriptor = d.read(2, 8);
  g.scale_d = d.read(3, 1);
  size_t next = 4;
  g.sign_a = float(d.immediate(next++));
  g.sign_b = float(d.immediate(next++));
  const bool sixteen = type == "f16" || type == "bf16";
  if (sixteen) {
    if (g.a_from_shared) g.a_transposed = d.immediate(next++);
    g.b_transposed = d.immediate(next++);
  }
  if (s.k != (sixteen ? 16 : 8)) d.unknown("shape");
  auto run = type == "bf16"   ? run_wgmma<BFloat>
             : type == "f16"  ? run_wgmma<Half>
             : type == "tf32" ? run_wgmma<Tf32>
                              : nullptr;
  if (!run) d.unknown("operand types");
  return [=](Warp& w, Mask m) { run(g, w, m); };
}

}  // namespace

Run compile_matrix(const Decoder& d) {
  const std::string& name = d.parts[0];
  if (name == "ldmatrix") return load_matrix(d, false);
  if (name == "stmatrix") return load_matrix(d, true);
  if (name == "mma") return multiply(d);
  if (name == "wgmma") return warpgroup(d);
  return {};
}
