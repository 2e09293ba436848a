"""Rules on CUDA graphs: a replay reads and writes the recorded addresses."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config

KEY = "model.cuda_graphs"


def graphs(config: Config, world_size: int) -> Iterator[Problem]:
    """Layers must be compiled, tensors must stay at their addresses, and micro-batches must not overlap."""
    model, parallel = config.model, config.parallel
    if not model.cuda_graphs:
        return
    if not model.compile:
        yield Problem(
            (KEY, "model.compile"), f"{KEY} = True records compiled layers: set model.compile = True, or {KEY} = False"
        )
    tensor = parallel.tensor
    refusals = {
        "parallel.pipeline.size": (
            parallel.pipeline.size > 1,
            parallel.pipeline.size,
            "a stage begins the next micro-batch before the backward pass of the previous one, whose activations the "
            "replay would overwrite",
        ),
        "parallel.tensor.size": (
            tensor.size > 1,
            tensor.size,
            "layers that exchange tensors with other ranks are not compiled whole",
        ),
        "parallel.context.size": (
            parallel.context.size > 1,
            parallel.context.size,
            "context ranks exchange keys and values in other messages for each sample",
        ),
        "parallel.tensor.mode": (
            tensor.mode == "isp" and tensor.size == 1,
            tensor.mode,
            "its layers take their weights from buffers that move, and are not compiled whole",
        ),
        "parallel.zero1.fsdp" if parallel.zero1.fsdp else "parallel.fsdp.enable": (
            parallel.uses_fsdp,
            True,
            "weights are gathered at other addresses each time",
        ),
        "cpu_offloading.enable": (
            config.cpu_offloading.enable,
            True,
            "the next layer's replay may overwrite activations while they are copied to the host",
        ),
        "model.num_experts": (
            model.num_experts > 1,
            model.num_experts,
            "a replay repeats kernels alone, and would neither choose experts by a file nor count them in another step",
        ),
        "model.num_nextn_predict_layers": (
            model.num_nextn_predict_layers > 0,
            model.num_nextn_predict_layers,
            "the losses of several layers are computed before the backward pass, when replays have overwritten inputs",
        ),
        "model.attention_backend": (
            model.attention_backend == "sdpa" and config.data.use_packed_dataset,
            model.attention_backend,
            "its calls follow the lengths of the documents of each batch",
        ),
    }
    for key, (is_refused, value, reason) in refusals.items():
        if is_refused:
            yield Problem((KEY, key), f"{KEY} = True does not work with {key} = {value!r}: {reason}; set {KEY} = False")
