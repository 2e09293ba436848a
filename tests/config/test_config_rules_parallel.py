"""Rules of pipelines and of what tensor ranks share: what each says, and that it is silent on a good neighbour."""

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.loader import check_config
from internlm.config.rules import find_problems
from internlm.config.schema import Config
from internlm.config.schema.base import walk_schema
from internlm.utils.errors import ConfigError

TENSOR, MODE, KV = "parallel.tensor.size", "parallel.tensor.mode", "model.num_kv_attention_heads"
STAGES, SCHEDULE = "parallel.pipeline.size", "parallel.pipeline.mode"
CHUNKS, SPLIT = "model.num_chunks", "parallel.pipeline.layer_split"

# changes of the small config, world size, the only mistake (None: there is none).
CASES: list[tuple[dict[str, Any], int, str | None]] = [
    # FSDP.
    (
        {"parallel.fsdp.enable": True, STAGES: 2},
        2,
        "parallel.fsdp.enable = True does not work with parallel.pipeline.size = 2; set one of them to its default",
    ),
    (
        {"parallel.zero1.fsdp": True, MODE: "isp"},
        2,
        "parallel.zero1.fsdp = True does not work with parallel.tensor.mode = 'isp', which splits weights itself; turn "
        "it off",
    ),
    *[({"parallel.fsdp.enable": True, TENSOR: 2, MODE: mode}, 4, None) for mode in ("mtp", "msp", "fsp")],
    # A vocabulary that the ranks do not divide is filled up.
    ({"model.vocab_size": 63, TENSOR: 2}, 2, None),
    ({"model.vocab_size": 66, "parallel.weight.size": 4, MODE: "isp"}, 4, None),
    # Heads.
    *[
        (
            {"model.num_attention_heads": 12, "model.hidden_size": 48, TENSOR: 8, MODE: mode},
            8,
            "model.num_attention_heads = 12 is not divisible by parallel.tensor.size = 8: each rank computes whole "
            "heads; use a tensor size of 1, 2, 3, 4, 6, 12",
        )
        for mode in ("mtp", "msp", "fsp", "isp")
    ],
    (
        {"model.num_attention_heads": 12, KV: 6, "model.hidden_size": 48, TENSOR: 4},
        4,
        "model.num_kv_attention_heads = 6 and parallel.tensor.size = 4: one must divide the other, as each rank holds "
        "whole key-value heads or a copy of one; use a tensor size of 1, 2, 3, 6, 12",
    ),
    ({"model.num_attention_heads": 12, KV: 6, "model.hidden_size": 48, "model.multiple_of": 12, TENSOR: 3}, 3, None),
    ({"model.num_attention_heads": 12, KV: 6, "model.hidden_size": 48, "model.multiple_of": 12, TENSOR: 12}, 12, None),
    ({KV: 1, TENSOR: 4}, 4, None),
    ({KV: 2, TENSOR: 4, MODE: "isp"}, 4, None),
    # Width of the MLP.
    (
        {"model.intermediate_size": 90, TENSOR: 4},
        4,
        "model.intermediate_size = 90 is not divisible by parallel.tensor.size = 4; set model.intermediate_size = 92",
    ),
    (
        {"model.mlp_ratio": 2.7, "model.multiple_of": 1, TENSOR: 4, MODE: "msp"},
        4,
        "model.mlp_ratio = 2.7: model.intermediate_size = 86 is not divisible by parallel.tensor.size = 4; "
        "set model.intermediate_size = 88",
    ),
    ({"model.intermediate_size": 92, TENSOR: 4, MODE: "fsp"}, 4, None),
    ({"model.intermediate_size": 90, TENSOR: 4, MODE: "isp"}, 4, None),
    # An embedding that cannot be split over hidden is split over the vocabulary.
    ({"model.hidden_size": 30, "model.head_dim": 8, TENSOR: 4}, 4, None),
    # Rows of tokens.
    *[
        (
            {"data.seq_len": 17, TENSOR: 4, MODE: mode},
            4,
            "data.seq_len = 17 times data.micro_bsz = 2 is not divisible by parallel.tensor.size = 4, over which the "
            f"mode '{mode}' splits a row; set data.seq_len = 18",
        )
        for mode in ("msp", "fsp", "isp")
    ],
    (
        {"data.seq_len": 18, "data.use_packed_dataset": False, TENSOR: 4, MODE: "msp"},
        4,
        "data.seq_len = 18 is not divisible by parallel.tensor.size = 4, over which the mode 'msp' splits a row; "
        "set data.seq_len = 20",
    ),
    ({"data.seq_len": 18, TENSOR: 4, MODE: "msp"}, 4, None),
    ({"data.seq_len": 17, TENSOR: 4}, 4, None),
    ({"data.seq_len": 17, MODE: "isp"}, 4, None),
    # Chunks and micro-batches of a schedule.
    (
        {STAGES: 2, SCHEDULE: "ZBH1", CHUNKS: 2},
        2,
        "model.num_chunks = 2 does not work with parallel.pipeline.mode = 'ZBH1'; set it to 1",
    ),
    ({STAGES: 2, SCHEDULE: "ZBH1", "hybrid_zero_optimizer.overlap_sync_grad": True}, 2, None),
    ({STAGES: 2, SCHEDULE: "ZBH1", MODE: "isp", "parallel.weight.overlap": True}, 2, None),
    ({STAGES: 2, CHUNKS: 2}, 2, None),
    (
        {STAGES: 2, CHUNKS: 2, "data.micro_num": 7},
        2,
        "data.micro_num = 7: the interleaved schedule (model.num_chunks = 2) needs a multiple of "
        "parallel.pipeline.size = 2",
    ),
    ({STAGES: 2, "data.micro_num": 7}, 2, None),
    (
        {STAGES: 2, CHUNKS: 2, "data.rampup_batch_size": "2 1 2"},
        2,
        "data.rampup_batch_size = '2 1 2' gives steps with data.micro_num = 3: the interleaved schedule "
        "(model.num_chunks = 2) needs a multiple of parallel.pipeline.size = 2",
    ),
    # The run of 10 steps ends in the middle of its ramp, before an odd number comes.
    ({STAGES: 2, CHUNKS: 2, "data.rampup_batch_size": "2 1 10"}, 2, None),
    ({STAGES: 2, CHUNKS: 2, "data.rampup_batch_size": "2 2 1"}, 2, None),
    ({STAGES: 2, CHUNKS: 2, "data.rampup_batch_size": "4 5 1"}, 2, None),
    ({STAGES: 2, "data.rampup_batch_size": "1 1 1"}, 2, None),
    *[({STAGES: 2, SCHEDULE: mode, "data.micro_num": 1}, 2, None) for mode in ("ZBH1", "ZBV", "DualPipeV")],
    # Layers of the stages.
    (
        {STAGES: 5},
        5,
        "parallel.pipeline.size times model.num_chunks = 5 is more than model.num_layers = 4, and each stage needs a "
        "layer; use fewer stages",
    ),
    (
        {STAGES: 4, SCHEDULE: "ZBV"},
        4,
        "parallel.pipeline.size times model.num_chunks = 8 is more than model.num_layers = 4, and each stage needs a "
        "layer; use fewer stages",
    ),
    ({STAGES: 2, SCHEDULE: "ZBV"}, 2, None),
    (
        {STAGES: 2, SPLIT: [2, 1, 1]},
        2,
        "parallel.pipeline.layer_split = [2, 1, 1] must have 2 numbers, one for each stage "
        "(parallel.pipeline.size times model.num_chunks = 2)",
    ),
    ({STAGES: 2, SPLIT: [4, 0]}, 2, "parallel.pipeline.layer_split = [4, 0]: each stage needs a layer"),
    (
        {STAGES: 2, SPLIT: [3, 2]},
        2,
        "parallel.pipeline.layer_split = [3, 2] are 5 layers, and must be model.num_layers = 4",
    ),
    ({STAGES: 2, SPLIT: [3, 1]}, 2, None),
    ({STAGES: 2, SPLIT: "cost"}, 2, None),
    ({STAGES: 2, SCHEDULE: "DualPipeV", SPLIT: [1, 1, 1, 1]}, 2, None),
    ({SPLIT: [3, 2]}, 1, None),
]


@pytest.mark.parametrize("changes, world_size, message", CASES)
def test_rule(changes: dict[str, Any], world_size: int, message: str | None) -> None:
    found = list(find_problems(small_config(changes), world_size))
    assert [mistake.text for mistake in found] == ([] if message is None else [message])
    known = {path for path, _ in walk_schema(Config)}
    for mistake in found:
        assert set(mistake.keys) <= known
        assert mistake.text.startswith(mistake.keys[0]), "a mistake names the key to mend first"


def test_all_mistakes_of_a_layout_come_together() -> None:
    changes = {TENSOR: 8, MODE: "msp", STAGES: 2, SPLIT: [5, 5], "data.seq_len": 17, "model.intermediate_size": 90}
    with pytest.raises(ConfigError) as error:
        check_config(small_config(changes), 16)
    keys = [mistake.split(" = ")[0] for mistake in error.value.mistakes]
    assert keys == [SPLIT, "model.num_attention_heads", "model.intermediate_size", "data.seq_len"]
