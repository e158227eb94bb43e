// Codes of up to 4 bits, two to a byte: the even element in the low half.
#pragma once
#include <stdint.h>

namespace {

// n codes from bytes; the last one of an odd n lies in a low half. With `is_signed` the fourth bit is
// the sign.
void split_halves(const uint8_t* bytes, int64_t n, bool is_signed, int8_t* codes) {
  const uint8_t sign = is_signed ? 8 : 0;
  const int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const uint8_t low = bytes[i] & 15, high = bytes[i] >> 4;
    codes[2 * i] = static_cast<int8_t>((low ^ sign) - sign);
    codes[2 * i + 1] = static_cast<int8_t>((high ^ sign) - sign);
  }
  if (n % 2) codes[n - 1] = static_cast<int8_t>(((bytes[pairs] & 15) ^ sign) - sign);
}

void join_halves(const int8_t* codes, int64_t n, uint8_t* bytes) {
  const int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; ++i)
    bytes[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (codes[2 * i + 1] << 4));
  if (n % 2) bytes[pairs] = static_cast<uint8_t>(codes[n - 1] & 15);
}

}  // namespace
