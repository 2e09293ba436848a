"""Translation of weights between a `Decoder` and Hugging Face names and layouts, in both directions.

The layouts are:

- "transformers": the files of the library's own classes: separate projections, half-split rotary pairs, a tensor per
  expert;
- "mixtral": the same with Mixtral's names of experts;
- "fused_experts": the names of these classes in memory, with all experts of a layer in one tensor;
- "internlm2" and "baichuan2": families published with their own code. The first has wqkv by key-value group; the second
  has W_pack (rows q, k, v), and its head is normalized by the code, not in the file.

Every translation goes through a canonical form: our names, no projection fused except in experts, half-split pairs.
It takes any closed set of tensors (`group_of`), such as one group at a time, so the whole model need not be in memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.architecture import Architecture
from internlm.model.huggingface.expert_names import ExpertStacks, split_experts
from internlm.model.huggingface.gpt_oss_names import from_gpt_oss, to_gpt_oss
from internlm.model.latent_shape import LatentShape
from internlm.utils.errors import CheckpointError

Layout = Literal["transformers", "mixtral", "fused_experts", "internlm2", "baichuan2"]

_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}

_INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.router": "mlp.gate",
    "feed_forward.shared.w1": "mlp.shared_expert.gate_proj",
    "feed_forward.shared.w2": "mlp.shared_expert.down_proj",
    "feed_forward.shared.w3": "mlp.shared_expert.up_proj",
    "feed_forward.shared_gate": "mlp.shared_expert_gate",
    "enorm": "enorm",
    "hnorm": "hnorm",
    "eh_proj": "eh_proj",
    "norm": "shared_head.norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

_MIXTRAL_ROUTER = {"feed_forward.router": "block_sparse_moe.gate"}

_UNGATED_SHARED = {
    f"feed_forward.shared.{ours}": f"mlp.shared_experts.{theirs}_proj"
    for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}

_PACKED = "self_attn.W_pack"

_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias|selection_bias|e_score_correction_bias)")

SELECTION_BIAS = "e_score_correction_bias"
"""Last part of the Hugging Face name of a router's selection bias."""

_RENAMED_TENSORS = {"selection_bias": SELECTION_BIAS, SELECTION_BIAS: "selection_bias"}
"""Last part of a name -> that in the other direction; those of other tensors are equal."""

_GATE_UP = re.compile(r"(\.feed_forward|\.shared)\.w(1|3|13)\.")

_QKV = re.compile(r"(\.attention)\.w([qkv]|qkv)\.")


def to_hf(
    state: Mapping[str, Tensor], architecture: Architecture, layout: Layout = "transformers"
) -> dict[str, Tensor]:
    """Translate a state dict from our names.

    Args:
        state: global (unsharded) tensors by our names.
        architecture: of the model.
        layout: see the module docstring.

    Returns:
        The tensors by Hugging Face names; views if no rows move. With `norm_head` the exported head is normalized, so
        that a plain head gives the same logits, except for "baichuan2", whose code normalizes it.
    """
    plain = _to_canonical(state, architecture)
    if architecture.norm_head and layout != "baichuan2" and "output.weight" in plain:
        plain["output.weight"] = F.normalize(plain["output.weight"])
    if layout == "internlm2":
        return {
            f"model.{name}" if not name.startswith("output.") else name: t
            for name, t in _fuse_qkv(plain, architecture).items()
        }
    renamed: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        own = to_gpt_oss(name, tensor) if architecture.attention_sinks else None
        if own is not None:
            renamed[own[0]] = own[1]
            continue
        renamed |= split_experts(name, tensor, layout) or {
            _rename(name, _OUTER, _inner_names(architecture, layout), "", "model."): tensor
        }
    if layout == "baichuan2":
        for name in [name for name in renamed if name.endswith("self_attn.q_proj.weight")]:
            names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            renamed[name.replace("self_attn.q_proj", _PACKED)] = torch.cat([renamed.pop(part) for part in names])
    return renamed


def from_hf(
    state: Mapping[str, Tensor], architecture: Architecture, layout: Layout = "transformers"
) -> dict[str, Tensor]:
    """Translate a Hugging Face state dict to our names; the inverse of `to_hf`, except for a normalized head.

    Args:
        state: full tensors by Hugging Face names; each is read once, and those of experts are not kept.
        architecture: of the model.
        layout: see the module docstring.

    Raises:
        CheckpointError: the layout has no weight of a name, or a tied head differs from the embedding.
    """
    if layout == "internlm2":
        ours = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        return _from_canonical(_split_qkv(ours, architecture), architecture)
    plain: dict[str, Tensor] = {}
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _inner_names(architecture, layout).items()}
    experts = ExpertStacks(state, layout)
    sizes = [n * architecture.head_dim for n in (architecture.num_heads,) + (architecture.num_kv_heads,) * 2]
    for name, tensor in state.items():
        if architecture.tie_word_embeddings and name == "lm_head.weight":
            embedding = state.get("model.embed_tokens.weight")
            if embedding is not None and not torch.equal(tensor, embedding.to(tensor.dtype)):
                raise CheckpointError(
                    f"'{name}' differs from the embedding, but the head of this model is tied: set "
                    "model.tie_word_embeddings = False"
                )
            continue
        own = from_gpt_oss(name, tensor) if architecture.attention_sinks else None
        if own is not None:
            plain[own[0]] = own[1]
            continue
        if experts.add(name, tensor):
            continue
        if layout == "baichuan2" and _PACKED in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.split(sizes), strict=True):
                plain[_rename(name.replace(_PACKED, f"self_attn.{part}"), outer, inner, "model.", "")] = rows
        else:
            plain[_rename(name, outer, inner, "model.", "")] = tensor
    return _from_canonical({**plain, **experts.tensors()}, architecture)


def from_plain(state: Mapping[str, Tensor], architecture: Architecture, *, interleaved: bool) -> dict[str, Tensor]:
    """Fuse and reorder separate projections as in `architecture`.

    Args:
        state: full tensors by our names, nothing fused.
        architecture: of the model.
        interleaved: whether the rotary pairs of `state` are adjacent rows instead of halves.
    """
    source = dataclasses.replace(
        architecture,
        fused_qkv=False,
        fused_gate_up=False,
        rope=dataclasses.replace(architecture.rope, interleaved=interleaved),
    )
    return _from_canonical(_to_canonical(state, source), architecture)


def plain_shapes(shapes: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Meta tensors of a model (by our names) -> those of the same model with nothing fused."""
    return _to_canonical(shapes, architecture)


@dataclass(frozen=True)
class WeightGroup:
    """Weights that are translated together: a fused projection and its parts, or a single weight.

    Attributes:
        ours, theirs: our names and Hugging Face names -> meta tensors (shapes).
    """

    ours: Mapping[str, Tensor]
    theirs: Mapping[str, Tensor]


def weight_groups(
    shapes: Mapping[str, Tensor], architecture: Architecture, layout: Layout = "transformers"
) -> list[WeightGroup]:
    """All weights of a model in closed groups, which can be translated one at a time, in the order of `shapes`.

    Args:
        shapes: meta tensors by our names (the state dict of a model on the meta device).
        architecture: of the model.
        layout: see the module docstring.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shapes.items():
        groups.setdefault(group_of(name), {})[name] = tensor
    return [WeightGroup(ours, to_hf(ours, architecture, layout)) for ours in groups.values()]


def group_of(name: str) -> str:
    """The closed group of one of our names; weights are fused and split only within a group."""
    return _GATE_UP.sub(r"\1.w13.", _QKV.sub(r"\1.wqkv.", name))


def _inner_names(a: Architecture, layout: Layout) -> dict[str, str]:
    names = {**_INNER, **_MIXTRAL_ROUTER} if layout == "mixtral" else _INNER
    return {**names, **_UNGATED_SHARED} if a.experts is not None and a.experts.shared_mix == "sum" else names


def _rename(name: str, outer: Mapping[str, str], inner: Mapping[str, str], old: str, new: str) -> str:
    """Translate a canonical or transformers name; `old` and `new` are the prefixes of `layers.` before and after."""
    match = _LAYER.fullmatch(name.removeprefix(old))
    if match and match[2] in inner:
        return f"{new}layers.{match[1]}.{inner[match[2]]}.{_RENAMED_TENSORS.get(match[3], match[3])}"
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    raise CheckpointError(f"unknown weight '{name}': no decoder of this package has a weight of that name")


def _to_canonical(state: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in _split_qkv(state, a).items():
        if ".w13." in name:
            gate, up = tensor.chunk(2)
            plain[name.replace(".w13.", ".w1.")], plain[name.replace(".w13.", ".w3.")] = gate, up
        else:
            plain[name] = tensor
    return _reorder_pairs(plain, a, to_halves=True)


def _from_canonical(plain: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    state = _reorder_pairs(plain, a, to_halves=False)
    if a.fused_qkv:
        state = _fuse_qkv(state, a)
    if a.fused_gate_up:
        for name in [name for name in state if ".w1." in name]:
            halves = [state.pop(name), state.pop(name.replace(".w1.", ".w3."))]
            state[name.replace(".w1.", ".w13.")] = torch.cat(halves)
    return state


def _split_qkv(state: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.wqkv." not in name:
            split[name] = tensor
            continue
        groups = tensor.unflatten(0, (a.num_kv_heads, -1, a.head_dim))
        for part, rows in (("wq", groups[:, :-2]), ("wk", groups[:, -2]), ("wv", groups[:, -1])):
            split[name.replace("wqkv", part)] = rows.reshape(-1, *tensor.shape[1:])
    return split


def _fuse_qkv(state: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    fused = dict(state)
    for name in [name for name in state if ".attention.wq." in name]:
        parts = [fused.pop(name.replace(".wq.", f".{part}.")) for part in ("wq", "wk", "wv")]
        groups = [part.unflatten(0, (a.num_kv_heads, -1, a.head_dim)) for part in parts]
        fused[name.replace(".wq.", ".wqkv.")] = torch.cat(groups, dim=1).flatten(0, 2)
    return fused


def _reorder_pairs(state: Mapping[str, Tensor], a: Architecture, *, to_halves: bool) -> dict[str, Tensor]:
    """Reorder the rows of q, k and their norms between adjacent pairs and halves.

    Latent attention has adjacent pairs in its canonical form, as in files.
    """
    if a.latent is not None:
        return dict(state) if a.rope.interleaved else _reorder_latent(state, a.latent, to_halves=not to_halves)
    if not a.rope.interleaved:
        return dict(state)
    parts = (".attention.wq.", ".attention.wk.", ".attention.q_norm.", ".attention.k_norm.")
    rotated, shape = a.rope.head_dim, (a.rope.head_dim // 2, 2)
    pairs = torch.arange(rotated).view(shape if to_halves else shape[::-1]).t().flatten()
    order = torch.cat((pairs, torch.arange(rotated, a.head_dim)))
    return {
        name: tensor.unflatten(0, (-1, a.head_dim))[:, order].reshape(tensor.shape)
        if any(part in name for part in parts)
        else tensor
        for name, tensor in state.items()
    }


def _reorder_latent(state: Mapping[str, Tensor], shape: LatentShape, *, to_halves: bool) -> dict[str, Tensor]:
    """Reorder the rotary rows of latent attention, the last ones of a query head and of `wkv_a`."""
    pairs = torch.arange(shape.rotary_dim).view((-1, 2) if to_halves else (2, -1)).t().flatten()
    reordered = {}
    for name, tensor in state.items():
        is_query = ".attention.wq." in name or ".attention.wq_b." in name
        if is_query or ".attention.wkv_a." in name:
            plain = shape.plain_dim if is_query else shape.kv_rank
            order = torch.cat((torch.arange(plain), plain + pairs))
            tensor = tensor.unflatten(0, (-1, len(order)))[:, order].reshape(tensor.shape)
        reordered[name] = tensor
    return reordered
