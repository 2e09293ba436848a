// Transposition of squares of 16 x 16 words of 32 bits.

#pragma once

#include <immintrin.h>

namespace internlm {

// The rows of a 16 x 16 square of words -> its columns.
inline void transpose_square(const __m512i* rows, __m512i* columns) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  // Now fours[4 g + c] has, in its 128-bit part p, column 4 p + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even_01 = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i odd_01 = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even_23 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd_23 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    columns[c] = _mm512_shuffle_i32x4(even_01, even_23, 0x88);
    columns[4 + c] = _mm512_shuffle_i32x4(odd_01, odd_23, 0x88);
    columns[8 + c] = _mm512_shuffle_i32x4(even_01, even_23, 0xdd);
    columns[12 + c] = _mm512_shuffle_i32x4(odd_01, odd_23, 0xdd);
  }
}

} // namespace internlm
