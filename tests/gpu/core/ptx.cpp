// PTX text to statements, and statements to operands.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>

#include "compiler.h"

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t start = 0;
  for (size_t end; (end = text.find(separator, start)) != std::string::npos; start = end + 1) {
    parts.push_back(text.substr(start, end - start));
  }
  parts.push_back(text.substr(start));
  return parts;
}

static std::string trim(const std::string& text) {
  size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

uint32_t type_bytes(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2" || type == "tf32") return 4;
  size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos || digit == 0 ||
      type.find_first_not_of("0123456789", digit) != std::string::npos)
    return 0;
  std::string kind = type.substr(0, digit);
  if (kind != "b" && kind != "u" && kind != "s" && kind != "f" && kind != "bf") return 0;
  int bits = std::stoi(type.substr(digit));
  return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128 ? bits / 8 : 0;
}

// Splits at commas outside of braces, brackets and parentheses.
static std::vector<std::string> split_operands(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

static bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

static uint64_t parse_bits(const std::string& text, const std::string& type) {
  bool floating = !type.empty() && (type[0] == 'f' || type == "bf16" || type == "tf32");
  bool negative = text[0] == '-';
  std::string digits = negative ? trim(text.substr(1)) : text;
  if (digits.size() > 2 && digits[0] == '0' && std::strchr("fFdD", digits[1])) {
    uint64_t raw = std::stoull(digits.substr(2), nullptr, 16);
    bool single = std::tolower(digits[1]) == 'f';
    double value = single ? double(bit_cast<float>(uint32_t(raw))) : bit_cast<double>(raw);
    if (type == "f64") return single ? bit_cast<uint64_t>(negative ? -value : value) : raw;
    if (single) return negative ? raw ^ 0x80000000u : raw;
    return type == "f32" ? bit_cast<uint32_t>(float(value)) : raw;
  }
  if (floating && digits.find_first_of(".eE") != std::string::npos && digits.find("0x") != 0) {
    double value = std::stod(text);
    return type == "f64" ? bit_cast<uint64_t>(value) : bit_cast<uint32_t>(float(value));
  }
  while (!digits.empty() && std::toupper(digits.back()) == 'U') digits.pop_back();
  int base = digits.size() > 1 && digits[0] == '0' ? (std::tolower(digits[1]) == 'b' ? 2 : 0) : 10;
  uint64_t value = std::stoull(base == 2 ? digits.substr(2) : digits, nullptr, base);
  return negative ? -value : value;
}

namespace {

class Parser {
 public:
  Parser(Module& module, const std::string& text) : module_(module), text_(text) {
    strip_comments();
  }

  void parse() {
    while (skip(), at_ < text_.size()) {
      std::string word = peek_word();
      if (word == ".version" || word == ".target" || word == ".address_size") {
        line();
      } else if (word == ".file") {
        file(line());
      } else if (word == ".section") {
        at_ = text_.find('{', at_);
        balanced('{', '}');
      } else {
        declaration();
      }
    }
  }

 private:
  void strip_comments() {
    std::string out;
    for (size_t i = 0; i < text_.size(); ++i) {
      if (text_[i] == '/' && text_[i + 1] == '/') {
        i = std::min(text_.find('\n', i), text_.size() - 1);
      } else if (text_[i] == '/' && text_[i + 1] == '*') {
        i = text_.find("*/", i) + 1;
        continue;
      }
      out += text_[i];
    }
    text_ = out;
  }
  void skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  std::string peek_word() {
    skip();
    size_t end = at_;
    while (end < text_.size() && (is_name(text_[end]) || text_[end] == '.')) ++end;
    return text_.substr(at_, end - at_);
  }
  std::string word() {
    std::string w = peek_word();
    at_ += w.size();
    return w;
  }
  std::string line() {
    size_t end = std::min(text_.find('\n', at_), text_.size());
    std::string l = text_.substr(at_, end - at_);
    at_ = end;
    return l;
  }
  std::string balanced(char open, char close) {  // from the opening character: its inside
    size_t start = ++at_;
    for (int depth = 1; depth; ++at_) {
      if (at_ >= text_.size()) throw Fault("syntax", "unbalanced brackets");
      depth += (text_[at_] == open) - (text_[at_] == close);
    }
    return text_.substr(start, at_ - 1 - start);
  }
  void file(const std::string& l) {
    size_t open = l.find('"'), close = l.find('"', open + 1);
    if (open != std::string::npos)
      module_.files[std::stoi(l.substr(6))] = l.substr(open + 1, close - open - 1);
  }

  // ".param .align 8 .b8 name[32] = {...}" without the semicolon
  Variable variable(const std::string& text) {
    Variable v;
    uint32_t unit = 1;
    std::string head = text.substr(0, text.find('=')), type = "b8";
    std::vector<std::string> words;
    for (const std::string& w : split(trim(head), ' ')) {
      for (const std::string& x : split(w, '\t')) {
        if (!trim(x).empty()) words.push_back(trim(x));
      }
    }
    for (size_t i = 0; i < words.size(); ++i) {
      const std::string& w = words[i];
      if (w == ".align")
        v.align = std::stoul(words[++i]);
      else if (w == ".global" || w == ".const" || w == ".shared" || w == ".local" ||
               w == ".param") {
        if (v.space.empty()) v.space = w.substr(1);
      } else if (w[0] == '.') {
        if (uint32_t bytes = type_bytes(w.substr(1))) unit = bytes, type = w.substr(1);
      } else if (v.name.empty())
        v.name = w;
      else
        v.name += w;
    }
    v.bytes = unit;
    v.align = std::max<uint64_t>(v.align, unit);
    size_t bracket = v.name.find('[');
    if (bracket != std::string::npos) {
      for (const std::string& part : split(v.name.substr(bracket + 1), '[')) {
        std::string count = part.substr(0, part.find(']'));
        v.bytes *= count.empty() ? 0 : std::stoull(count);
      }
      v.name = v.name.substr(0, bracket);
    }
    size_t equals = text.find('=');
    if (equals != std::string::npos) {
      std::string list;
      for (char c : text.substr(equals + 1)) list += c == '{' || c == '}' ? ' ' : c;
      for (const std::string& item : split_operands(list)) {
        uint64_t bits = parse_bits(item, type);
        for (uint32_t i = 0; i < unit; ++i) v.initial.push_back(uint8_t(bits >> 8 * i));
      }
    }
    return v;
  }

  void declaration() {
    size_t start = at_;
    for (;;) {
      std::string w = word();
      if (w == ".entry" || w == ".func") return function(w == ".entry");
      if (w.empty() || w[0] != '.') break;
    }
    at_ = start;
    size_t end = text_.find(';', at_);
    if (end == std::string::npos)
      throw Fault("syntax", "declaration without an end: " + text_.substr(start, 60));
    Variable v = variable(text_.substr(at_, end - at_));
    at_ = end + 1;
    (v.space == "shared" ? module_.shared : module_.globals).push_back(v);
  }

  std::vector<Variable> parameter_list() {
    std::vector<Variable> list;
    for (const std::string& p : split_operands(balanced('(', ')'))) list.push_back(variable(p));
    return list;
  }

  void function(bool entry) {
    Function f;
    f.entry = entry;
    skip();
    if (text_[at_] == '(') f.results = parameter_list();
    f.name = word();
    skip();
    if (text_[at_] == '(') f.parameters = parameter_list();
    for (skip(); text_[at_] != '{' && text_[at_] != ';'; skip()) {
      std::string directive = word();
      std::string value = line();
      size_t brace = value.find_first_of("{;");
      if (brace != std::string::npos) at_ -= value.size() - brace, value = value.substr(0, brace);
      if (directive == ".reqntid" || directive == ".maxntid") {
        uint32_t threads = 1;
        for (const std::string& n : split(value, ',')) threads *= std::stoul(n);
        (directive == ".reqntid" ? f.required_threads : f.max_threads) = threads;
      } else if (directive.empty()) {
        throw Fault("syntax", "in the header of " + f.name);
      }
    }
    if (text_[at_] == ';') {
      ++at_;
      return;
    }
    body(f);
    module_.functions[f.name] = std::move(f);
  }

  // Names declared in an inner scope get a suffix, so that one map serves the function.
  struct Scope {
    std::map<std::string, std::string> names;
    std::map<std::string, int> counted;  // .reg .b32 %r<10> declares %r0 .. %r9
    std::string suffix;
  };

  std::string resolve(const std::vector<Scope>& scopes, const std::string& text) {
    if (scopes.size() == 1) return text;
    std::string out;
    for (size_t i = 0; i < text.size();) {
      if (!is_name(text[i]) || (i && text[i - 1] == '.')) {
        out += text[i++];
        while (i < text.size() && is_name(text[i]) && text[i - 1] == '.') out += text[i++];
        continue;
      }
      size_t end = i;
      while (end < text.size() && is_name(text[end])) ++end;
      std::string name = text.substr(i, end - i);
      for (size_t s = scopes.size(); s-- > 1;) {
        if (scopes[s].names.count(name)) {
          name = scopes[s].names.at(name);
          break;
        }
      }
      out += name;
      i = end;
    }
    return out;
  }

  void registers(Function& f, Scope& scope, const std::string& text) {
    std::string rest = trim(text.substr(4));
    size_t end = 1;
    while (end < rest.size() && is_name(rest[end])) ++end;
    uint32_t bytes = type_bytes(rest.substr(1, end - 1));
    if (!bytes) throw Fault("syntax", "register type in " + text);
    for (const std::string& name : split_operands(rest.substr(end))) {
      size_t angle = name.find('<');
      int count = angle == std::string::npos ? -1 : std::stoi(name.substr(angle + 1));
      std::string stem = trim(name.substr(0, angle));
      for (int i = 0; i < std::max(count, 1); ++i) {
        std::string plain = count < 0 ? stem : stem + std::to_string(i);
        f.registers[plain + scope.suffix] = bytes;
        if (!scope.suffix.empty()) scope.names[plain] = plain + scope.suffix;
      }
    }
  }

  void body(Function& f) {
    std::vector<Scope> scopes(1);
    int scope_count = 0, file_number = 0, line_number = 0;
    ++at_;
    for (;;) {
      skip();
      if (text_[at_] == '{') {
        ++at_;
        scopes.emplace_back();
        scopes.back().suffix = "#" + std::to_string(++scope_count);
        // labels may be used before their line: find those of this scope first
        size_t saved = at_, depth = 1;
        for (size_t i = at_; i < text_.size() && depth; ++i) {
          depth += (text_[i] == '{') - (text_[i] == '}');
          if (text_[i] == ':' && text_[i + 1] != ':' && depth == 1) {
            size_t begin = i;
            while (begin > saved && is_name(text_[begin - 1])) --begin;
            if (begin < i && text_[begin - 1] != ':' && text_[begin - 1] != '.') {
              std::string name = text_.substr(begin, i - begin);
              scopes.back().names[name] = name + scopes.back().suffix;
            }
          }
        }
        continue;
      }
      if (text_[at_] == '}') {
        ++at_;
        scopes.pop_back();
        if (scopes.empty()) return;
        continue;
      }
      if (text_[at_] == ';') {
        ++at_;
        continue;
      }
      std::string first = peek_word();
      if (first == ".loc") {
        std::string l = line();
        std::sscanf(l.c_str(), ".loc %d %d", &file_number, &line_number);
        continue;
      }
      size_t after = at_ + first.size();
      if (!first.empty() && text_[after] == ':' && text_[after + 1] != ':') {
        f.labels[resolve(scopes, first)] = f.body.size();
        at_ = after + 1;
        continue;
      }
      size_t end = text_.find(';', at_);
      std::string text = trim(text_.substr(at_, end - at_));
      at_ = end + 1;
      if (first == ".reg") {
        registers(f, scopes.back(), text);
      } else if (first == ".local" || first == ".shared" || first == ".param") {
        Variable v = variable(text);
        if (scopes.size() > 1) {
          scopes.back().names[v.name] = v.name + scopes.back().suffix;
          v.name += scopes.back().suffix;
        }
        f.locals.push_back(v);
      } else if (first == ".pragma" || first == ".callprototype") {
        continue;
      } else {
        f.body.push_back(statement(resolve(scopes, text), text, file_number, line_number));
      }
    }
  }

  Statement statement(const std::string& resolved, const std::string& text, int file_number,
                      int line_number) {
    Statement s;
    s.text = text;
    s.file = file_number;
    s.line = line_number;
    size_t at = 0;
    if (resolved[0] == '@') {
      size_t end = resolved.find_first_of(" \t", 1);
      s.guard = resolved.substr(1, end - 1);
      at = resolved.find_first_not_of(" \t\n", end);
    }
    size_t end = at;
    while (end < resolved.size() && !std::isspace(static_cast<unsigned char>(resolved[end])) &&
           resolved[end] != '(')
      ++end;
    s.opcode = resolved.substr(at, end - at);
    s.operands = split_operands(resolved.substr(end));
    return s;
  }

  Module& module_;
  std::string text_;
  size_t at_ = 0;
};

}  // namespace

Module::Module(const std::string& text) {
  Parser(*this, text).parse();
  for (Variable& v : globals) {
    storage.emplace_back((std::max<uint64_t>(v.bytes, 16) + 31) / 8);
    std::memcpy(storage.back().data(), v.initial.data(), v.initial.size());
    uint64_t base = reinterpret_cast<uint64_t>(storage.back().data());
    v.address = (base + 15) & ~15ull;
    if (v.address != base)
      std::memmove(reinterpret_cast<void*>(v.address), storage.back().data(), v.initial.size());
    if (v.bytes) Heap::instance().add(v.address, v.bytes, v.space == "global");
  }
}

Module::~Module() {
  for (const Variable& v : globals) {
    if (v.bytes) Heap::instance().remove(v.address);
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
  for (auto* compile : {compile_control, compile_arithmetic, compile_memory, compile_matrix}) {
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
