// PTX text to statements.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "machine.h"

namespace {

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

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
