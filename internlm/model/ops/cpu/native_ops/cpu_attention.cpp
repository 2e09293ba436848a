// Causal attention in bf16 over documents of any lengths.
//
// A work item of a thread is a document and a key-value head with all query heads that share it, so results do not depend
// on the number of threads.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/library.h>

#include "attention_tile.h"

namespace {

using at::BFloat16;
using at::Tensor;
using internlm::Head;
using internlm::kLanes;
using internlm::kRows;
using internlm::Sizes;
using internlm::Tile;

struct Document {
  int64_t row, start, length;
};

// The arguments of a call, shared by all work items.
struct Call {
  std::vector<Document> documents; // the longest first
  int64_t num_heads, num_kv_heads, length, window;
  Sizes sizes;

  Call(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bounds, std::optional<int64_t> window, double scale)
      : num_heads(q.size(2)),
        num_kv_heads(k.size(2)),
        length(q.size(1)),
        window(window.value_or(q.size(1) + 1)),
        sizes{q.size(2) / k.size(2), internlm::round_up(q.size(3), 32), static_cast<float>(scale), 0} {
    if (bounds) {
      const auto* limits = bounds->const_data_ptr<int32_t>();
      for (int64_t i = 0; i + 1 < bounds->numel(); ++i)
        if (limits[i + 1] > limits[i]) documents.push_back({0, limits[i], limits[i + 1] - limits[i]});
    } else if (length > 0) {
      for (int64_t row = 0; row < q.size(0); ++row) documents.push_back({row, 0, length});
    }
    std::stable_sort(documents.begin(), documents.end(), [](const auto& a, const auto& b) { return a.length > b.length; });
    if (!documents.empty()) sizes.longest = internlm::round_up(documents.front().length, kRows);
  }

  Head head(const Tensor& x, const Document& document, int64_t index) const {
    auto* first = x.data_ptr<BFloat16>() + document.row * x.stride(0) + document.start * x.stride(1) + index * x.stride(2);
    return {first, x.stride(1), x.size(3)};
  }

  Tile tile(const Document& document) const {
    return {document.length, document.length, 0, window};
  }

  // The log-sum-exp of a query head in [B, H, S].
  float* lse(const Tensor& x, const Document& document, int64_t index) const {
    return x.data_ptr<float>() + (document.row * num_heads + index) * length + document.start;
  }

  // Runs work(document, key-value head, floats, halves) for every item.
  template <typename Work>
  void run(int64_t num_floats, int64_t num_halves, const Work& work) const {
    const int64_t num_items = static_cast<int64_t>(documents.size()) * num_kv_heads;
    internlm::run_items(num_items, num_floats, num_halves, [&](int64_t item, float* floats, BFloat16* halves) {
      work(documents[item / num_kv_heads], item % num_kv_heads, floats, halves);
    });
  }
};

// Attention of q [B, S, H, D] to k, v [B, S, K, D], bf16 -> result [B, S, H, D], and lse [B, H, S], fp32.
//   bounds: int32 [n + 1], bounds of the documents of the only row; none: each row is one document.
//   window: maximum number of keys that a query attends to, itself included.
std::tuple<Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bounds, std::optional<int64_t> window,
    double scale) {
  const Call call(q, k, bounds, window, scale);
  const Sizes& sizes = call.sizes;
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  const auto work = [&](const Document& document, int64_t kv_head, float* floats, BFloat16* halves) {
    const int64_t first = kv_head * sizes.group;
    internlm::forward_tile(
        call.tile(document), sizes, [&](int64_t member) { return call.head(q, document, first + member); },
        call.head(k, document, kv_head), call.head(v, document, kv_head), floats, halves,
        [&](int64_t member, int64_t start, int64_t valid, const float* total, const float* factors, const float* row_lse) {
          std::copy_n(row_lse, valid, call.lse(lse, document, first + member) + start);
          call.head(out, document, first + member).write(start, valid, total, sizes.dim, 0.0f, factors);
        });
  };
  call.run(sizes.forward_floats(), sizes.forward_halves(), work);
  return {out, lse};
}

// Gradients of q, k, v. `grad` is the gradient of the result; out and lse are from `forward`.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& bounds, std::optional<int64_t> window, double scale) {
  const Call call(q, k, bounds, window, scale);
  const Sizes& sizes = call.sizes;
  const int64_t dim = sizes.dim;
  Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()),
         grad_v = at::empty(v.sizes(), v.options());
  const auto work = [&](const Document& document, int64_t kv_head, float* floats, BFloat16* halves) {
    const int64_t first = kv_head * sizes.group;
    const auto prepare = [&](int64_t member, int64_t start, int64_t valid, const BFloat16* out_grads, BFloat16* rows,
                             float* delta, float* row_lse) {
      call.head(out, document, first + member).read(start, kRows, document.length, dim, rows);
      std::copy_n(call.lse(lse, document, first + member) + start, valid, row_lse);
      for (int64_t i = 0; i < kRows; ++i) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = i * dim; j < (i + 1) * dim; j += kLanes)
          sum = _mm512_fmadd_ps(internlm::load_bf16(rows + j), internlm::load_bf16(out_grads + j), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
      }
    };
    internlm::backward_tile(
        call.tile(document), sizes, [&](int64_t member) { return call.head(q, document, first + member); },
        [&](int64_t member) { return call.head(grad, document, first + member); }, call.head(k, document, kv_head),
        call.head(v, document, kv_head), floats, halves, prepare,
        [&](int64_t member, int64_t start, int64_t valid, const float* sums) {
          call.head(grad_q, document, first + member).write(start, valid, sums, dim, sizes.scale);
        },
        [&](const float* key_sums, const float* value_sums) {
          call.head(grad_k, document, kv_head).write(0, document.length, key_sums, dim, sizes.scale);
          call.head(grad_v, document, kv_head).write(0, document.length, value_sums, dim, 1.0f);
        });
  };
  call.run(sizes.backward_floats(), sizes.backward_halves(), work);
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
