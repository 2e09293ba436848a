"""The decoder: one class for every family, written for a single device.

Shapes: B sequences, S tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.model.architecture import Architecture
from internlm.model.initialization import set_initializer
from internlm.model.layer_kinds import STANDARD
from internlm.model.layer_protocol import run_layers
from internlm.model.modules.cache import CachedRows, KeyValueCache
from internlm.model.modules.linear import make_linear
from internlm.model.modules.norm import LayerNorm, RMSNorm
from internlm.model.modules.rotary import RotaryEmbedding
from internlm.model.moe.router import Router
from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.linear import linear
from internlm.model.ops.rotary import RotaryTables
from internlm.model.recompute import SavePolicy, TensorStore, recomputed
from internlm.model.roles import HeadShape, Role

DECODER_ROLES: dict[str, Role] = {
    "tok_embeddings": Role.EMBEDDING,
    "layers.*.attention.wqkv": Role.ATTENTION_QKV,
    "layers.*.attention.wq": Role.ATTENTION_Q,
    "layers.*.attention.wk": Role.ATTENTION_KV,
    "layers.*.attention.wv": Role.ATTENTION_KV,
    "layers.*.attention.wo": Role.ATTENTION_OUT,
    "layers.*.attention.wq_a": Role.LATENT,
    "layers.*.attention.wq_b": Role.ATTENTION_Q,
    "layers.*.attention.wkv_a": Role.LATENT,
    "layers.*.attention.wkv_b": Role.ATTENTION_KV,
    "layers.*.attention.q_norm": Role.PER_HEAD,
    "layers.*.attention.k_norm": Role.PER_HEAD,
    "layers.*.attention.sinks": Role.PER_QUERY_CHANNEL,
    "layers.*.feed_forward.w1": Role.COLUMN,
    "layers.*.feed_forward.w3": Role.COLUMN,
    "layers.*.feed_forward.w13": Role.COLUMN_PAIR,
    "layers.*.feed_forward.w2": Role.ROW,
    "layers.*.feed_forward.router": Role.ROUTER,
    "layers.*.feed_forward.experts": Role.EXPERTS,
    "layers.*.feed_forward.shared.w1": Role.COLUMN,
    "layers.*.feed_forward.shared.w3": Role.COLUMN,
    "layers.*.feed_forward.shared.w13": Role.COLUMN_PAIR,
    "layers.*.feed_forward.shared.w2": Role.ROW,
    "layers.*.eh_proj": Role.COLUMN_TO_RESIDUAL,
    "output": Role.HEAD,
}

_PROJECTION_NORM_ROLES = {
    "layers.*.attention.q_norm": Role.PER_QUERY_CHANNEL,
    "layers.*.attention.k_norm": Role.PER_KV_CHANNEL,
}


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream.

    Attributes:
        has_saved_operators: whether the layer runs operators that every save policy saves: it chooses experts, or its
            attention communicates.
        block_dtype: dtype of attention and feed-forward if it differs from that of the residual stream; else None.
        save_policy, store: see `internlm.model.layer_protocol.RecomputableLayer`.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        kind = architecture.layer_kinds.get(layer, STANDARD)
        self.attention_norm = make_norm(architecture)
        self.attention = kind.attention(architecture, layer)
        self.ffn_norm = make_norm(architecture)
        self.feed_forward = kind.feed_forward(architecture, layer)
        self.has_saved_operators = any(isinstance(module, Router) for module in self.feed_forward.modules())
        # With an fp32 residual stream, attention and feed-forward still run in the dtype of the model.
        self.block_dtype = architecture.dtype if architecture.residual_in_fp32 else None
        self.save_policy: SavePolicy = architecture.save_policies[layer]
        self.store: TensorStore | None = None

    def forward(
        self,
        hidden: Tensor,
        rotary: RotaryTables,
        varlen: VarlenMetadata | None = None,
        cache: CachedRows | None = None,
        *inputs: Tensor,
    ) -> Tensor:
        """Residual stream `[B, S, h]` -> `[B, S, h]`; `inputs` are those of `compute` in a subclass."""
        run = recomputed(self.compute, self.save_policy, self.store, has_saved_operators=self.has_saved_operators)
        return run(hidden, rotary, varlen, cache, *inputs)

    def compute(
        self, hidden: Tensor, rotary: RotaryTables, varlen: VarlenMetadata | None, cache: CachedRows | None
    ) -> Tensor:
        """As `forward`, without recomputation."""
        hidden = hidden + self.attention(self.attention_norm(hidden).to(self.block_dtype), rotary, varlen, cache)
        return hidden + self.feed_forward(self.ffn_norm(hidden).to(self.block_dtype))


class MultiTokenLayer(DecoderLayer):
    """Predicts a token after the next one, from hidden states and from the embedding of the token in between.

    Layer m of them computes `h_m = norm(layer(eh_proj [enorm(e); hnorm(h)]))`, where h are the hidden states that the
    head reads, of the model (m = 1) or of layer m - 1, and e is the embedding of the token m positions later. The head
    of the model predicts the token m + 1 positions later from h_m. All else is as in the last layer of the model.

    Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 21-23.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__(architecture.with_multi_token_layers, layer)
        a = architecture
        self.enorm = make_norm(a)
        self.hnorm = make_norm(a)
        self.eh_proj = make_linear(a, 2 * a.hidden_size, a.hidden_size, False, a.init.attention_other)
        self.norm = make_norm(a)
        self.dtype = a.dtype

    def compute(
        self,
        hidden: Tensor,
        rotary: RotaryTables,
        varlen: VarlenMetadata | None,
        cache: CachedRows | None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Hidden states and the residual stream of embeddings, `[B, S, h]` each -> hidden states `[B, S, h]`.

        Without recomputation, unlike `forward`.
        """
        assert embedded is not None
        joined = torch.cat([self.enorm(embedded).to(self.dtype), self.hnorm(hidden).to(self.dtype)], dim=-1)
        stream = self.eh_proj(joined).to(embedded.dtype)
        return self.norm(super().compute(stream, rotary, varlen, cache)).to(hidden.dtype)


class Decoder(nn.Module):
    """A decoder-only language model that returns hidden states; `logits` applies the output head.

    A pipeline stage is a decoder from which `keep_stage` has removed all other parts.

    Attributes:
        architecture: its specification.
        roles: how each weight may be split (glob pattern over module names -> `Role`).
        heads: the heads by which attention roles are split.
        attention_windows: sliding window (None: no limit) -> number of layers of the whole model that have it.
        vocab_size: V.
        has_tied_head: the output head is the embedding.
        layers: by number, "0" to "L - 1"; layers that predict later tokens follow.
        offloading: moves activations to host memory; None: they stay on the device. May be set before training.
        is_first: its input is token ids; otherwise the residual stream.
        is_last: it ends with the final norm; otherwise its output is the residual stream.
        residual_size, residual_dtype: of the residual stream between stages.
    """

    roles: Mapping[str, Role]

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        self.roles = (
            DECODER_ROLES
            | (_PROJECTION_NORM_ROLES if a.norms_whole_projections else {})
            | {
                f"layers.{layer}.{pattern}": role
                for layer, kind in a.layer_kinds.items()
                for pattern, role in kind.roles.items()
            }
        )
        self.tok_embeddings = nn.Embedding(a.vocab_size, a.hidden_size, dtype=a.dtype)
        set_initializer(self.tok_embeddings.weight, a.init.initializer(a.init.embedding))
        self.heads = HeadShape(a.num_heads, a.num_kv_heads, a.head_dim)
        self.attention_windows = Counter(a.windows)
        self.vocab_size, self.has_tied_head = a.vocab_size, a.tie_word_embeddings
        self.offloading: Offloading | None = None
        self.is_first = self.is_last = True
        self.residual_size = a.hidden_size
        self.residual_dtype = torch.float32 if a.residual_in_fp32 else a.dtype
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(a, layer) for layer in range(a.num_layers)})
        for layer in a.multi_token_layers:
            self.layers[str(layer)] = MultiTokenLayer(a, layer)
        self.norm = make_norm(a)
        if not a.tie_word_embeddings:
            self.output = nn.Linear(a.hidden_size, 1 if a.is_reward else a.vocab_size, bias=False, dtype=a.dtype)
            set_initializer(self.output.weight, a.init.initializer(a.init.head))
        self.rotary = RotaryEmbedding(a.rope)

    def keep_stage(self, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Remove everything that is not part of one pipeline stage; see `PipelineModel.keep_stage`."""
        a = self.architecture
        later = a.multi_token_layers if is_last else range(0)
        for name in list(self.layers):
            if int(name) not in layers and int(name) not in later:
                del self.layers[name]
        self.is_first, self.is_last = is_first, is_last
        if not is_last:
            del self.norm
        if not is_first and not (is_last and (a.tie_word_embeddings or later)):
            del self.tok_embeddings
        if not is_last and not a.tie_word_embeddings:
            del self.output

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        varlen: VarlenMetadata | None = None,
        cache: CachedRows | None = None,
        later_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            inputs: token ids, int64 `[B, S]`; in a later pipeline stage the residual stream `[B, S, h]`.
            position_ids: int64 `[B, S]`, position of each token in its document; 0 in the padding of a row.
            varlen: documents of a packed row (B = 1); None: each row is one document.
            cache: rows with the keys and values of earlier tokens; the new ones are appended. Not for packed rows.
            later_ids: int64 `[D B, S]`, the tokens 1, 2 ... D positions later, for the D layers that predict tokens
                after the next one. None: these layers are left out.

        Returns:
            `[B, S, h]` in the dtype of the model; in an earlier pipeline stage the residual stream. With `later_ids`
            `[(1 + D) B, S, h]`, followed by the hidden states of each of these layers.
        """
        hidden = self.embed(inputs) if self.is_first else inputs
        return self.run(hidden, position_ids, varlen, cache, later_ids)

    def run(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        varlen: VarlenMetadata | None,
        cache: CachedRows | None,
        later_ids: Tensor | None,
    ) -> Tensor:
        """As `forward`, from the residual stream `[B, S, h]` in front of the layers."""
        rotary = self.rotary.tables(position_ids, self.architecture.dtype, varlen)
        layers = self.numbered_layers().items()
        hidden = run_layers(layers, hidden, rotary, varlen, cache, offloading=self.offloading)
        if cache is not None:
            cache.advance(hidden.shape[1])
        if not self.is_last:
            return hidden
        hidden = self.finish(hidden)
        if later_ids is None:
            return hidden
        results = [hidden]
        for layer, embedded in zip(
            self.later_layers().values(), self.embed(later_ids).split(hidden.shape[0]), strict=True
        ):
            results.append(layer(results[-1], rotary, varlen, None, embedded))
        return torch.cat(results)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids `[B, S]` -> the residual stream `[B, S, h]`."""
        return self.to_stream(self.tok_embeddings(input_ids))

    def to_stream(self, hidden: Tensor) -> Tensor:
        """Embeddings `[B, S, h]`, as looked up -> the residual stream."""
        a = self.architecture
        if a.embed_grad_scale != 1.0:
            hidden = _ScaleGradient.apply(hidden, a.embed_grad_scale)
        if a.embedding_multiplier != 1.0:
            # Published weights were trained with the factor rounded to the dtype of the model.
            hidden = hidden * torch.tensor(a.embedding_multiplier, dtype=hidden.dtype, device="cpu").item()
        return hidden.float() if a.residual_in_fp32 else hidden

    def numbered_layers(self) -> dict[int, DecoderLayer]:
        """The layers by their number in the whole model, in order, without those that predict later tokens."""
        numbered = {int(name): layer for name, layer in self.layers.items()}
        return {number: layer for number, layer in numbered.items() if number < self.architecture.num_layers}  # type: ignore[misc]

    def later_layers(self) -> dict[int, MultiTokenLayer]:
        """The layers that predict later tokens by their number, in order; empty before the last pipeline stage."""
        numbers = self.architecture.multi_token_layers
        return {number: self.layers[str(number)] for number in numbers if str(number) in self.layers}  # type: ignore[misc]

    def finish(self, hidden: Tensor) -> Tensor:
        """The residual stream `[B, S, h]` -> hidden states for the head."""
        hidden = self.norm(hidden)
        return hidden.to(self.architecture.dtype) if self.architecture.residual_in_fp32 else hidden

    def head_weight(self) -> Tensor:
        """Weight of the output head, `[V, h]` (reward model: `[1, h]`), normalized if `norm_head` is set."""
        weight = self.tok_embeddings.weight if self.architecture.tie_word_embeddings else self.output.weight
        return F.normalize(weight) if self.architecture.norm_head else weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., h]` -> `[..., V]` (reward model: `[..., 1]`)."""
        return linear(hidden, self.head_weight(), None)

    @property
    def prefills_in_chunks(self) -> bool:
        """Whether keys of a text do not depend on its length, so that it may be computed in pieces."""
        return self.architecture.rope.rope_type != "dynamic"

    def make_cache(self, num_rows: int, max_length: int) -> KeyValueCache:
        """An empty key-value cache for texts of up to `max_length` tokens, on the model's device."""
        a = self.architecture
        device = next(self.parameters()).device
        if a.latent is not None:
            latent, rotary = a.latent.kv_rank, a.latent.rotary_dim
            return KeyValueCache(a.num_layers, num_rows, max_length, 1, latent, a.dtype, device, value_dim=rotary)
        return KeyValueCache(a.num_layers, num_rows, max_length, a.num_kv_heads, a.head_dim, a.dtype, device)


def make_norm(architecture: Architecture) -> nn.Module:
    """A norm over the hidden dimension."""
    a = architecture
    if a.norm_type == "layernorm":
        return LayerNorm(a.hidden_size, a.norm_eps, a.norm_dtype)
    return RMSNorm(
        a.hidden_size, a.norm_eps, a.norm_dtype, unit_offset=a.unit_offset_norm, fused_kernels=a.fused_kernels
    )


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
