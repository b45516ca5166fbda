// Statements to instructions, and their operands.
#include "compiler.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>

Compiler::Compiler(Program& program) : program(program), module(program.module) {
  for (const Variable& v : module.globals) variables[v.name] = v;
  auto place = [](Variable v, uint32_t& end) {
    end = (end + v.align - 1) / v.align * v.align;
    v.address = end;
    end += v.bytes;
    return v;
  };
  for (const Variable& v : module.shared) {
    if (v.bytes) variables[v.name] = place(v, program.static_shared);
  }
  for (const Variable& v : program.entry.locals) {
    if (v.space == "shared") variables[v.name] = place(v, program.static_shared);
  }
  for (Variable v : module.shared) {  // dynamic shared memory follows what is static
    if (v.bytes) continue;
    program.static_shared = (program.static_shared + 15) / 16 * 16;
    v.address = program.static_shared;
    variables[v.name] = v;
  }
  for (const Variable& v : program.entry.parameters) {
    Variable placed = place(v, program.param_bytes);
    placed.space = "param";
    variables[v.name] = placed;
  }
  for (const char* axis : {"x", "y", "z"}) {
    for (const char* stem : {"%tid.", "%ntid.", "%ctaid.", "%nctaid."})
      special(stem + std::string(axis), 4);
  }
  for (const char* name :
       {"%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%lanemask_eq", "%lanemask_lt",
        "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size",
        "%cluster_ctarank", "%cluster_nctarank", "%clusterid.x", "%nclusterid.x",
        "%cluster_ctaid.x", "%gridid"}) {
    special(name, 4);
  }
  special("%carry", 1);
  function(program.entry);
  while (!pending.empty()) {
    std::string name = pending.back();
    pending.pop_back();
    function(module.functions.at(name));
  }
}

Register Compiler::allocate(uint32_t bytes) {
  Register r{program.register_bytes, bytes};
  program.register_bytes += std::max<uint32_t>(32 * bytes, 64);
  return r;
}

Register Compiler::constant(uint64_t bits, uint32_t bytes) {
  auto [entry, fresh] = constants.try_emplace({bits, bytes});
  if (fresh) {
    entry->second = allocate(bytes);
    std::vector<uint8_t> data(32 * bytes);
    for (size_t i = 0; i < 32; ++i)
      std::memcpy(&data[i * bytes], &bits, std::min<uint32_t>(bytes, 8));
    program.constants.emplace_back(entry->second.offset, data);
  }
  return entry->second;
}

void Compiler::special(const std::string& name, uint32_t bytes) {
  program.specials[name] = allocate(bytes);
}

void Compiler::function(const Function& f) {
  current = &f;
  registers.clear();
  for (const auto& [name, bytes] : f.registers) registers[name] = allocate(bytes);
  auto local = [&](const Variable& v) {
    Variable placed = v;
    placed.space = "local";
    program.local_bytes = (program.local_bytes + v.align - 1) / v.align * v.align;
    placed.address = program.local_bytes;
    program.local_bytes += v.bytes;
    variables[v.name] = placed;
  };
  for (const Variable& v : f.locals) {
    if (v.space != "shared") local(v);
  }
  base = program.code.size();
  std::shared_ptr<uint32_t>& entry = entries[f.name];
  if (!entry) entry = std::make_shared<uint32_t>();
  *entry = base;
  program.code.resize(base + f.body.size() + 1);
  for (size_t i = 0; i < f.body.size(); ++i) instruction(f.body[i], program.code[base + i]);
  static const Statement end{"", "ret", {}, "ret (the end of the function)", 0, 0};
  instruction(end, program.code.back());
}

void Compiler::declare_formals(
    const Function& f) {  // of a called function: static, as PTX code does not recurse here
  for (const auto* list : {&f.results, &f.parameters}) {
    for (Variable v : *list) {
      if (variables.count(v.name)) continue;
      program.local_bytes = (program.local_bytes + v.align - 1) / v.align * v.align;
      v.address = program.local_bytes;
      v.space = "local";
      program.local_bytes += v.bytes;
      variables[v.name] = v;
    }
  }
}

void Compiler::instruction(const Statement& s, Instruction& out) {
  out.text = s.text;
  out.opcode = s.opcode;
  out.file = s.file;
  out.line = s.line;
  Decoder d{s, split(s.opcode, '.'), {}, out, *this};
  for (size_t i = 1; i < d.parts.size(); ++i) {
    if (type_bytes(d.parts[i])) d.types.push_back(d.parts[i]);
  }
  if (!s.guard.empty()) {
    out.guard_negated = s.guard[0] == '!';
    out.guard = d.any_read(s.guard.substr(out.guard_negated), 1);
  }
  for (auto* compile :
       {compile_control, compile_integers, compile_floats, compile_bits, compile_comparison,
        compile_conversion, compile_data, compile_copies, compile_matrix}) {
    if ((out.run = compile(d))) return;
  }
  d.unknown();
}

Program::Program(const Module& module, const Function& entry) : module(module), entry(entry) {
  Compiler compiler(*this);
  static const std::set<std::string> gathering = {
      "bar",      "barrier",  "shfl", "vote",  "match", "redux", "elect",
      "ldmatrix", "stmatrix", "mma",  "wgmma", "ret",   "exit"};
  for (Instruction& i : code) i.gathers = gathering.count(i.opcode.substr(0, i.opcode.find('.')));
}

const std::string& Decoder::operand(size_t i) const {
  if (i >= statement.operands.size()) unknown("too few operands");
  return statement.operands[i];
}

bool Decoder::has(const char* part) const {
  return std::find(parts.begin(), parts.end(), part) != parts.end();
}

std::string Decoder::type(size_t i) const { return i < types.size() ? types[i] : ""; }

void Decoder::unknown(const std::string& why) const {
  throw Fault("unknown",
              "unknown instruction: " + statement.text + (why.empty() ? "" : " (" + why + ")"));
}

Register Decoder::any_read(const std::string& text, uint32_t bytes, const std::string& type) const {
  auto named = compiler.registers.find(text);
  if (named != compiler.registers.end()) {
    out.reads.push_back(named->second);
    return named->second;
  }
  auto special = compiler.program.specials.find(text);
  if (special != compiler.program.specials.end()) return special->second;
  auto variable = compiler.variables.find(text.substr(0, text.find('+')));
  if (variable != compiler.variables.end()) {
    uint64_t value = variable->second.address;
    if (text.find('+') != std::string::npos) value += std::stoll(text.substr(text.find('+') + 1));
    return compiler.constant(value, bytes);
  }
  if (text == "WARP_SZ") return compiler.constant(32, bytes);
  if (text.empty() || text[0] == '%' || !(std::isdigit(text[0]) || text[0] == '-'))
    unknown("operand " + text);
  try {
    uint64_t bits = parse_bits(text, type);
    return compiler.constant(bytes < 8 ? bits & ((1ull << 8 * bytes) - 1) : bits, bytes);
  } catch (const std::logic_error&) {
    unknown("operand " + text);
  }
}

Register Decoder::read(const std::string& text, uint32_t bytes, const std::string& type) const {
  Register r = any_read(text, bytes, type);
  if (r.bytes != bytes)
    unknown("operand " + text + " has " + std::to_string(8 * r.bytes) + " bits");
  return r;
}

Register Decoder::any_write(const std::string& text, uint32_t bytes) const {
  if (text == "_") return compiler.allocate(bytes);
  auto named = compiler.registers.find(text);
  if (named == compiler.registers.end()) unknown("destination " + text);
  out.writes.push_back(named->second);
  return named->second;
}

Register Decoder::write(const std::string& text, uint32_t bytes) const {
  Register r = any_write(text, bytes);
  if (r.bytes != bytes)
    unknown("destination " + text + " has " + std::to_string(8 * r.bytes) + " bits");
  return r;
}

std::vector<std::string> Decoder::elements(size_t i) const {
  const std::string& text = operand(i);
  if (text[0] != '{') return {text};
  return split_operands(text.substr(1, text.rfind('}') - 1));
}

Decoder::Address Decoder::address(size_t i) const {
  std::string text = operand(i);
  if (text[0] != '[') unknown("address " + text);
  text = trim(text.substr(1, text.rfind(']') - 1));
  size_t plus = text.find_first_of("+");
  std::string name = trim(text.substr(0, plus));
  int64_t offset =
      plus == std::string::npos ? 0 : int64_t(parse_bits(trim(text.substr(plus + 1)), ""));
  auto variable = compiler.variables.find(name);
  std::string space = variable == compiler.variables.end() ? "" : variable->second.space;
  Register base = any_read(name, 8);
  if (base.bytes != 4 && base.bytes != 8) unknown("address " + text);
  return {base, offset, space};
}

int64_t Decoder::immediate(size_t i) const {
  try {
    return int64_t(parse_bits(operand(i), ""));
  } catch (const std::logic_error&) {
    unknown("operand " + operand(i) + " must be a number");
  }
}

Round Decoder::rounding(Round otherwise) const {
  if (has("rn") || has("rni")) return Round::nearest;
  if (has("rz") || has("rzi")) return Round::zero;
  if (has("rm") || has("rmi")) return Round::down;
  if (has("rp") || has("rpi")) return Round::up;
  if (has("rna")) return Round::away;
  return otherwise;
}

size_t Decoder::target(const std::string& label) const {
  auto found = compiler.current->labels.find(label);
  if (found == compiler.current->labels.end()) unknown("label " + label);
  return compiler.base + found->second;
}
