// GEMMs of small bf16 matrices with AVX512-BF16, for CPUs without AMX.

#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace internlm {

// c [rows, 16 vectors] (= or +=) a [rows, 2 pairs] b, with sums in registers. The layout of b is [pairs, N, 2]: consecutive
// rows are interleaved. Leading dimensions are those of a, b (in pairs) and c.
template <int rows, int vectors>
void multiply_tile(
    int64_t pairs, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const uint16_t* a, const uint32_t* b, float* c) {
  __m512 sums[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = add ? _mm512_loadu_ps(c + i * ld_c + 16 * j) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, a += 2, b += ld_b) {
    __m512bh right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 16 * j));
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * ld_a, sizeof pair);
      const auto left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) _mm512_storeu_ps(c + i * ld_c + 16 * j, sums[i][j]);
}

template <int vectors>
void multiply_rows(
    int64_t m, int64_t pairs, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const uint16_t* a, const uint32_t* b,
    float* c) {
  // 24 sums and 5 operands fit into 32 registers; a block of 64 rows leaves a remainder of 4.
  constexpr int64_t kMost = 6;
  for (; m >= kMost; m -= kMost, a += kMost * ld_a, c += kMost * ld_c)
    multiply_tile<kMost, vectors>(pairs, ld_a, ld_b, ld_c, add, a, b, c);
  for (; m >= 4; m -= 4, a += 4 * ld_a, c += 4 * ld_c) multiply_tile<4, vectors>(pairs, ld_a, ld_b, ld_c, add, a, b, c);
  for (; m >= 1; --m, a += ld_a, c += ld_c) multiply_tile<1, vectors>(pairs, ld_a, ld_b, ld_c, add, a, b, c);
}

// c [m, n] (= or +=) a [m, k] b [k, n]; n is a multiple of 32, k is even; layout of b as above.
inline void multiply(
    int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const uint16_t* a,
    const uint32_t* b, float* c) {
  for (; n >= 64; n -= 64, b += 64, c += 64) multiply_rows<4>(m, k / 2, ld_a, ld_b, ld_c, add, a, b, c);
  if (n > 0) multiply_rows<2>(m, k / 2, ld_a, ld_b, ld_c, add, a, b, c);
}

} // namespace internlm
