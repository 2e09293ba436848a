// Rows of bf16 and fp32 numbers: conversion, transposition, and GEMMs of small matrices.
//
// "Paired" is the layout of the right operand [K, N] for matrix units: [K / 2, N, 2]. The suffix _t means transposed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include "tiles.h"
#include "words.h"

namespace internlm {

using at::BFloat16;

constexpr int64_t kLanes = 16;

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Lanes i with first <= i < last.
inline __mmask16 lanes(int64_t first, int64_t last) {
  if (first <= 0 && last >= kLanes) return 0xffff; // nearly always
  const auto below = [](int64_t i) { return (1u << std::clamp<int64_t>(i, 0, kLanes)) - 1; };
  return static_cast<__mmask16>(below(last) & ~below(first));
}

// Whether oneDNN's tile GEMMs use AMX on this CPU.
inline bool has_matrix_units() {
  static const bool found = at::native::cpublas::could_pack(at::kBFloat16);
  return found;
}

// c [m, n] (= or +=) a [m, k] b [k, n], b paired.
inline void multiply(
    int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const BFloat16* a,
    const BFloat16* b, float* c) {
  if (has_matrix_units())
    at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c);
  else
    multiply(
        m, n, k, ld_a, ld_b, ld_c, add, reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint32_t*>(b), c);
}

// e^x for x <= 0 as 2^n 2^f, with a polynomial for 2^f. Relative error 1e-6 unless the result is tiny.
inline __m512 exponential(__m512 x) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, n);
  // Taylor series of 2^f for |f| <= 1/2; the next term is below 2e-7.
  __m512 y = _mm512_set1_ps(1.3333558e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

inline __m256i to_bf16(__m512 x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

inline __m512 from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// 16 numbers in memory.
inline __m512 load_bf16(const BFloat16* x) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// [rows, columns] words -> [columns, rows]; both multiples of 16.
inline void transpose_words(const void* from, int64_t rows, int64_t columns, void* to, int64_t ld_to) {
  const auto* source = static_cast<const uint32_t*>(from);
  auto* target = static_cast<uint32_t*>(to);
  __m512i square[16], transposed[16];
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      for (int64_t k = 0; k < 16; ++k) square[k] = _mm512_loadu_si512(source + (i + k) * columns + j);
      transpose_square(square, transposed);
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(target + (j + k) * ld_to + i, transposed[k]);
    }
}

// X [rows, D] -> the right operand X^T [D, rows], paired.
inline void pair_transposed(const BFloat16* x, int64_t rows, int64_t dim, BFloat16* to) {
  transpose_words(x, rows, dim / 2, to, rows);
}

// X [rows, D] -> the right operand X, paired.
inline void pair_rows(const BFloat16* x, int64_t rows, int64_t dim, BFloat16* to) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < dim; j += kLanes) {
      const auto* even = reinterpret_cast<const __m256i*>(x + i * dim + j);
      const auto* odd = reinterpret_cast<const __m256i*>(x + (i + 1) * dim + j);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16);
      _mm512_storeu_si512(to + i * dim + 2 * j, _mm512_or_si512(low, high));
    }
}

// X^T [D, rows], paired -> X^T, not paired.
inline void unpair(const BFloat16* paired, int64_t rows, int64_t dim, BFloat16* to) {
  for (int64_t d = 0; d < dim; d += 2)
    for (int64_t i = 0; i < rows; i += kLanes) {
      const __m512i words = _mm512_loadu_si512(paired + d * rows + 2 * i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d * rows + i), _mm512_cvtepi32_epi16(words));
      const __m512i high = _mm512_srli_epi32(words, 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (d + 1) * rows + i), _mm512_cvtepi32_epi16(high));
    }
}

// The tokens of one head of a tensor [B, S, heads, D] with stride 1 in the last dimension.
struct Head {
  BFloat16* first;
  int64_t stride; // from token to token
  int64_t dim;

  // Copies tokens [start, start + rows) to [rows, padded], with zeros from token `length` and element `dim` on.
  void read(int64_t start, int64_t rows, int64_t length, int64_t padded, BFloat16* to) const {
    for (int64_t i = 0; i < rows; ++i, to += padded) {
      const int64_t valid = start + i < length ? dim : 0;
      if (valid) std::memcpy(to, first + (start + i) * stride, dim * sizeof(BFloat16));
      std::memset(static_cast<void*>(to + valid), 0, (padded - valid) * sizeof(BFloat16));
    }
  }

  // Writes fp32 rows [rows, padded] as bf16 tokens, multiplied by `factor` or, if given, row i by `factors[i]`.
  void write(int64_t start, int64_t rows, const float* from, int64_t padded, float factor, const float* factors = nullptr)
      const {
    for (int64_t i = 0; i < rows; ++i, from += padded) {
      const __m512 scale = _mm512_set1_ps(factors ? factors[i] : factor);
      BFloat16* to = first + (start + i) * stride;
      for (int64_t j = 0; j < dim; j += kLanes) {
        const __m256i numbers = to_bf16(_mm512_mul_ps(scale, _mm512_loadu_ps(from + j)));
        _mm256_mask_storeu_epi16(to + j, lanes(0, dim - j), numbers);
      }
    }
  }
};

} // namespace internlm
