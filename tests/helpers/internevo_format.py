"""Writes a model of this package as InternEvo would have saved it. Knows nothing of the code that reads such folders.

For each rank of each stage: cut the weights as InternEvo's layers do, name them as its modules are called, number the
layers from zero, and save the dict.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LLAMA_NAMES = {
    "embedding": "tok_embeddings",
    "layers": "layers",
    "attention": "attention",
    "wqkv": "wqkv",
    "wo": "wo",
    "mlp": "feed_forward",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "norm": "norm",
    "head": "output",
}
INTERNLM1_NAMES = {
    "embedding": "embedding",
    "layers": "blocks",
    "attention": "mixer",
    "wqkv": "wqkv",
    "wo": "out_proj",
    "mlp": "mlp",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm": "norm",
    "head": "head",
}
OLDER = {"wqkv": "Wqkv"}
FUSED_BY_PROJECTION = ("INTERNLM", "INTERNLM_MoE", "BAICHUAN2")
FUSED_BY_GROUP = ("INTERNLM2",)


@dataclass
class Split:
    """How InternEvo ran: `tp` ranks (mtp, msp, fsp), or `wp` ranks (isp), by `pp` stages of `chunks` chunks."""

    tp: int = 1
    wp: int = 0
    pp: int = 1
    chunks: int = 1
    chunk_lists: bool = False
    """The chunks of a stage are saved as a list of modules instead of being merged under one numbering."""
    v_shape: bool = False
    embed_dim: int = 1
    """Dimension of the embedding that is split: 1 with embed_split_hidden, else 0."""
    head_ranks: int = 0
    """isp: ranks that the head is split over, when not over all of `wp`."""
    older_names: bool = False
    older_feed_forward: bool = False
    fused_gate_up: bool = False
    row_bias_everywhere: bool = False
    separate_qkv: bool = False
    fused_qkv: bool = False
    model_prefix: bool = True
    ep: int = 1
    """Expert parallel ranks, which matter only for grouped experts."""
    grouped: bool = False
    """All experts of an expert parallel rank are one weight."""
    expert_ranks: int = 0
    """Ranks that an expert is split over, when not over all: 1 with `no_tp`, `expert_weight.size` in isp."""

    @property
    def ranks(self) -> int:
        return self.wp or self.tp


@dataclass
class Checkpoint:
    """Everything that goes into the folder but weights and the optimizer's state."""

    model_type: str
    section: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    step: int = 40
    with_config: bool = True
    with_section: bool = True


def write(folder: Path, model: nn.Module, checkpoint: Checkpoint, split: Split) -> dict[str, Tensor]:
    """Write the folder; returns the state of the model that was written."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    layers = split_layers(checkpoint.section["num_layers"], split)
    for stage in range(split.pp):
        for rank in range(split.ranks):
            tensors = rank_tensors(state, model, checkpoint.model_type, split, layers, stage, rank)
            kind = "wp" if split.wp else "tp"
            torch.save(tensors, folder / f"model_{kind}{rank}_pp{stage}.pt")
            (folder / f"topo_{kind}{rank}_pp{stage}.json").write_text("{}")
        write_experts(folder, state, checkpoint.model_type, split, layers, stage)
    if checkpoint.with_section:
        with internevo_sections() as section_class:
            torch.save(section_class(checkpoint.section), folder / "model_config.pt")
    if checkpoint.with_config:
        torch.save(config_text(checkpoint), folder / "config_file.pt")
    counters = {
        # Of the last batch, from zero.
        "batch_count": checkpoint.step - 1,
        "num_consumed_samples_in_epoch": 8 * checkpoint.step,
        "num_consumed_tokens": 4096 * checkpoint.step,
        "inf_nan_skip_batches": 0,
        "step_count": checkpoint.step,
        "tensorboard_folder": "RUN/tensorboards",
    }
    torch.save(counters, folder / "context.pt")
    torch.save({"step": checkpoint.step}, folder / f"{checkpoint.step}.step")
    return state


def config_text(checkpoint: Checkpoint) -> str:
    sections = {
        "JOB_NAME": "old_run",
        "model_type": checkpoint.model_type,
        "data": {"seq_len": 64, "micro_bsz": 2, "micro_num": 4, "total_steps": 100, "train_folder": "/gone"},
        "parallel": {"zero1": -1, "tensor": 8, "pipeline": {"size": 2, "interleaved_overlap": True}},
        "ckpt": {"save_ckpt_folder": "boto3:s3://bucket.endpoint/run", "enable_save_ckpt": False},
        **checkpoint.config,
        "model": {name: str(v) if isinstance(v, torch.dtype) else v for name, v in checkpoint.section.items()},
    }
    return "".join(f"{name} = {value!r}\n" for name, value in sections.items())


@contextmanager
def internevo_sections() -> Iterator[type[dict[str, Any]]]:
    """InternEvo's class of config sections, at the place from which it is pickled there."""
    module = sys.modules["internlm.core.context.parallel_context"]

    class Config(dict[str, Any]):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__({n: Config(v) if isinstance(v, dict) else v for n, v in values.items()})

        def __getattr__(self, name: str) -> Any:
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setattr__(self, name: str, value: Any) -> None:
            self[name] = value

    Config.__module__, Config.__qualname__ = module.__name__, "Config"
    module.Config = Config  # type: ignore[attr-defined]
    try:
        yield Config
    finally:
        del module.Config  # type: ignore[attr-defined]


def split_layers(num_layers: int, split: Split) -> list[list[list[int]]]:
    """For each stage, for each of its chunks, the layers; what does not divide goes to the last stages."""
    per_chunk = num_layers // split.chunks
    result: list[list[list[int]]] = [[] for _ in range(split.pp)]
    for chunk in range(split.chunks):
        start = chunk * per_chunk
        for place in range(split.pp):
            size = per_chunk // split.pp + (1 if place >= split.pp - per_chunk % split.pp else 0)
            stage = split.pp - 1 - place if split.v_shape and chunk % 2 else place
            result[stage].append(list(range(start, start + size)))
            start += size
    return result


def rank_tensors(
    state: dict[str, Tensor],
    model: Any,
    model_type: str,
    split: Split,
    layers: list[list[list[int]]],
    stage: int,
    rank: int,
) -> dict[str, Tensor]:
    names = names_of(model_type)
    if model_type == "BAICHUAN2":
        names["wo"] = "out_proj"
    if split.older_names:
        names |= OLDER
    num_layers = sum(len(chunk) for chunks in layers for chunk in chunks)
    result: dict[str, Tensor] = {}
    local = 0
    for number, chunk in enumerate(layers[stage]):
        prefix = f"{number}." if split.chunk_lists else ""
        prefix += "model." if split.model_prefix else ""
        if split.chunk_lists:
            local = 0
        if 0 in chunk:
            embedding = names["embedding"] + (".word_embeddings" if split.older_names else "")
            result[f"{prefix}{embedding}.weight"] = part(
                state["tok_embeddings.weight"], rank, split.ranks, split.embed_dim
            )
        for layer in chunk:
            tensors = layer_tensors(state, f"layers.{layer}.", model, model_type, split, names, rank)
            result |= {f"{prefix}{names['layers']}.{local}.{name}": tensor for name, tensor in tensors.items()}
            local += 1
        if num_layers - 1 in chunk:
            result |= {
                f"{prefix}norm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias") if f"norm.{kind}" in state
            }
            if "output.weight" in state:
                head_ranks = split.head_ranks or split.ranks
                head = state["output.weight"]
                if len(head) > 1:  # The single row of a reward model is the same on all ranks.
                    head = part(head, rank % head_ranks, head_ranks, 0)
                result[f"{prefix}{names['head']}.weight"] = head
    return {name: tensor.clone() for name, tensor in result.items()}


def names_of(model_type: str) -> dict[str, str]:
    return dict(INTERNLM1_NAMES if model_type in ("INTERNLM", "INTERNLM_MoE") else LLAMA_NAMES)


def write_experts(
    folder: Path, state: dict[str, Tensor], model_type: str, split: Split, layers: list[list[list[int]]], stage: int
) -> None:
    """The files of a stage's experts. InternEvo numbers their layers as if all stages had as many as the smallest."""
    names, kind = names_of(model_type), "wp" if split.wp else "tp"
    number = sum(len(chunk) for chunks in layers for chunk in chunks) // split.pp * stage
    local = 0
    for index, chunk in enumerate(layers[stage]):
        local = 0 if split.chunk_lists else local
        for layer in chunk:
            if f"layers.{layer}.feed_forward.experts.w13" not in state:
                local += 1
                continue
            prefix = (f"{index}." if split.chunk_lists else "") + ("model." if split.model_prefix else "")
            prefix += f"{names['layers']}.{local}.{names['mlp']}.moe_layer.experts.wrapped_experts."
            w13 = state[f"layers.{layer}.feed_forward.experts.w13"]
            w2 = state[f"layers.{layer}.feed_forward.experts.w2"]
            for rank in range(split.expert_ranks or split.ranks):
                for expert in range(split.ep if split.grouped else len(w13)):
                    tensors = (grouped if split.grouped else separate)(w13, w2, expert, split, rank)
                    torch.save(
                        {f"{prefix}{expert}.{name}.weight": tensor.clone() for name, tensor in tensors.items()},
                        folder / f"model_moe_layer{number}_expert{expert}_{kind}{rank}.pt",
                    )
            number += 1
            local += 1


def separate(w13: Tensor, w2: Tensor, expert: int, split: Split, rank: int) -> dict[str, Tensor]:
    n = split.expert_ranks or split.ranks
    down = part(w2[expert], rank, n, 0 if split.wp else 1)
    if split.fused_gate_up and split.wp:
        w1, w3 = part(w13[expert], rank, n, 0).chunk(2)
    else:
        w1, w3 = (part(one, rank, n, 0) for one in w13[expert].chunk(2))
    second, third = ("w3", "w2") if split.older_feed_forward else ("w2", "w3")
    return {"w1": w1, second: down, third: w3}


def grouped(w13: Tensor, w2: Tensor, group: int, split: Split, rank: int) -> dict[str, Tensor]:
    n, size = split.expert_ranks or split.ranks, len(w13) // split.ep
    own = slice(group * size, (group + 1) * size)
    w1, w3 = w13[own].chunk(2, dim=1)
    weights = {"w1": w1.transpose(1, 2), "w3": w3.transpose(1, 2), "w2": w2[own].transpose(1, 2)}
    if split.wp:
        return {name: part(weight.flatten(0, 1), rank, n, 0) for name, weight in weights.items()}
    return {name: part(weight, rank, n, 1 if name == "w2" else 2) for name, weight in weights.items()}


def layer_tensors(
    state: dict[str, Tensor], layer: str, model: Any, model_type: str, split: Split, names: dict[str, str], rank: int
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    n = split.ranks
    row_dim = 0 if split.wp else 1
    for norm, ours in (("norm1", "attention_norm"), ("norm2", "ffn_norm")):
        for kind in ("weight", "bias"):
            if f"{layer}{ours}.{kind}" in state:
                result[f"{names[norm]}.{kind}"] = state[f"{layer}{ours}.{kind}"]
    for kind in ("weight", "bias"):
        if qkv := projections(state, layer, kind, model):
            fused_name = f"{names['attention']}.{names['wqkv']}.{kind}"
            if model_type in FUSED_BY_PROJECTION and not split.separate_qkv:
                if split.wp:
                    result[fused_name] = part(torch.cat(qkv), rank, n, 0)
                else:
                    result[fused_name] = torch.cat([part(one, rank, n, 0) for one in qkv])
            elif (model_type in FUSED_BY_GROUP and not split.separate_qkv) or split.fused_qkv:
                result[fused_name] = part(by_group(qkv, model), rank, n, 0)
            else:
                for name, one in zip(("wq", "wk", "wv"), qkv, strict=True):
                    result[f"{names['attention']}.{name}.{kind}"] = part(one, rank, n, 0)
        for norm in ("q_norm", "k_norm"):
            if f"{layer}attention.{norm}.{kind}" in state:
                result[f"{names['attention']}.{norm}.{kind}"] = state[f"{layer}attention.{norm}.{kind}"]
        wo = f"{layer}attention.wo.{kind}"
        if wo in state and (tensor := row(state[wo], kind, rank, split, row_dim)) is not None:
            result[f"{names['attention']}.{names['wo']}.{kind}"] = tensor
        mlp = names["mlp"]
        result |= feed_forward(state, f"{layer}feed_forward.", f"{mlp}.", kind, split, rank)
        result |= feed_forward(state, f"{layer}feed_forward.shared.", f"{mlp}.residual_mlp.", kind, split, rank)
        for ours, theirs in (("router", "moe_layer.gate.wg"), ("shared_gate", "coefficient")):
            if f"{layer}feed_forward.{ours}.{kind}" in state:
                result[f"{mlp}.{theirs}.{kind}"] = state[f"{layer}feed_forward.{ours}.{kind}"]
    return result


def feed_forward(
    state: dict[str, Tensor], ours: str, theirs: str, kind: str, split: Split, rank: int
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    n = split.ranks
    w1, w3 = gate_and_up(state, ours, kind)
    w2 = state.get(f"{ours}w2.{kind}")
    if w1 is None or w3 is None or w2 is None:
        return result
    second, third = ("w3", "w2") if split.older_feed_forward else ("w2", "w3")
    if split.fused_gate_up and split.wp:
        # The rank's rows of the fused weight, saved as if they were halves of it.
        mine = part(torch.cat([w1, w3]), rank, n, 0)
        result[f"{theirs}w1.{kind}"], result[f"{theirs}w3.{kind}"] = mine.chunk(2)
    else:
        result[f"{theirs}w1.{kind}"] = part(w1, rank, n, 0)
        result[f"{theirs}{third}.{kind}"] = part(w3, rank, n, 0)
    tensor = row(w2, kind, rank, split, 0 if split.wp else 1)
    if tensor is not None:
        result[f"{theirs}{second}.{kind}"] = tensor
    return result


def part(tensor: Tensor, rank: int, num_ranks: int, dim: int) -> Tensor:
    assert tensor.shape[dim] % num_ranks == 0
    size = tensor.shape[dim] // num_ranks
    return tensor.narrow(dim, rank * size, size)


def row(tensor: Tensor, kind: str, rank: int, split: Split, dim: int) -> Tensor | None:
    """A row-parallel layer's weight or bias on a rank."""
    if kind == "weight" or split.wp:
        return part(tensor, rank, split.ranks, dim)
    return tensor if rank == 0 or split.row_bias_everywhere else None


def projections(state: dict[str, Tensor], layer: str, kind: str, model: Any) -> list[Tensor]:
    """q, k and v, unfused; empty when the model has no such weight."""
    a = model.architecture
    if f"{layer}attention.wq.{kind}" in state:
        return [state[f"{layer}attention.{name}.{kind}"] for name in ("wq", "wk", "wv")]
    if f"{layer}attention.wqkv.{kind}" not in state:
        return []
    blocks = state[f"{layer}attention.wqkv.{kind}"].split(a.head_dim)
    per_group = a.num_heads // a.num_kv_heads
    q, k, v = [], [], []
    for group in range(a.num_kv_heads):
        start = group * (per_group + 2)
        q += blocks[start : start + per_group]
        k.append(blocks[start + per_group])
        v.append(blocks[start + per_group + 1])
    return [torch.cat(q), torch.cat(k), torch.cat(v)]


def by_group(qkv: list[Tensor], model: Any) -> Tensor:
    a = model.architecture
    q, k, v = (one.split(a.head_dim) for one in qkv)
    per_group = a.num_heads // a.num_kv_heads
    rows: list[Tensor] = []
    for group in range(a.num_kv_heads):
        rows += [*q[group * per_group : (group + 1) * per_group], k[group], v[group]]
    return torch.cat(rows)


def gate_and_up(state: dict[str, Tensor], block: str, kind: str) -> tuple[Tensor | None, Tensor | None]:
    if f"{block}w13.{kind}" in state:
        w1, w3 = state[f"{block}w13.{kind}"].chunk(2)
        return w1, w3
    return state.get(f"{block}w1.{kind}"), state.get(f"{block}w3.{kind}")
