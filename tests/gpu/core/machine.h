// The machine: a PTX module, compiled to closures, and the warps that run it.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "text.h"

struct Warp;
struct Block;

// What an instruction does: any function object of (Warp&, Mask). Smaller to compile than
// std::function.
class Run {
 public:
  Run() = default;
  template <class F>
  Run(F f) : body_(new Of<F>(std::move(f))) {}
  explicit operator bool() const { return bool(body_); }
  void operator()(Warp& warp, Mask mask) const { body_->run(warp, mask); }

 private:
  struct Body {
    virtual ~Body() = default;
    virtual void run(Warp& warp, Mask mask) = 0;
  };
  template <class F>
  struct Of final : Body {
    explicit Of(F f) : f(std::move(f)) {}
    void run(Warp& warp, Mask mask) override { f(warp, mask); }
    F f;
  };
  std::unique_ptr<Body> body_;
};

// A register holds one value for each of 32 lanes, at this offset of the warp's register file.
struct Register {
  uint32_t offset = 0;
  uint32_t bytes = 0;  // of one lane
};

struct Instruction {
  std::string text, opcode;
  int file = 0, line = 0;
  std::optional<Register> guard;
  bool guard_negated = false;
  bool gathers = false;  // lanes of a warp wait at it for the others
  std::vector<Register> reads, writes;
  Run run;
  uint64_t executed = 0, wavefronts = 0, ideal_wavefronts = 0;
};

// ---- PTX text

struct Statement {
  std::string guard, opcode;  // guard: "", "%p1" or "!%p1"
  std::vector<std::string> operands;
  std::string text;
  int file = 0, line = 0;
};

struct Variable {
  std::string name, space;
  uint64_t align = 1, bytes = 0;
  std::vector<uint8_t> initial;
  uint64_t address = 0;
};

struct Function {
  std::string name;
  bool entry = false;
  std::vector<Variable> results, parameters,
      locals;  // locals: .shared, .local and .param variables of the body
  std::map<std::string, uint32_t> registers;  // name -> bytes; scopes are resolved by renaming
  std::vector<Statement> body;
  std::map<std::string, size_t> labels;
  uint32_t required_threads = 0, max_threads = 1024;
};

struct Program;

struct Module {
  explicit Module(const std::string& text);
  ~Module();
  std::vector<Variable> globals;  // .global and .const: address is that of `storage`
  std::vector<Variable> shared;   // module-scope .shared, sized or extern
  std::map<std::string, Function> functions;
  std::map<int, std::string> files;
  std::map<std::string, std::unique_ptr<Program>> programs;
  std::vector<std::vector<uint64_t>> storage;
};

// An entry and the functions it calls, ready to run.
struct Program {
  Program(const Module& module, const Function& entry);
  const Module& module;
  const Function& entry;
  std::vector<Instruction> code;
  uint32_t register_bytes = 0, local_bytes = 0, static_shared = 0, param_bytes = 0;
  std::vector<std::pair<uint32_t, std::vector<uint8_t>>> constants;  // offset, 32 lanes
  std::map<std::string, Register> specials;
  bool uses_wgmma = false;
};

// Compiles one statement: hands out its operands.
struct Decoder {
  const Statement& statement;
  std::vector<std::string> parts;  // opcode split at its dots
  std::vector<std::string> types;  // those parts that are types
  Instruction& out;
  struct Compiler& compiler;

  const std::string& opcode() const { return statement.opcode; }
  size_t operands() const { return statement.operands.size(); }
  const std::string& operand(size_t i) const;
  bool has(const char* part) const;
  std::string type(size_t i = 0) const;
  Register read(size_t i, uint32_t bytes, const std::string& type = "") const {
    return read(operand(i), bytes, type);
  }
  Register read(const std::string& text, uint32_t bytes, const std::string& type = "") const;
  Register write(size_t i, uint32_t bytes) const { return write(operand(i), bytes); }
  Register write(const std::string& text, uint32_t bytes) const;
  Register any_read(const std::string& text, uint32_t bytes, const std::string& type = "") const;
  Register any_write(const std::string& text, uint32_t bytes) const;
  std::vector<std::string> elements(size_t i) const;  // of {a, b, c}, or the operand alone
  struct Address {
    Register base;
    int64_t offset;
    std::string space;  // of the variable it names, else ""
  };
  Address address(size_t i) const;
  int64_t immediate(size_t i) const;
  Round rounding(Round otherwise = Round::nearest) const;
  size_t target(const std::string& label) const;
  [[noreturn]] void unknown(const std::string& why = "") const;
};

// Each returns an empty Run for an opcode that is not its own.
Run compile_control(const Decoder& d);
Run compile_integers(const Decoder& d);
Run compile_floats(const Decoder& d);
Run compile_bits(const Decoder& d);
Run compile_comparison(const Decoder& d);
Run compile_conversion(const Decoder& d);
Run compile_data(const Decoder& d);
Run compile_copies(const Decoder& d);
Run compile_matrix(const Decoder& d);

// ---- execution

struct Fragment {  // lanes at one program counter
  uint32_t pc;
  Mask mask;
  std::vector<uint32_t> stack;
};

struct Copy {  // a cp.async of one lane
  int lane;
  uint32_t to, bytes, given;
  uint64_t from;
  uint32_t group;
  bool done;
};

struct Multiplication {  // a wgmma.mma_async in flight: what it holds
  std::vector<Register> registers;
  std::vector<std::pair<uint32_t, uint32_t>> shared;  // address, bytes
  std::string shape;
};

struct Warp {
  Block& block;
  Program& program;
  Observer observer;
  Mask live, exited = 0;
  std::vector<Fragment> fragments;  // the first one runs: see step
  std::vector<uint8_t> registers, local;
  bool waiting = false;

  std::vector<Copy> copies;
  std::array<uint32_t, 32> group{};

  std::vector<std::vector<Multiplication>> multiplications{1};  // the last group is open
  std::vector<uint8_t> held,
      stale;  // per 32 bytes of registers: by how many wgmma; written since wgmma.fence
  std::string last_shape;

  Warp(Block& block, Program& program, int id, Mask live);
  template <class T>
  T* at(Register r) {
    return reinterpret_cast<T*>(registers.data() + r.offset);
  }
  Mask predicate(Register r) {
    const uint64_t* p = at<uint64_t>(r);
    Mask mask = 0;
    for (int i = 0; i < 4; ++i)
      mask |= Mask((p[i] & 0x0101010101010101u) * 0x0102040810204080u >> 56) << 8 * i;
    return mask;
  }
  void step();
  void jump(Mask mask, uint32_t target);
  void leave(Mask mask);
  void converge(Mask mask, Mask needed, const char* what) const;
  void complete_copies(Mask mask, uint32_t pending_groups);
  void check_held(const Instruction& instruction);
};

struct MBarrier {
  uint32_t expected, pending, phase = 0;
  int64_t transactions = 0;
  Clocks seen, fenced;
};

struct BulkCopy {
  uint32_t shared, bytes, barrier;
  uint64_t global;
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  std::vector<Warp*> waiting, participants;
};

struct Block {
  Program& program;
  uint32_t grid[3], size[3], index[3];
  uint64_t linear;
  Shared shared;
  std::vector<uint8_t>& params;
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<uint32_t, Barrier> barriers;
  std::map<uint32_t, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk;
  Observer async;
  std::mt19937_64& random;
  uint64_t steps = 0, idle = 0;
  Instruction* current = nullptr;

  void run(uint64_t limit);
  void arrive(Warp& warp, uint32_t id, uint32_t threads, bool wait);
  void advance(MBarrier& barrier);
  void land(size_t i);
};

template <class F>
inline void lanes(Mask mask, F f) {
  if (mask == ~Mask(0)) {
#pragma GCC ivdep
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}
