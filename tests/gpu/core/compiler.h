// Turns the statements of an entry, and of the functions it calls, into instructions.
#pragma once
#include "machine.h"

struct Compiler {
  explicit Compiler(Program& program);
  Register allocate(uint32_t bytes);
  Register constant(uint64_t bits, uint32_t bytes);
  void special(const std::string& name, uint32_t bytes);
  void function(const Function& f);
  void declare_formals(const Function& f);
  void instruction(const Statement& s, Instruction& out);

  Program& program;
  const Module& module;
  const Function* current = nullptr;
  size_t base = 0;  // of the current function's code
  std::map<std::string, Register> registers;
  std::map<std::string, Variable> variables;
  std::map<std::pair<uint64_t, uint32_t>, Register> constants;
  std::map<std::string, std::shared_ptr<uint32_t>> entries;  // first instruction of each function
  std::vector<std::string> pending;                          // functions called, not compiled yet
};
