// Where an instruction reads or writes memory: the addresses of its lanes, checked and counted.
#pragma once
#include "compiler.h"

enum class Space { generic, global, shared, local, param };

struct Target {
  Space space;
  Register base;
  int64_t offset;
};

Target target_of(const Decoder& d, size_t operand);

// Evaluates the addresses of a warp, resolves a generic space, checks and counts; gives host
// pointers.
struct Access {
  uint8_t* at[32];
  uint64_t address[32];
  Space space;

  // `values`: what a store brings, `bytes` for each lane.
  Access(Warp& w, Mask mask, const Target& t, int bytes, Use use, const uint8_t* values = nullptr);

  // Addresses only, with the space resolved.
  Access(Warp& w, Mask mask, const Target& t);

 private:
  void evaluate(Warp& w, Mask mask, const Target& t);
  void global(Mask mask, int bytes, Use use);
  void shared(Warp& w, Mask mask, int bytes, Use use, const uint8_t* values);
  void local(Warp& w, Mask mask, int bytes);
  void param(Warp& w, Mask mask, int bytes, Use use);
};

// Counts the wavefronts of a shared-memory access: lanes go in groups which together move 128
// bytes, and within a group each of the 32 banks serves one 4-byte word a wavefront.
void count_wavefronts(Instruction& i, Mask mask, const uint64_t* address, int bytes);
