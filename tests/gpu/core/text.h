// Pieces of PTX text: what statements and operands are read with.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

std::vector<std::string> split(const std::string& text, char separator);
std::string trim(const std::string& text);

// Splits at commas outside of braces, brackets and parentheses.
std::vector<std::string> split_operands(const std::string& text);

// Bytes of a value of this type, without the dot; 0 if it is none.
uint32_t type_bytes(const std::string& type);

// The bits of a number as an operand of this type.
uint64_t parse_bits(const std::string& text, const std::string& type);
