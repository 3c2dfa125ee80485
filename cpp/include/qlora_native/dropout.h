// Dropout whose mask is a function of a counter: it is computed again wherever it is needed, and
// never stored.
#pragma once

#include <cstdint>

namespace qlora_native {

/// D(X) of a matrix of C columns: an element (row, col) is kept iff a 16-bit random number is at
/// least `threshold` = round(p * 65536), and multiplied by 1 / (1 - threshold / 65536) then; else it
/// is zero, whatever it was. p = 1 keeps nothing.
///
/// The random numbers are those of Philox4x32-10 under the key `seed`. One block of it serves eight
/// columns: i = row * ceil(C / 8) + col / 8 and `offset`, 64 bits each, low word first, are its
/// counter, and the number of column col is, low half first, a half of word (col % 8) / 2.
///
/// So the same three values give the same mask on every device, and another offset another one.
struct Dropout {
  float p = 0;  ///< 0 <= p <= 1; 0: none
  uint64_t seed = 0;
  uint64_t offset = 0;
};

}  // namespace qlora_native
