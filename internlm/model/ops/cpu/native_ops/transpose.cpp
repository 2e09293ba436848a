// Transposition of 16-bit matrices, 5 to 20 times as fast as PyTorch's copy.

#include <algorithm>
#include <cstdint>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "words.h"

namespace {

using at::Tensor;

constexpr int64_t kSide = 32; // side of a square in elements: one cache line

// Reads 16 rows of a square as words of two elements: the first `num_rows` rows, masked by `mask`; zeros elsewhere.
void read_rows(const uint16_t* from, int64_t stride, int64_t num_rows, __mmask32 mask, __m512i* words) {
  for (int64_t i = 0; i < 16; ++i)
    words[i] = i < num_rows ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512();
}

__mmask32 first_lanes(int64_t count) {
  return count >= kSide ? ~__mmask32{0} : (__mmask32{1} << std::max<int64_t>(count, 0)) - 1;
}

// [R, C] -> [C, R], contiguous. The rows of x must have stride 1.
Tensor transposed(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.element_size() == 2 && x.stride(1) == 1, "transposed: needs a 16-bit matrix with contiguous rows");
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0);
  Tensor out = at::empty({columns, rows}, x.options());
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  // The lower half of a word is an even column, the upper half an odd one; the same half of 32 rows is a row of the result.
  alignas(64) int16_t lower[kSide], upper[kSide];
  for (int16_t i = 0; i < kSide; ++i) {
    lower[i] = static_cast<int16_t>(2 * i);
    upper[i] = static_cast<int16_t>(2 * i + 1);
  }
  const __m512i even = _mm512_load_si512(lower), odd = _mm512_load_si512(upper);
  at::parallel_for(0, (columns + kSide - 1) / kSide, 1, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin * kSide; column < std::min(end * kSide, columns); column += kSide) {
      const __mmask32 column_mask = first_lanes(columns - column);
      for (int64_t row = 0; row < rows; row += kSide) {
        const uint16_t* corner = from + row * stride + column;
        const __mmask32 row_mask = first_lanes(rows - row);
        __m512i words[16], upper_rows[16], lower_rows[16];
        read_rows(corner, stride, rows - row, column_mask, words);
        internlm::transpose_square(words, upper_rows);
        read_rows(corner + 16 * stride, stride, rows - row - 16, column_mask, words);
        internlm::transpose_square(words, lower_rows);
        uint16_t* target = to + column * rows + row;
        for (int64_t i = 0; i < std::min(kSide, columns - column); ++i, target += rows) {
          const __m512i numbers = _mm512_permutex2var_epi16(upper_rows[i / 2], i % 2 ? odd : even, lower_rows[i / 2]);
          _mm512_mask_storeu_epi16(target, row_mask, numbers);
        }
      }
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(internlm_native, library) {
  library.def("transposed(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(internlm_native, CPU, library) {
  library.impl("transposed", &transposed);
}
