// Attention in bf16 of some queries to some keys: the computation of a tile, forward and backward.
//
// Method: FlashAttention-2 (Dao, 2023, arXiv:2307.08691). Blocks of scores stay in a core's cache, in fp32. The forward
// pass gives the log-sum-exp (lse) of each row of scores, from which the backward pass recomputes the probabilities. With
// AMX, GEMMs of small matrices are oneDNN's, through the interface for PyTorch's own kernels (at::native::cpublas::brgemm);
// without, where oneDNN is slow for them, those of tiles.h.
//
// A tile is computed for a key-value head with all query heads that share it. Inputs are copied, with lengths padded to
// blocks of queries and head dimensions padded to `dim`, so no input shape needs a new kernel.
//
// Names: Sq queries and Sk keys of a tile, D head dimension (padded), R = kRows queries of a block, N keys of a block.

#pragma once

#include <atomic>
#include <vector>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "attention_rows.h"

namespace internlm {

constexpr int64_t kRows = 64;     // queries of a block
constexpr int64_t kColumns = 256; // maximum keys of a block; a multiple of kRows
constexpr float kMasked = 1e30f;  // finite, so that the difference of two is not NaN

// Query i sees key j if 0 <= distance + i - j < window. Every query sees a key, so distance >= 0.
struct Tile {
  int64_t num_queries, num_keys, distance, window;

  int64_t padded_keys() const {
    return round_up(num_keys, kRows);
  }

  // The range of keys, in whole blocks of kRows, that any of the queries [start, start + kRows) sees.
  int64_t first_key(int64_t start) const {
    return std::max<int64_t>(0, distance + start - window + 1) / kRows * kRows;
  }
  int64_t last_key(int64_t start) const {
    return std::min(padded_keys(), round_up(distance + start + kRows, kRows));
  }
};

// What all tiles of a call have in common: query heads of a key-value head, head dimension (padded), factor on scores, and
// the largest number of padded keys.
struct Sizes {
  int64_t group, dim;
  float scale;
  int64_t longest;

  int64_t forward_floats() const {
    return kRows * (kColumns + dim + 2);
  }
  int64_t forward_halves() const {
    return 3 * longest * dim + kRows * (dim + kColumns);
  }
  int64_t backward_floats() const {
    return 2 * longest * dim + kRows * (2 * kColumns + 2 * dim + 2);
  }
  int64_t backward_halves() const {
    return 4 * longest * dim + kRows * (6 * dim + 3 * kColumns);
  }
};

// Runs work(item, floats, halves) for every item; floats and halves are buffers of the thread.
template <typename Work>
void run_items(int64_t num_items, int64_t num_floats, int64_t num_halves, const Work& work) {
  const int64_t threads = std::min<int64_t>(num_items, at::get_num_threads());
  const at::Tensor floats = at::empty({threads, num_floats}, at::kFloat);
  const at::Tensor halves = at::empty({threads, num_halves}, at::kBFloat16);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t end) {
    if (thread == end) return;
    auto* own_floats = floats.data_ptr<float>() + thread * num_floats;
    auto* own_halves = halves.data_ptr<BFloat16>() + thread * num_halves;
    // Dynamic scheduling, because items have different sizes.
    for (int64_t item = next++; item < num_items; item = next++) work(item, own_floats, own_halves);
    if (has_matrix_units()) at::native::cpublas::brgemm_release();
  });
}

// One step of the online softmax: unnormalized probabilities of a block of keys, and the rescaling of earlier results.
//   scores [kRows, kColumns] of keys `begin` to `begin + width` -> weights, bf16, zero where a key is masked
//   largest, sum: maximum score and sum of weights over all keys so far; total [kRows, dim]: weighted values so far
inline void online_softmax(
    const Tile& tile, const Sizes& sizes, int64_t start, int64_t begin, int64_t width, const float* scores,
    BFloat16* weights, float* largest, float* sum, float* total) {
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t query = tile.distance + start + i;
    const int64_t low = std::max<int64_t>(0, query - tile.window + 1 - begin);
    const int64_t high = std::min({width, tile.num_keys - begin, query + 1 - begin});
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
    const __m512 scale = _mm512_set1_ps(sizes.scale), offset = _mm512_set1_ps(-now * sizes.scale);
    __m512 added = _mm512_setzero_ps();
    std::memset(static_cast<void*>(to), 0, from * sizeof(BFloat16));
    for (int64_t j = from; j < until; j += kLanes) {
      const __m512 exponent = _mm512_fmadd_ps(scale, _mm512_loadu_ps(row + j), offset);
      const __m512 weight = _mm512_maskz_mov_ps(lanes(low - j, high - j), exponential(exponent));
      added = _mm512_add_ps(added, weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), to_bf16(weight));
    }
    std::memset(static_cast<void*>(to + until), 0, (width - until) * sizeof(BFloat16));
    const float before = std::exp((largest[i] - now) * sizes.scale);
    if (before != 1.0f)
      for (int64_t j = 0; j < sizes.dim; j += kLanes) {
        float* numbers = total + i * sizes.dim + j;
        _mm512_storeu_ps(numbers, _mm512_mul_ps(_mm512_set1_ps(before), _mm512_loadu_ps(numbers)));
      }
    sum[i] = sum[i] * before + _mm512_reduce_add_ps(added);
    largest[i] = now;
  }
}

// Attention to the keys of a tile. query(member) is the Head of a query head of the group.
// finish(member, start, valid, total, factors, lse) takes the result of queries [start, start + valid): the rows of total
// [valid, dim] times factors [valid], and the log-sum-exp [valid].
template <typename Query, typename Finish>
void forward_tile(
    const Tile& tile, const Sizes& sizes, const Query& query, const Head& key, const Head& value, float* floats,
    BFloat16* halves, const Finish& finish) {
  const int64_t dim = sizes.dim, padded = tile.padded_keys();
  float *scores = floats, *total = scores + kRows * kColumns, *largest = total + kRows * dim, *sum = largest + kRows;
  BFloat16 *rows = halves, *keys = rows + padded * dim, *values = keys + padded * dim, *queries = values + padded * dim,
           *weights = queries + kRows * dim;
  key.read(0, padded, tile.num_keys, dim, rows);
  pair_transposed(rows, padded, dim, keys);
  value.read(0, padded, tile.num_keys, dim, rows);
  pair_rows(rows, padded, dim, values);
  for (int64_t member = 0; member < sizes.group; ++member)
    for (int64_t start = 0; start < tile.num_queries; start += kRows) {
      query(member).read(start, kRows, tile.num_queries, dim, queries);
      std::fill_n(largest, kRows, -kMasked);
      std::fill_n(sum, kRows, 0.0f);
      std::memset(total, 0, kRows * dim * sizeof(float));
      const int64_t first = tile.first_key(start), last = tile.last_key(start);
      for (int64_t begin = first; begin < last; begin += kColumns) {
        const int64_t width = std::min(kColumns, last - begin);
        multiply(kRows, width, dim, dim, padded, kColumns, false, queries, keys + 2 * begin, scores);
        online_softmax(tile, sizes, start, begin, width, scores, weights, largest, sum, total);
        multiply(kRows, dim, width, kColumns, dim, dim, true, weights, values + begin * dim, total);
      }
      const int64_t valid = std::min(kRows, tile.num_queries - start);
      for (int64_t i = 0; i < valid; ++i) {
        largest[i] = largest[i] * sizes.scale + std::log(sum[i]);
        sum[i] = 1.0f / sum[i];
      }
      finish(member, start, valid, total, sum, largest);
    }
}

// Transposed scores and gradients of probabilities [width, kRows] of keys `begin` to `begin + width` -> probabilities, and
// gradients of scores (without the factor `scale`), the latter also paired.
inline void softmax_backward(
    const Tile& tile, const Sizes& sizes, int64_t start, int64_t begin, int64_t width, const float* scores,
    const float* gradients, const float* lse, const float* delta, BFloat16* probabilities, BFloat16* score_gradients,
    BFloat16* paired) {
  const __m512 scale = _mm512_set1_ps(sizes.scale);
  for (int64_t n = 0; n < width; n += 2)
    for (int64_t c = 0; c < kRows; c += kLanes) {
      const __m512 row_lse = _mm512_loadu_ps(lse + c), mean = _mm512_loadu_ps(delta + c);
      __m512i words[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = (n + i) * kRows + c;
        const int64_t key = begin + n + i, lane = key - tile.distance - start - c; // the lane of the query at this key
        const __mmask16 seen = key < tile.num_keys ? lanes(lane, lane + tile.window) : 0;
        const __m512 exponent = _mm512_fmsub_ps(scale, _mm512_loadu_ps(scores + at), row_lse);
        const __m512 p = _mm512_maskz_mov_ps(seen, exponential(exponent));
        const __m512 d = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(gradients + at), mean));
        const __m256i rounded = to_bf16(d);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + at), to_bf16(p));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(score_gradients + at), rounded);
        words[i] = _mm512_cvtepu16_epi32(rounded);
      }
      _mm512_storeu_si512(paired + n * kRows + 2 * c, _mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16)));
    }
}

// Contributions of the keys of a tile to the gradients.
//   query(member), out_grad(member): the Head of a query head, and of the gradient of its result
//   prepare(member, start, valid, out_grads, scratch, delta, lse): sets, for queries [start, start + valid), the sum over D
//     of the result times its gradient `out_grads` [kRows, dim], and the log-sum-exp, of all keys; scratch [kRows, dim]
//   add_queries(member, start, valid, sums), add_keys(key_sums, value_sums): take sums [valid or Sk, dim]; those of queries
//     and keys lack the factor `scale`
template <typename Query, typename OutGrad, typename Prepare, typename AddQueries, typename AddKeys>
void backward_tile(
    const Tile& tile, const Sizes& sizes, const Query& query, const OutGrad& out_grad, const Head& key,
    const Head& value, float* floats, BFloat16* halves, const Prepare& prepare, const AddQueries& add_queries,
    const AddKeys& add_keys) {
  const int64_t dim = sizes.dim, padded = tile.padded_keys();
  float *key_sums = floats, *value_sums = key_sums + padded * dim, *scores = value_sums + padded * dim,
        *gradients = scores + kRows * kColumns, *query_sums = gradients + kRows * kColumns,
        *transposed = query_sums + kRows * dim, *lse = transposed + kRows * dim, *delta = lse + kRows;
  BFloat16 *keys = halves, *values = keys + padded * dim, *keys_t = values + padded * dim,
           *scratch = keys_t + padded * dim, *queries = scratch + padded * dim, *out_grads = queries + kRows * dim,
           *paired_queries = out_grads + kRows * dim, *paired_out_grads = paired_queries + kRows * dim,
           *queries_t = paired_out_grads + kRows * dim, *out_grads_t = queries_t + kRows * dim,
           *probabilities = out_grads_t + kRows * dim, *score_gradients = probabilities + kRows * kColumns,
           *paired_gradients = score_gradients + kRows * kColumns;
  key.read(0, padded, tile.num_keys, dim, keys);
  value.read(0, padded, tile.num_keys, dim, values);
  pair_transposed(keys, padded, dim, scratch);
  unpair(scratch, padded, dim, keys_t);
  std::memset(key_sums, 0, padded * dim * sizeof(float));
  std::memset(value_sums, 0, padded * dim * sizeof(float));
  for (int64_t member = 0; member < sizes.group; ++member)
    for (int64_t start = 0; start < tile.num_queries; start += kRows) {
      const int64_t valid = std::min(kRows, tile.num_queries - start);
      out_grad(member).read(start, kRows, tile.num_queries, dim, out_grads);
      std::fill_n(delta, kRows, 0.0f);
      std::fill_n(lse, kRows, kMasked);
      prepare(member, start, valid, out_grads, queries, delta, lse);
      query(member).read(start, kRows, tile.num_queries, dim, queries);
      pair_rows(queries, kRows, dim, paired_queries);
      pair_rows(out_grads, kRows, dim, paired_out_grads);
      pair_transposed(queries, kRows, dim, queries_t);
      pair_transposed(out_grads, kRows, dim, out_grads_t);
      const int64_t first = tile.first_key(start), last = tile.last_key(start);
      for (int64_t begin = first; begin < last; begin += kColumns) {
        const int64_t width = std::min(kColumns, last - begin), at = begin * dim;
        multiply(width, kRows, dim, dim, kRows, kRows, false, keys + at, queries_t, scores);
        multiply(width, kRows, dim, dim, kRows, kRows, false, values + at, out_grads_t, gradients);
        softmax_backward(
            tile, sizes, start, begin, width, scores, gradients, lse, delta, probabilities, score_gradients,
            paired_gradients);
        multiply(width, dim, kRows, kRows, dim, dim, true, probabilities, paired_out_grads, value_sums + at);
        multiply(width, dim, kRows, kRows, dim, dim, true, score_gradients, paired_queries, key_sums + at);
        multiply(dim, kRows, width, padded, kRows, kRows, begin > first, keys_t + begin, paired_gradients, query_sums);
      }
      transpose_words(query_sums, dim, kRows, transposed, dim);
      add_queries(member, start, valid, transposed);
    }
  add_keys(key_sums, value_sums);
}

} // namespace internlm
