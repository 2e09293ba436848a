// Linear layers of a few rows, as in generation, where the time is that of reading the weight: it is read once, for all rows.
//
// An element is summed in fp32 in the order of the operands and rounded once, so it depends neither on the other rows nor on
// the number of threads.

#include <algorithm>
#include <cstdint>
#include <optional>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <immintrin.h>

namespace {

using at::Tensor;

// The sums of kMaxRows rows of x with kColumns rows of the weight stay in registers.
constexpr int kMaxRows = 6;
constexpr int kColumns = 4;
constexpr int64_t kGrain = 1 << 15; // elements of the weight for a thread, at least

// A number format: how a vector is read, and added as a product to 16 sums.
struct Fp32 {
  using Number = float;
  using Vector = __m512;
  static constexpr int64_t kLanes = 16;
  static Vector read(const float* from) { return _mm512_loadu_ps(from); }
  static Vector read(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  }
  static __m512 add_product(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct Bf16 {
  using Number = at::BFloat16;
  using Vector = __m512bh;
  static constexpr int64_t kLanes = 32;
  static Vector read(const at::BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Vector read(const at::BFloat16* from, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, from);
  }
  static __m512 add_product(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};

// The sum of the lanes of each vector, always in the same order. Four at a time share the additions.
template <int kCount>
void add_lanes(const __m512* vectors, float* totals) {
  for (int i = 0; i < kCount; i += 4) {
    __m256 halves[4] = {};
    for (int j = 0; j < 4 && i + j < kCount; ++j)
      halves[j] = _mm256_add_ps(_mm512_castps512_ps256(vectors[i + j]), _mm512_extractf32x8_ps(vectors[i + j], 1));
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
    _mm_storeu_ps(totals + i, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
}

template <typename Number>
struct Call {
  const Number *x, *weight, *bias;
  Number* out;
  int64_t rows, in, out_features;
};

// Elements (row, column) to (row + kRows, column + kWidth) of the result.
template <typename Format, int kRows, int kWidth>
void compute(const Call<typename Format::Number>& call, int64_t row, int64_t column) {
  const auto* x = call.x + row * call.in;
  const auto* weight = call.weight + column * call.in;
  __m512 sums[kRows][kWidth];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = _mm512_setzero_ps();
  const auto add = [&](const auto& read) {
    typename Format::Vector weights[kWidth];
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) weights[j] = read(weight + j * call.in);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto own = read(x + i * call.in);
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) sums[i][j] = Format::add_product(sums[i][j], own, weights[j]);
    }
  };
  int64_t k = 0;
  for (; k + Format::kLanes <= call.in; k += Format::kLanes) add([&](const auto* from) { return Format::read(from + k); });
  if (k < call.in) add([&](const auto* from) { return Format::read(from + k, call.in - k); });
  float totals[(kRows * kWidth + 3) / 4 * 4];
  add_lanes<kRows * kWidth>(&sums[0][0], totals);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kWidth; ++j) {
      const float total = totals[i * kWidth + j] + (call.bias ? static_cast<float>(call.bias[column + j]) : 0.0f);
      call.out[(row + i) * call.out_features + column + j] = static_cast<typename Format::Number>(total);
    }
}

// The same for `rows` rows, at most kRows.
template <typename Format, int kWidth, int kRows = kMaxRows>
void compute_rows(const Call<typename Format::Number>& call, int64_t row, int64_t rows, int64_t column) {
  if (rows == kRows)
    compute<Format, kRows, kWidth>(call, row, column);
  else if constexpr (kRows > 1)
    compute_rows<Format, kWidth, kRows - 1>(call, row, rows, column);
}

// The columns from `column` to before `column + kWidth`, in groups of rows of about one size.
template <typename Format, int kWidth>
void compute_columns(const Call<typename Format::Number>& call, int64_t column) {
  const int64_t num_groups = (call.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t row = group * call.rows / num_groups, stop = (group + 1) * call.rows / num_groups;
    compute_rows<Format, kWidth>(call, row, stop - row, column);
  }
}

template <typename Format>
void compute_all(const Call<typename Format::Number>& call) {
  const int64_t num_blocks = (call.out_features + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kColumns * call.in));
  at::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * kColumns, call.out_features);
    int64_t column = begin * kColumns;
    for (; column + kColumns <= stop; column += kColumns) compute_columns<Format, kColumns>(call, column);
    for (; column < stop; ++column) compute_columns<Format, 1>(call, column);
  });
}

template <typename Format>
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out) {
  using Number = typename Format::Number;
  compute_all<Format>({x.const_data_ptr<Number>(), weight.const_data_ptr<Number>(),
                       bias ? bias->const_data_ptr<Number>() : nullptr, out.mutable_data_ptr<Number>(), x.size(0), x.size(1),
                       weight.size(0)});
}

// x [M, in] weight^T [out, in] + bias [out] -> [M, out]; bf16 or fp32, all contiguous.
Tensor linear_of_few_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto fits = [&](const Tensor& t) { return t.is_contiguous() && t.scalar_type() == x.scalar_type(); };
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1) && fits(x) && fits(weight) &&
                  (!bias || (fits(*bias) && bias->dim() == 1 && bias->size(0) == weight.size(0))),
              "linear_of_few_rows: needs contiguous matrices of one width and dtype");
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  if (x.scalar_type() == at::kBFloat16)
    run<Bf16>(x, weight, bias, out);
  else
    run<Fp32>(x, weight, bias, out);
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(internlm_native, library) {
  library.def("linear_of_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(internlm_native, CPU, library) {
  library.impl("linear_of_few_rows", &linear_of_few_rows);
}
