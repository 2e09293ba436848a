// Weighted sums of rows in bf16, and their gradients, in one pass over memory each. Sums are in fp32, in a fixed order.
//
// Shapes: T tokens, k rows of each, M rows in all, h their width.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <immintrin.h>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 64; // rows of a thread, at least

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

__m512 read(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

void write(uint16_t* to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

void check(const Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous(), "rows of experts: needs contiguous ", dtype);
}

// y [M, h], rows int64 [T, k], weights fp32 [T, k] -> [T, h].
Tensor sum_rows(const Tensor& y, const Tensor& rows, const Tensor& weights) {
  check(y, at::kBFloat16), check(rows, at::kLong), check(weights, at::kFloat);
  const int64_t tokens = rows.size(0), top_k = rows.size(1), width = y.size(1);
  Tensor out = at::empty({tokens, width}, y.options());
  const auto* from = static_cast<const uint16_t*>(y.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  const auto* row = rows.const_data_ptr<int64_t>();
  const auto* weight = weights.const_data_ptr<float>();
  at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t j = 0; j < width; j += kLanes) {
        const __mmask16 mask = first_lanes(width - j);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t p = t * top_k; p < (t + 1) * top_k; ++p)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(weight[p]), read(from + row[p] * width + j, mask), sum);
        write(to + t * width + j, mask, sum);
      }
  });
  return out;
}

// grad [T, h], y [M, h], weights fp32 [T, k], order int64 [M] -> gradients of y and of weights; 0 for pairs without a row.
std::tuple<Tensor, Tensor> sum_rows_gradients(
    const Tensor& grad, const Tensor& y, const Tensor& weights, const Tensor& order) {
  check(grad, at::kBFloat16), check(y, at::kBFloat16), check(weights, at::kFloat), check(order, at::kLong);
  const int64_t top_k = weights.size(1), width = y.size(1);
  Tensor grad_y = at::empty_like(y), grad_weights = at::zeros_like(weights);
  const auto* from = static_cast<const uint16_t*>(grad.const_data_ptr());
  const auto* values = static_cast<const uint16_t*>(y.const_data_ptr());
  auto* to = static_cast<uint16_t*>(grad_y.mutable_data_ptr());
  const auto* pair = order.const_data_ptr<int64_t>();
  const auto* weight = weights.const_data_ptr<float>();
  auto* grad_weight = grad_weights.mutable_data_ptr<float>();
  at::parallel_for(0, y.size(0), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint16_t* token = from + pair[r] / top_k * width;
      const __m512 factor = _mm512_set1_ps(weight[pair[r]]);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = 0; j < width; j += kLanes) {
        const __mmask16 mask = first_lanes(width - j);
        const __m512 own = read(token + j, mask);
        sum = _mm512_fmadd_ps(own, read(values + r * width + j, mask), sum);
        write(to + r * width + j, mask, _mm512_mul_ps(own, factor));
      }
      grad_weight[pair[r]] = _mm512_reduce_add_ps(sum);
    }
  });
  return {grad_y, grad_weights};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(internlm_native, library) {
  library.def("sum_rows(Tensor y, Tensor rows, Tensor weights) -> Tensor");
  library.def("sum_rows_gradients(Tensor grad, Tensor y, Tensor weights, Tensor order) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(internlm_native, CPU, library) {
  library.impl("sum_rows", &sum_rows);
  library.impl("sum_rows_gradients", &sum_rows_gradients);
}
