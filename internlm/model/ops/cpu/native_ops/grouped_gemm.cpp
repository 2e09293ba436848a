// GEMMs in bf16 of groups of rows, each group with its own matrix, with AVX512-BF16.
//
// Any numbers of rows need no other code. An element is summed in fp32 in the order of the operands and rounded once, so
// results depend neither on the number of threads nor on the other groups.
//
// "Panel": kWidth columns of the right operand of a GEMM, paired as in tiles.h: [pairs, kWidth, 2].

#include <algorithm>
#include <cstdint>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "tiles.h"
#include "words.h"

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kWidth = 64; // columns of a panel
constexpr int64_t kRows = 96;  // rows of a work item; a multiple of those of a tile

// A matrix of 16-bit numbers with contiguous rows.
struct Matrix {
  const uint16_t* data;
  int64_t rows, columns, stride;
};

// Rows `start` to `start + rows` of the result, of one group.
struct Item {
  int64_t group, start, rows;
};

int64_t blocks(int64_t x, int64_t size) {
  return (x + size - 1) / size;
}

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// 16 columns of rows i and i + 1 as words of two numbers, with zeros outside of the matrix.
__m512i paired(const Matrix& x, int64_t i, int64_t column) {
  const __mmask16 mask = first_lanes(x.columns - column);
  const auto read = [&](int64_t row) {
    if (row >= x.rows) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x.data + row * x.stride + column));
  };
  return _mm512_or_si512(read(i), _mm512_slli_epi32(read(i + 1), 16));
}

// The right operand x [K, N] as panels.
void pack(const Matrix& x, uint32_t* to) {
  const int64_t pairs = blocks(x.rows, 2);
  for (int64_t column = 0; column < x.columns; column += kWidth)
    for (int64_t p = 0; p < pairs; ++p, to += kWidth)
      for (int64_t j = 0; j < kWidth; j += kLanes) _mm512_storeu_si512(to + j, paired(x, 2 * p, column + j));
}

// The right operand x^T for x [N, K] as panels; K is even.
void pack_transposed(const Matrix& x, uint32_t* to) {
  const int64_t pairs = x.columns / 2;
  __m512i square[kLanes], transposed[kLanes];
  for (int64_t row = 0; row < x.rows; row += kWidth, to += pairs * kWidth)
    for (int64_t j = 0; j < kWidth; j += kLanes)
      for (int64_t p = 0; p < pairs; p += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t own = row + j + i;
          square[i] = own < x.rows ? _mm512_maskz_loadu_epi32(first_lanes(pairs - p), x.data + own * x.stride + 2 * p)
                                   : _mm512_setzero_si512();
        }
        internlm::transpose_square(square, transposed);
        for (int64_t i = 0; i < std::min(kLanes, pairs - p); ++i)
          _mm512_storeu_si512(to + (p + i) * kWidth + j, transposed[i]);
      }
}

// Columns `first` to `first + count` of x [K, N] as rows [count, pairs, 2], which are `stride` words apart.
void transpose(const Matrix& x, int64_t first, int64_t count, int64_t stride, uint32_t* to) {
  const Matrix own{x.data, x.rows, first + count, x.stride};
  __m512i square[kLanes], transposed[kLanes];
  for (int64_t p = 0; 2 * p < x.rows; p += kLanes)
    for (int64_t j = 0; j < count; j += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) square[i] = paired(own, 2 * (p + i), first + j);
      internlm::transpose_square(square, transposed);
      for (int64_t i = 0; i < std::min(kLanes, count - j); ++i)
        _mm512_storeu_si512(to + (j + i) * stride + p, transposed[i]);
    }
}

// out [rows, N] = a [rows, 2 pairs] times the panels of [2 pairs, N].
void multiply_panels(
    int64_t rows, int64_t pairs, const uint16_t* a, int64_t ld_a, const uint32_t* panels, int64_t columns, uint16_t* out,
    int64_t ld_out) {
  alignas(64) float sums[kRows * kWidth];
  for (int64_t column = 0; column < columns; column += kWidth, panels += pairs * kWidth) {
    internlm::multiply(rows, kWidth, 2 * pairs, ld_a, kWidth, kWidth, false, a, panels, sums);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < std::min(kWidth, columns - column); j += kLanes) {
        const auto numbers = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_load_ps(sums + i * kWidth + j)));
        _mm256_mask_storeu_epi16(out + i * ld_out + column + j, first_lanes(columns - column - j), numbers);
      }
  }
}

// Calls work(first item, one past the last) in parallel, for consecutive items.
template <typename Work>
void in_parallel(const std::vector<Item>& items, const Work& work) {
  at::parallel_for(0, static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
    work(items.data() + begin, items.data() + end);
  });
}

uint16_t* data_of(const Tensor& x) {
  return static_cast<uint16_t*>(x.data_ptr());
}

void check(const Tensor& x, int64_t dim) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == dim, "groups of rows: needs bf16 in ", dim, " dimensions");
}

// x [M, A], matrices [G, A, B] with contiguous rows or columns, rows of each group -> out [M, B]; A is even.
void gemm_of_groups(const Tensor& x, const Tensor& matrices, at::IntArrayRef sizes, const Tensor& out) {
  check(x, 2), check(matrices, 3), check(out, 2);
  const int64_t inputs = matrices.size(1), outputs = matrices.size(2);
  const bool has_rows = matrices.stride(2) == 1;
  TORCH_CHECK(
      inputs % 2 == 0 && x.stride(1) == 1 && out.stride(1) == 1 && (has_rows || matrices.stride(1) == 1),
      "groups of rows: needs contiguous rows of even length");
  std::vector<Item> items;
  int64_t start = 0;
  for (size_t group = 0; group < sizes.size(); ++group)
    for (const int64_t stop = start + sizes[group]; start < stop; start += items.back().rows)
      items.push_back({static_cast<int64_t>(group), start, std::min(kRows, stop - start)});
  TORCH_CHECK(start == x.size(0) && start == out.size(0), "groups of rows: sizes do not add up to the rows");
  in_parallel(items, [&](const Item* item, const Item* end) {
    std::vector<uint32_t> panels(blocks(outputs, kWidth) * kWidth * (inputs / 2));
    for (int64_t packed = -1; item < end; ++item) {
      if (packed != item->group) {
        packed = item->group;
        const uint16_t* own = data_of(matrices) + packed * matrices.stride(0);
        if (has_rows)
          pack({own, inputs, outputs, matrices.stride(1)}, panels.data());
        else
          pack_transposed({own, outputs, inputs, matrices.stride(2)}, panels.data());
      }
      multiply_panels(
          item->rows, inputs / 2, data_of(x) + item->start * x.stride(0), x.stride(0), panels.data(), outputs,
          data_of(out) + item->start * out.stride(0), out.stride(0));
    }
  });
}

// grad [M, N], x [M, K], rows of each group -> out [G, N, K], sums over rows; zeros for groups without rows.
void outer_gemm_of_groups(const Tensor& grad, const Tensor& x, at::IntArrayRef sizes, const Tensor& out) {
  check(grad, 2), check(x, 2), check(out, 3);
  TORCH_CHECK(grad.stride(1) == 1 && x.stride(1) == 1 && out.stride(2) == 1, "groups of rows: needs contiguous rows");
  const int64_t outputs = grad.size(1), inputs = x.size(1);
  std::vector<int64_t> starts{0};
  std::vector<Item> items;
  for (size_t group = 0; group < sizes.size(); ++group) {
    starts.push_back(starts.back() + sizes[group]);
    for (int64_t start = 0; start < outputs; start += kRows)
      items.push_back({static_cast<int64_t>(group), start, std::min(kRows, outputs - start)});
  }
  TORCH_CHECK(starts.back() == grad.size(0) && starts.back() == x.size(0), "groups of rows: sizes do not add up to the rows");
  in_parallel(items, [&](const Item* item, const Item* end) {
    std::vector<uint32_t> panels, left;
    for (int64_t packed = -1; item < end; ++item) {
      const int64_t first = starts[item->group], rows = sizes[item->group], pairs = blocks(rows, 2);
      if (packed != item->group) {
        packed = item->group;
        panels.resize(blocks(inputs, kWidth) * kWidth * pairs);
        pack({data_of(x) + first * x.stride(0), rows, inputs, x.stride(0)}, panels.data());
      }
      const int64_t stride = blocks(pairs, kLanes) * kLanes;
      left.resize(kRows * stride);
      transpose(
          {data_of(grad) + first * grad.stride(0), rows, outputs, grad.stride(0)}, item->start, item->rows, stride,
          left.data());
      multiply_panels(
          item->rows, pairs, reinterpret_cast<const uint16_t*>(left.data()), 2 * stride, panels.data(), inputs,
          data_of(out) + item->group * out.stride(0) + item->start * out.stride(1), out.stride(1));
    }
  });
}

} // namespace

TORCH_LIBRARY_FRAGMENT(internlm_native, library) {
  library.def("gemm_of_groups(Tensor x, Tensor matrices, int[] sizes, Tensor(a!) out) -> ()");
  library.def("outer_gemm_of_groups(Tensor grad, Tensor x, int[] sizes, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(internlm_native, CPU, library) {
  library.impl("gemm_of_groups", &gemm_of_groups);
  library.impl("outer_gemm_of_groups", &outer_gemm_of_groups);
}
