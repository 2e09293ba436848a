// Causal attention in bf16 over documents of any lengths.
//
// Method: FlashAttention-2 (Dao, 2023, arXiv:2307.08691). Blocks of scores stay in a core's cache, in fp32. The forward
// pass saves the log-sum-exp (lse) of each row of scores, from which the backward pass recomputes the probabilities. With
// AMX, GEMMs of tiles are oneDNN's, through the interface for PyTorch's own kernels (at::native::cpublas::brgemm);
// without, where oneDNN is slow for small tiles, those of tiles.h.
//
// A work item of a thread is a document and a key-value head with all query heads that share it, so results do not depend
// on the number of threads. Inputs are copied, with lengths padded to blocks of queries and head dimensions padded to
// tiles, so no input shape needs a new kernel.
//
// Names: S queries and keys of a document, D head dimension (padded), R = kRows queries of a block, N keys of a block.
// "Paired" is the layout of the right operand [K, N] for matrix units: [K / 2, N, 2]. The suffix _t means transposed.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include "tiles.h"
#include "words.h"

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 64;     // queries of a block
constexpr int64_t kColumns = 256; // maximum keys of a block; a multiple of kRows
constexpr float kMasked = 1e30f;  // finite, so that the difference of two is not NaN

int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Lanes i with first <= i < last.
__mmask16 lanes(int64_t first, int64_t last) {
  if (first <= 0 && last >= kLanes) return 0xffff; // nearly always
  const auto below = [](int64_t i) { return (1u << std::clamp<int64_t>(i, 0, kLanes)) - 1; };
  return static_cast<__mmask16>(below(last) & ~below(first));
}

// Whether oneDNN's tile GEMMs use AMX on this CPU.
bool has_matrix_units() {
  static const bool found = at::native::cpublas::could_pack(at::kBFloat16);
  return found;
}

// c [m, n] (= or +=) a [m, k] b [k, n], b paired.
void multiply(
    int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const BFloat16* a,
    const BFloat16* b, float* c) {
  if (has_matrix_units())
    at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c);
  else
    internlm::multiply(
        m, n, k, ld_a, ld_b, ld_c, add, reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint32_t*>(b), c);
}

// e^x for x <= 0 as 2^n 2^f, with a polynomial for 2^f. Relative error 1e-6 unless the result is tiny.
__m512 exponential(__m512 x) {
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

__m256i to_bf16(__m512 x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

__m512 from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// [rows, columns] words -> [columns, rows]; both multiples of 16.
void transpose_words(const void* from, int64_t rows, int64_t columns, void* to, int64_t ld_to) {
  const auto* source = static_cast<const uint32_t*>(from);
  auto* target = static_cast<uint32_t*>(to);
  __m512i square[16], transposed[16];
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      for (int64_t k = 0; k < 16; ++k) square[k] = _mm512_loadu_si512(source + (i + k) * columns + j);
      internlm::transpose_square(square, transposed);
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(target + (j + k) * ld_to + i, transposed[k]);
    }
}

// X [rows, D] -> the right operand X^T [D, rows], paired.
void pair_transposed(const BFloat16* x, int64_t rows, int64_t dim, BFloat16* to) {
  transpose_words(x, rows, dim / 2, to, rows);
}

// X [rows, D] -> the right operand X, paired.
void pair_rows(const BFloat16* x, int64_t rows, int64_t dim, BFloat16* to) {
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
void unpair(const BFloat16* paired, int64_t rows, int64_t dim, BFloat16* to) {
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

struct Document {
  int64_t row, start, length;
};

// The arguments of a call, shared by all work items.
struct Call {
  std::vector<Document> documents; // the longest first
  int64_t num_heads, num_kv_heads, length, head_dim, dim, longest;
  int64_t window;
  float scale;

  Call(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bounds, std::optional<int64_t> window, double scale)
      : num_heads(q.size(2)),
        num_kv_heads(k.size(2)),
        length(q.size(1)),
        head_dim(q.size(3)),
        dim(round_up(q.size(3), 32)),
        longest(0),
        window(window.value_or(q.size(1) + 1)),
        scale(static_cast<float>(scale)) {
    if (bounds) {
      const auto* limits = bounds->const_data_ptr<int32_t>();
      for (int64_t i = 0; i + 1 < bounds->numel(); ++i)
        if (limits[i + 1] > limits[i]) documents.push_back({0, limits[i], limits[i + 1] - limits[i]});
    } else if (length > 0) {
      for (int64_t row = 0; row < q.size(0); ++row) documents.push_back({row, 0, length});
    }
    std::stable_sort(documents.begin(), documents.end(), [](const auto& a, const auto& b) { return a.length > b.length; });
    if (!documents.empty()) longest = round_up(documents.front().length, kRows);
  }

  int64_t group() const {
    return num_heads / num_kv_heads;
  }

  Head head(const Tensor& x, const Document& document, int64_t index) const {
    auto* first = x.data_ptr<BFloat16>() + document.row * x.stride(0) + document.start * x.stride(1) + index * x.stride(2);
    return {first, x.stride(1), head_dim};
  }

  // First key that any of the queries [start, start + kRows) attends to, rounded down to a block of queries.
  int64_t first_key(int64_t start) const {
    return std::max<int64_t>(0, start - window + 1) / kRows * kRows;
  }

  // Runs work(document, key-value head, floats, halves) for every item; floats and halves are buffers of the thread.
  template <typename Work>
  void run(int64_t num_floats, int64_t num_halves, const Work& work) const {
    const int64_t num_items = static_cast<int64_t>(documents.size()) * num_kv_heads;
    const int64_t threads = std::min<int64_t>(num_items, at::get_num_threads());
    const Tensor floats = at::empty({threads, num_floats}, at::kFloat);
    const Tensor halves = at::empty({threads, num_halves}, at::kBFloat16);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t end) {
      if (thread == end) return;
      auto* own_floats = floats.data_ptr<float>() + thread * num_floats;
      auto* own_halves = halves.data_ptr<BFloat16>() + thread * num_halves;
      // Dynamic scheduling, because items have different sizes.
      for (int64_t item = next++; item < num_items; item = next++)
        work(documents[item / num_kv_heads], item % num_kv_heads, own_floats, own_halves);
      if (has_matrix_units()) at::native::cpublas::brgemm_release();
    });
  }
};

// One step of the online softmax: unnormalized probabilities of a block of keys, and the rescaling of earlier results.
//   scores [kRows, kColumns] of keys `begin` to `begin + width` -> weights, bf16, zero where a key is masked
//   largest, sum: maximum score and sum of weights over all keys so far; total [kRows, dim]: weighted values so far
void online_softmax(
    const Call& call, int64_t start, int64_t begin, int64_t width, const float* scores, BFloat16* weights, float* largest,
    float* sum, float* total) {
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t query = start + i;
    const int64_t low = std::max<int64_t>(0, query - call.window + 1 - begin), high = std::min(width, query + 1 - begin);
    const float* row = scores + i * kColumns;
    BFloat16* to = weights + i * kColumns;
    if (high <= low) {
      std::memset(static_cast<void*>(to), 0, width * sizeof(BFloat16));
      continue;
    }
    const int64_t from = low / kLanes * kLanes, until = round_up(high, kLanes);
    __m512 most = _mm512_set1_ps(largest[i]);
    for (int64_t j = from; j < until; j += kLanes)
      most = _mm512_mask_max_ps(most, lanes(low - j, high - j), most, _mm512_loadu_ps(row + j));
    const float now = _mm512_reduce_max_ps(most);
    const __m512 scale = _mm512_set1_ps(call.scale), offset = _mm512_set1_ps(-now * call.scale);
    __m512 added = _mm512_setzero_ps();
    std::memset(static_cast<void*>(to), 0, from * sizeof(BFloat16));
    for (int64_t j = from; j < until; j += kLanes) {
      const __m512 exponent = _mm512_fmadd_ps(scale, _mm512_loadu_ps(row + j), offset);
      const __m512 weight = _mm512_maskz_mov_ps(lanes(low - j, high - j), exponential(exponent));
      added = _mm512_add_ps(added, weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), to_bf16(weight));
    }
    std::memset(static_cast<void*>(to + until), 0, (width - until) * sizeof(BFloat16));
    const float before = std::exp((largest[i] - now) * call.scale);
    if (before != 1.0f)
      for (int64_t j = 0; j < call.dim; j += kLanes) {
        float* numbers = total + i * call.dim + j;
        _mm512_storeu_ps(numbers, _mm512_mul_ps(_mm512_set1_ps(before), _mm512_loadu_ps(numbers)));
      }
    sum[i] = sum[i] * before + _mm512_reduce_add_ps(added);
    largest[i] = now;
  }
}

// Attention of q [B, S, H, D] to k, v [B, S, K, D], bf16 -> result [B, S, H, D], and lse [B, H, S], fp32.
//   bounds: int32 [n + 1], bounds of the documents of the only row; none: each row is one document.
//   window: maximum number of keys that a query attends to, itself included.
std::tuple<Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bounds, std::optional<int64_t> window,
    double scale) {
  const Call call(q, k, bounds, window, scale);
  const int64_t dim = call.dim, longest = call.longest;
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  const int64_t num_floats = kRows * (kColumns + dim + 2), num_halves = 3 * longest * dim + kRows * (dim + kColumns);
  call.run(num_floats, num_halves, [&](const Document& document, int64_t kv_head, float* floats, BFloat16* halves) {
    const int64_t length = document.length, padded = round_up(length, kRows);
    float *scores = floats, *total = scores + kRows * kColumns, *largest = total + kRows * dim, *sum = largest + kRows;
    BFloat16 *rows = halves, *keys = rows + longest * dim, *values = keys + longest * dim, *queries = values + longest * dim,
             *weights = queries + kRows * dim;
    call.head(k, document, kv_head).read(0, padded, length, dim, rows);
    pair_transposed(rows, padded, dim, keys);
    call.head(v, document, kv_head).read(0, padded, length, dim, rows);
    pair_rows(rows, padded, dim, values);
    for (int64_t head = kv_head * call.group(); head < (kv_head + 1) * call.group(); ++head)
      for (int64_t start = 0; start < length; start += kRows) {
        call.head(q, document, head).read(start, kRows, length, dim, queries);
        std::fill_n(largest, kRows, -kMasked);
        std::fill_n(sum, kRows, 0.0f);
        const int64_t first = call.first_key(start), last = start + kRows;
        std::memset(total, 0, kRows * dim * sizeof(float));
        for (int64_t begin = first; begin < last; begin += kColumns) {
          const int64_t width = std::min(kColumns, last - begin);
          multiply(kRows, width, dim, dim, padded, kColumns, false, queries, keys + 2 * begin, scores);
          online_softmax(call, start, begin, width, scores, weights, largest, sum, total);
          multiply(kRows, dim, width, kColumns, dim, dim, true, weights, values + begin * dim, total);
        }
        const int64_t valid = std::min(kRows, length - start);
        float* row_lse = lse.data_ptr<float>() + (document.row * call.num_heads + head) * call.length;
        for (int64_t i = 0; i < valid; ++i) {
          row_lse[document.start + start + i] = largest[i] * call.scale + std::log(sum[i]);
          sum[i] = 1.0f / sum[i];
        }
        call.head(out, document, head).write(start, valid, total, dim, 0.0f, sum);
      }
  });
  return {out, lse};
}

// Transposed scores and gradients of probabilities [width, kRows] of keys `begin` to `begin + width` -> probabilities, and
// gradients of scores (without the factor `scale`), the latter also paired.
void softmax_backward(
    const Call& call, int64_t start, int64_t begin, int64_t width, const float* scores, const float* gradients,
    const float* lse, const float* delta, BFloat16* probabilities, BFloat16* score_gradients, BFloat16* paired) {
  const __m512 scale = _mm512_set1_ps(call.scale);
  for (int64_t n = 0; n < width; n += 2)
    for (int64_t c = 0; c < kRows; c += kLanes) {
      const __m512 row_lse = _mm512_loadu_ps(lse + c), mean = _mm512_loadu_ps(delta + c);
      __m512i words[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = (n + i) * kRows + c, key = begin + n + i - start - c; // the lane of the query at this key
        const __m512 exponent = _mm512_fmsub_ps(scale, _mm512_loadu_ps(scores + at), row_lse);
        const __m512 p = _mm512_maskz_mov_ps(lanes(key, key + call.window), exponential(exponent));
        const __m512 d = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(gradients + at), mean));
        const __m256i rounded = to_bf16(d);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + at), to_bf16(p));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(score_gradients + at), rounded);
        words[i] = _mm512_cvtepu16_epi32(rounded);
      }
      _mm512_storeu_si512(paired + n * kRows + 2 * c, _mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16)));
    }
}

// Gradients of q, k, v. `grad` is the gradient of the result; out and lse are from `forward`.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& bounds, std::optional<int64_t> window, double scale) {
  const Call call(q, k, bounds, window, scale);
  const int64_t dim = call.dim, longest = call.longest;
  Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()),
         grad_v = at::empty(v.sizes(), v.options());
  const int64_t num_floats = 2 * longest * dim + kRows * (2 * kColumns + 2 * dim + 2);
  const int64_t num_halves = 4 * longest * dim + kRows * (6 * dim + 3 * kColumns);
  call.run(num_floats, num_halves, [&](const Document& document, int64_t kv_head, float* floats, BFloat16* halves) {
    const int64_t length = document.length, padded = round_up(length, kRows);
    float *key_sums = floats, *value_sums = key_sums + longest * dim, *scores = value_sums + longest * dim,
          *gradients = scores + kRows * kColumns, *query_sums = gradients + kRows * kColumns,
          *transposed = query_sums + kRows * dim, *row_lse = transposed + kRows * dim, *delta = row_lse + kRows;
    BFloat16 *keys = halves, *values = keys + longest * dim, *keys_t = values + longest * dim,
             *scratch = keys_t + longest * dim, *queries = scratch + longest * dim, *out_grads = queries + kRows * dim,
             *paired_queries = out_grads + kRows * dim, *paired_out_grads = paired_queries + kRows * dim,
             *queries_t = paired_out_grads + kRows * dim, *out_grads_t = queries_t + kRows * dim,
             *probabilities = out_grads_t + kRows * dim, *score_gradients = probabilities + kRows * kColumns,
             *paired_gradients = score_gradients + kRows * kColumns;
    call.head(k, document, kv_head).read(0, padded, length, dim, keys);
    call.head(v, document, kv_head).read(0, padded, length, dim, values);
    pair_transposed(keys, padded, dim, scratch);
    unpair(scratch, padded, dim, keys_t);
    std::memset(key_sums, 0, padded * dim * sizeof(float));
    std::memset(value_sums, 0, padded * dim * sizeof(float));
    for (int64_t head = kv_head * call.group(); head < (kv_head + 1) * call.group(); ++head)
      for (int64_t start = 0; start < length; start += kRows) {
        const int64_t valid = std::min(kRows, length - start);
        call.head(out, document, head).read(start, kRows, length, dim, queries);
        call.head(grad, document, head).read(start, kRows, length, dim, out_grads);
        const float* saved_lse =
            lse.const_data_ptr<float>() + (document.row * call.num_heads + head) * call.length + document.start + start;
        for (int64_t i = 0; i < kRows; ++i) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t j = i * dim; j < (i + 1) * dim; j += kLanes)
            sum = _mm512_fmadd_ps(
                from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries + j))),
                from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(out_grads + j))),
                sum);
          delta[i] = _mm512_reduce_add_ps(sum);
          row_lse[i] = i < valid ? saved_lse[i] : kMasked;
        }
        call.head(q, document, head).read(start, kRows, length, dim, queries);
        pair_rows(queries, kRows, dim, paired_queries);
        pair_rows(out_grads, kRows, dim, paired_out_grads);
        pair_transposed(queries, kRows, dim, queries_t);
        pair_transposed(out_grads, kRows, dim, out_grads_t);
        const int64_t first = call.first_key(start), last = start + kRows;
        for (int64_t begin = first; begin < last; begin += kColumns) {
          const int64_t width = std::min(kColumns, last - begin), at = begin * dim;
          multiply(width, kRows, dim, dim, kRows, kRows, false, keys + at, queries_t, scores);
          multiply(width, kRows, dim, dim, kRows, kRows, false, values + at, out_grads_t, gradients);
          softmax_backward(
              call, start, begin, width, scores, gradients, row_lse, delta, probabilities, score_gradients,
              paired_gradients);
          multiply(width, dim, kRows, kRows, dim, dim, true, probabilities, paired_out_grads, value_sums + at);
          multiply(width, dim, kRows, kRows, dim, dim, true, score_gradients, paired_queries, key_sums + at);
          multiply(dim, kRows, width, padded, kRows, kRows, begin > first, keys_t + begin, paired_gradients, query_sums);
        }
        transpose_words(query_sums, dim, kRows, transposed, dim);
        call.head(grad_q, document, head).write(start, valid, transposed, dim, call.scale);
      }
    call.head(grad_k, document, kv_head).write(0, length, key_sums, dim, call.scale);
    call.head(grad_v, document, kv_head).write(0, length, value_sums, dim, 1.0f);
  });
  return {grad_q, grad_k, grad_v};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(internlm_native, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor? bounds, int? window, float scale) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bounds,"
      " int? window, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(internlm_native, CPU, library) {
  library.impl("attention", &forward);
  library.impl("attention_backward", &backward);
}
