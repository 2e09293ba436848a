"""Rules of CUDA graphs: what each says, and that they are silent on good neighbours."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.rules import find_problems

GRAPHS = "model.cuda_graphs = True"
ON = {"model.compile": True, "model.cuda_graphs": True}

# changes of the small config with graphs, world size, the only mistake (None: there is none).
CASES: list[tuple[dict[str, Any], int, str | None]] = [
    ({}, 1, None),
    ({}, 4, None),
    ({"parallel.zero1.size": 2, "hybrid_zero_optimizer.overlap_sync_grad": True}, 4, None),
    ({"model.dtype": "torch.float16", "model.checkpoint": 1.0, "model.checkpoint_save_policy": "attention"}, 1, None),
    ({"hybrid_zero_optimizer.offload_optimizer": True}, 1, None),
    (
        {"model.compile": False},
        1,
        f"{GRAPHS} records compiled layers: set model.compile = True, or model.cuda_graphs = False",
    ),
    (
        {"parallel.pipeline.size": 2},
        2,
        f"{GRAPHS} does not work with parallel.pipeline.size = 2: a stage begins the next micro-batch before the "
        "backward pass of the previous one, whose activations the replay would overwrite; "
        "set model.cuda_graphs = False",
    ),
    (
        {"parallel.tensor.size": 2},
        2,
        f"{GRAPHS} does not work with parallel.tensor.size = 2: layers that exchange tensors with other ranks are not "
        "compiled whole; set model.cuda_graphs = False",
    ),
    (
        {"parallel.tensor.mode": "isp"},
        1,
        f"{GRAPHS} does not work with parallel.tensor.mode = 'isp': its layers take their weights from buffers that "
        "move, and are not compiled whole; set model.cuda_graphs = False",
    ),
    (
        {"parallel.fsdp.enable": True},
        2,
        f"{GRAPHS} does not work with parallel.fsdp.enable = True: weights are gathered at other addresses each time; "
        "set model.cuda_graphs = False",
    ),
    (
        {"parallel.zero1.fsdp": True},
        2,
        f"{GRAPHS} does not work with parallel.zero1.fsdp = True: weights are gathered at other addresses each time; "
        "set model.cuda_graphs = False",
    ),
    (
        {"cpu_offloading.enable": True, "cpu_offloading.num_layers": 2},
        1,
        f"{GRAPHS} does not work with cpu_offloading.enable = True: the next layer's replay may overwrite activations "
        "while they are copied to the host; set model.cuda_graphs = False",
    ),
    (
        {"model.attention_backend": "sdpa"},
        1,
        f"{GRAPHS} does not work with model.attention_backend = 'sdpa': its calls follow the lengths of the documents "
        "of each batch; set model.cuda_graphs = False",
    ),
    ({"model.attention_backend": "sdpa", "data.use_packed_dataset": False}, 1, None),
    (
        {"model.num_nextn_predict_layers": 1},
        1,
        f"{GRAPHS} does not work with model.num_nextn_predict_layers = 1: the losses of several layers are computed "
        "before the backward pass, when replays have overwritten inputs; set model.cuda_graphs = False",
    ),
    (
        {"model_type": "MIXTRALMOE", "model.num_experts": 4, "model.moe_type": "Dropless"},
        1,
        f"{GRAPHS} does not work with model.num_experts = 4: a replay repeats kernels alone, and would neither choose "
        "experts by a file nor count them in another step; set model.cuda_graphs = False",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "mistake"), CASES, ids=str)
def test_graphs(changes: dict[str, Any], world_size: int, mistake: str | None) -> None:
    config = small_config({**ON, **changes})
    found = list(find_problems(config, world_size))
    assert [one.text for one in found] == ([] if mistake is None else [mistake])
    assert all(one.keys[0] == "model.cuda_graphs" and one.keys[1] in one.text for one in found)
    # Without graphs it is a good config.
    assert not list(find_problems(small_config({**ON, **changes, "model.cuda_graphs": False}), world_size))
