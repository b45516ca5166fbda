#include "text.h"

#include <cctype>
#include <cstring>

#include "numbers.h"

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t start = 0;
  for (size_t end; (end = text.find(separator, start)) != std::string::npos; start = end + 1) {
    parts.push_back(text.substr(start, end - start));
  }
  parts.push_back(text.substr(start));
  return parts;
}

std::string trim(const std::string& text) {
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

std::vector<std::string> split_operands(const std::string& text) {
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

uint64_t parse_bits(const std::string& text, const std::string& type) {
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
