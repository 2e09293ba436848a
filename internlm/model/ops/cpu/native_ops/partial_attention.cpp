// Attention in bf16 to some of the keys, merged into a running result in fp32.
//
// A work item of a thread is a key-value head and tiles that share queries or keys, one after the other, so results do not
// depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/library.h>

#include "attention_tile.h"

namespace {

using at::BFloat16;
using at::Tensor;
using internlm::Head;
using internlm::kLanes;
using internlm::Sizes;
using internlm::Tile;

struct PlacedTile {
  Tile tile;
  int64_t query, key; // the first ones
};

// The numbers of tiles that share queries or keys, directly or through others, in their order.
std::vector<std::vector<int64_t>> connected(const std::vector<PlacedTile>& tiles) {
  std::vector<int64_t> parent(tiles.size()), order(tiles.size());
  std::iota(parent.begin(), parent.end(), 0);
  std::iota(order.begin(), order.end(), 0);
  const auto root = [&](int64_t i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
  };
  // In the order of their starts, a range overlaps an earlier one if it starts before the furthest stop.
  const auto join_overlapping = [&](const auto& start_of, const auto& length_of) {
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return start_of(tiles[a]) < start_of(tiles[b]); });
    int64_t stop = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      const PlacedTile& tile = tiles[order[i]];
      if (i > 0 && start_of(tile) < stop) parent[root(order[i])] = root(order[i - 1]);
      stop = std::max(stop, start_of(tile) + length_of(tile));
    }
  };
  join_overlapping([](const auto& t) { return t.query; }, [](const auto& t) { return t.tile.num_queries; });
  join_overlapping([](const auto& t) { return t.key; }, [](const auto& t) { return t.tile.num_keys; });
  std::vector<std::vector<int64_t>> found;
  std::vector<int64_t> number(tiles.size(), -1);
  for (size_t i = 0; i < tiles.size(); ++i) {
    int64_t& own = number[root(i)];
    if (own < 0) {
      own = static_cast<int64_t>(found.size());
      found.emplace_back();
    }
    found[own].push_back(i);
  }
  return found;
}

// The arguments of a call, shared by all work items.
//   numbers: of each tile q_start, q_stop, k_start, k_stop, distance, window; every query of a tile sees one of its keys
struct Call {
  std::vector<PlacedTile> tiles;
  std::vector<std::vector<int64_t>> groups;
  int64_t num_kv_heads;
  Sizes sizes;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef numbers, double scale)
      : num_kv_heads(k.size(1)),
        sizes{
            q.size(1) / k.size(1), internlm::round_up(std::max(q.size(2), v.size(2)), 32), static_cast<float>(scale), 0} {
    for (size_t i = 0; i < numbers.size(); i += 6) {
      const Tile tile{numbers[i + 1] - numbers[i], numbers[i + 3] - numbers[i + 2], numbers[i + 4], numbers[i + 5]};
      TORCH_CHECK(tile.num_queries > 0 && tile.num_keys > 0 && tile.distance >= 0, "a query of a tile sees no key");
      tiles.push_back({tile, numbers[i], numbers[i + 2]});
      sizes.longest = std::max(sizes.longest, tile.padded_keys());
    }
    groups = connected(tiles);
  }

  // Runs work(tile, key-value head, floats, halves) for every tile and head.
  template <typename Work>
  void run(int64_t num_floats, int64_t num_halves, const Work& work) const {
    const int64_t num_items = static_cast<int64_t>(groups.size()) * num_kv_heads;
    internlm::run_items(num_items, num_floats, num_halves, [&](int64_t item, float* floats, BFloat16* halves) {
      for (const int64_t number : groups[item / num_kv_heads]) work(tiles[number], item % num_kv_heads, floats, halves);
    });
  }
};

// A head of a bf16 tensor [S, heads, D] from row `start` on.
Head head(const Tensor& x, int64_t start, int64_t index) {
  return {x.data_ptr<BFloat16>() + start * x.stride(0) + index * x.stride(1), x.stride(0), x.size(2)};
}

// Row and head of an fp32 tensor [S, heads, D] or [S, heads].
float* row(const Tensor& x, int64_t token, int64_t index) {
  return x.data_ptr<float>() + token * x.stride(0) + index * x.stride(1);
}

// to += factor * from.
void add_row(float factor, const float* from, int64_t dim, float* to) {
  for (int64_t j = 0; j < dim; j += kLanes) {
    const __mmask16 mask = internlm::lanes(0, dim - j);
    const __m512 before = _mm512_maskz_loadu_ps(mask, to + j);
    _mm512_mask_storeu_ps(to + j, mask, _mm512_fmadd_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(from + j), before));
  }
}

void add_rows(const Tensor& x, int64_t start, int64_t index, int64_t rows, float factor, const float* from, int64_t dim) {
  for (int64_t i = 0; i < rows; ++i) add_row(factor, from + i * dim, x.size(2), row(x, start + i, index));
}

// out += share * (factor * other - out).
void move_row(float share, float factor, const float* other, int64_t dim, float* out) {
  for (int64_t j = 0; j < dim; j += kLanes) {
    const __mmask16 mask = internlm::lanes(0, dim - j);
    const __m512 before = _mm512_maskz_loadu_ps(mask, out + j);
    const __m512 change = _mm512_fmsub_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(other + j), before);
    _mm512_mask_storeu_ps(out + j, mask, _mm512_fmadd_ps(_mm512_set1_ps(share), change, before));
  }
}

// Merges attention of q [Sq, H, D] to keys k [Sk, K, D] and values v [Sk, K, D'], bf16, into out [Sq, H, D'] and
// lse [Sq, H], fp32.
void forward(
    const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef tiles,
    double scale) {
  const Call call(q, k, v, tiles, scale);
  const Sizes& sizes = call.sizes;
  const auto work = [&](const PlacedTile& placed, int64_t kv_head, float* floats, BFloat16* halves) {
    const int64_t first = kv_head * sizes.group;
    const auto merge = [&](int64_t member, int64_t start, int64_t valid, const float* total, const float* factors,
                           const float* other_lse) {
      for (int64_t i = 0; i < valid; ++i) {
        const int64_t token = placed.query + start + i;
        float& own = *row(lse, token, first + member);
        // At the first merge the difference is infinite: the weight of the smaller one is 0, the share 1.
        const float smaller = std::exp(-std::abs(other_lse[i] - own));
        const float share = (other_lse[i] >= own ? 1.0f : smaller) / (1.0f + smaller);
        move_row(share, factors[i], total + i * sizes.dim, out.size(2), row(out, token, first + member));
        own = std::max(own, other_lse[i]) + std::log(1.0f + smaller);
      }
    };
    internlm::forward_tile(
        placed.tile, sizes, [&](int64_t member) { return head(q, placed.query, first + member); },
        head(k, placed.key, kv_head), head(v, placed.key, kv_head), floats, halves, merge);
  };
  call.run(sizes.forward_floats(), sizes.forward_halves(), work);
}

// Adds the contributions of the tiles to the gradients of q, k and v, fp32. grad_out is in bf16; out and lse, in fp32, are
// those over all keys.
void backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    at::IntArrayRef tiles, double scale, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  const Call call(q, k, v, tiles, scale);
  const Sizes& sizes = call.sizes;
  const int64_t dim = sizes.dim;
  const auto work = [&](const PlacedTile& placed, int64_t kv_head, float* floats, BFloat16* halves) {
    const int64_t first = kv_head * sizes.group;
    const auto prepare = [&](int64_t member, int64_t start, int64_t valid, const BFloat16* out_grads, BFloat16*,
                             float* delta, float* row_lse) {
      for (int64_t i = 0; i < valid; ++i) {
        const int64_t token = placed.query + start + i;
        const float* result = row(out, token, first + member);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < out.size(2); j += kLanes) {
          const __m512 numbers = _mm512_maskz_loadu_ps(internlm::lanes(0, out.size(2) - j), result + j);
          sum = _mm512_fmadd_ps(numbers, internlm::load_bf16(out_grads + i * dim + j), sum);
        }
        delta[i] = _mm512_reduce_add_ps(sum);
        row_lse[i] = *row(lse, token, first + member);
      }
    };
    internlm::backward_tile(
        placed.tile, sizes, [&](int64_t member) { return head(q, placed.query, first + member); },
        [&](int64_t member) { return head(grad_out, placed.query, first + member); }, head(k, placed.key, kv_head),
        head(v, placed.key, kv_head), floats, halves, prepare,
        [&](int64_t member, int64_t start, int64_t valid, const float* sums) {
          add_rows(grad_q, placed.query + start, first + member, valid, sizes.scale, sums, dim);
        },
        [&](const float* key_sums, const float* value_sums) {
          add_rows(grad_k, placed.key, kv_head, placed.tile.num_keys, sizes.scale, key_sums, dim);
          add_rows(grad_v, placed.key, kv_head, placed.tile.num_keys, 1.0f, value_sums, dim);
        });
  };
  call.run(sizes.backward_floats(), sizes.backward_halves(), work);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(internlm_native, library) {
  library.def(
      "add_partial_attention(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, int[] tiles, float scale) -> ()");
  library.def(
      "partial_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] tiles,"
      " float scale, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
}

TORCH_LIBRARY_IMPL(internlm_native, CPU, library) {
  library.impl("add_partial_attention", &forward);
  library.impl("partial_attention_backward", &backward);
}
