"""Older spellings: what they become, the notice, and that the line of the file is kept."""

import pytest

from internlm.config.legacy import LEGACY, translate_legacy
from internlm.config.origins import Origin

INFO = "ckpt.load_ckpt_info"
CASES = [
    ({"parallel": {"zero1": 8}}, {"parallel": {"zero1": {"size": 8}}}, "parallel.zero1 = 8 is read as"),
    ({"parallel": {"tensor": 2}}, {"parallel": {"tensor": {"size": 2}}}, "parallel.tensor = 2"),
    ({"parallel": {"pipeline": 2}}, {"parallel": {"pipeline": {"size": 2}}}, "parallel.pipeline = 2"),
    (
        {"hybrid_zero_optimizer": {"zero_overlap_communication": True}},
        {"hybrid_zero_optimizer": {"overlap_sync_grad": True}},
        "hybrid_zero_optimizer.zero_overlap_communication is read as hybrid_zero_optimizer.overlap_sync_grad",
    ),
    (
        {"hybrid_zero_optimizer": {"zero_overlap_communication": True, "overlap_sync_grad": False}},
        {"hybrid_zero_optimizer": {"overlap_sync_grad": False}},
        "is ignored, because hybrid_zero_optimizer.overlap_sync_grad is given",
    ),
    (
        {"monitor": {"tensorboard": {"queue_max_length": 10}}},
        {"monitor": {}, "tensorboard": {"queue_max_length": 10}},
        "monitor.tensorboard is read as tensorboard",
    ),
    (
        {"alert_address": "x"},
        {"monitor": {"alert": {"feishu_alert_address": "x"}}},
        "alert_address is read as monitor.alert.feishu_alert_address",
    ),
    (
        {"ckpt": {"universal_ckpt": {"aysnc_save": True}}},
        {"ckpt": {"universal_ckpt": {}, "async_save": True}},
        "ckpt.universal_ckpt.aysnc_save is read as ckpt.async_save",
    ),
    (
        {"ckpt": {"universal_ckpt": {"async_save": True}}},
        {"ckpt": {"universal_ckpt": {}, "async_save": True}},
        "ckpt.universal_ckpt.async_save is read as ckpt.async_save",
    ),
    (
        {"ckpt": {"load_model_only_folder": "x"}},
        {"ckpt": {"load_ckpt_info": {"path": "x", "content": ("model",), "ckpt_type": "internevo"}}},
        "with content=('model',)",
    ),
    (
        {"ckpt": {"load_ckpt_folder": "x"}},
        {"ckpt": {"load_ckpt_info": {"path": "x", "content": ("all",), "ckpt_type": "internevo"}}},
        "with content=('all',)",
    ),
    (
        {"ckpt": {"load_ckpt_folder": "x", "load_optimizer": False}},
        {
            "ckpt": {
                "load_ckpt_info": {"path": "x", "content": ("model", "sampler", "scheduler"), "ckpt_type": "internevo"}
            }
        },
        "ckpt.load_ckpt_folder is read as",
    ),
    (
        {"ckpt": {"load_ckpt_folder": {"path": "x", "content": ["model"], "ckpt_type": "internevo"}}},
        {"ckpt": {"load_ckpt_info": {"path": "x", "content": ["model"], "ckpt_type": "internevo"}}},
        "with content=('model',)",
    ),
    (
        {"ckpt": {"load_ckpt_folder": "x", "load_ckpt_info": {"path": "y"}}},
        {"ckpt": {"load_ckpt_info": {"path": "y"}}},
        "ckpt.load_ckpt_folder is ignored, because ckpt.load_ckpt_info is given",
    ),
    ({"ckpt": {"load_ckpt_folder": None}}, {"ckpt": {}}, None),
    ({"ckpt": {"load_given_ckpt": True}}, {"ckpt": {"auto_resume": False}}, "load_given_ckpt = True is read as"),
    ({"ckpt": {"load_given_ckpt": False}}, {"ckpt": {"auto_resume": True}}, "load_given_ckpt = False is read as"),
    (
        {"ckpt": {"load_given_ckpt": False, "auto_resume": False}},
        {"ckpt": {"auto_resume": False}},
        "load_given_ckpt is ignored",
    ),
    (
        {"ckpt": {"load_ckpt_info": {"ckpt_type": "normal"}}},
        {"ckpt": {"load_ckpt_info": {"ckpt_type": "internevo"}}},
        "'normal' is read as 'internevo'",
    ),
    *(
        (
            {"ckpt": {"load_ckpt_info": {"ckpt_type": old}}},
            {"ckpt": {"load_ckpt_info": {"ckpt_type": new}}},
            None if old == new else f"'{old}' is read as '{new}'",
        )
        for old, new in (
            ("internlm", "internevo"),
            ("InternLM", "internevo"),
            ("INTERNEVO", "internevo"),
            ("LLAMA", "llama"),
            ("hf_llama", "hf"),
            ("HF", "hf"),
            # Nothing to translate: what is there, what is refused by name, and what a user may have registered.
            ("internevo", "internevo"),
            ("llama", "llama"),
            ("internlm_test", "internlm_test"),
            ("MyFormat", "MyFormat"),
        )
    ),
    ({"model_type": "LLAMA"}, {"model_type": "LLAMA2"}, "model_type = 'LLAMA'"),
    ({"model_type": "INTERNLM2_PUBLIC"}, {"model_type": "INTERNLM2"}, "model_type = 'INTERNLM2_PUBLIC'"),
    ({"model": {"moe_use_residual": True}}, {"model": {"num_shared_experts": 1}}, "moe_use_residual is read as"),
    ({"model": {"moe_use_residual": False}}, {"model": {"num_shared_experts": 0}}, "moe_use_residual is read as"),
    ({"model": {"moe_gate_k": 2}}, {"model": {"top_k": 2}}, "moe_gate_k is read as model.top_k"),
    (
        {"model": {"moe_capacity_factor": 1.2}},
        {"model": {"moe_layer_kwargs": {"capacity_factor": 1.2}}},
        "moe_capacity_factor is read as",
    ),
    (
        {"model": {"rope_scaling": {"rope_type": "yarn"}}},
        {"model": {"rope_scaling": {"type": "yarn"}}},
        "rope_type is read as",
    ),
    # Nothing old in it, and values that only look so.
    ({"parallel": {"tensor": {"size": 2}, "zero1": True}}, {"parallel": {"tensor": {"size": 2}, "zero1": True}}, None),
    ({"parallel": 3, "ckpt": None, "model": []}, {"parallel": 3, "ckpt": None, "model": []}, None),
]


@pytest.mark.parametrize("old, new, notice", CASES)
def test_translation(old, new, notice):
    notices = translate_legacy(old, {})
    assert old == new
    if notice is None:
        assert notices == []
    else:
        assert len(notices) == 1 and notice in notices[0]


def test_lines_move_with_the_values():
    here = Origin("file", "c.py", 7)
    origins = {"parallel.zero1": here, "monitor.tensorboard": here, "monitor.tensorboard.queue_max_length": here}
    translate_legacy({"parallel": {"zero1": 8}, "monitor": {"tensorboard": {"queue_max_length": 1}}}, origins)
    assert origins == {"parallel.zero1.size": here, "tensorboard": here, "tensorboard.queue_max_length": here}


def test_modern_configs_are_left_alone():
    for spelling in LEGACY:
        assert spelling.path and spelling.meaning
    tree = {"parallel": {"zero1": {"size": 1}}, "ckpt": {"load_ckpt_info": None, "auto_resume": True}}
    assert translate_legacy(tree, {}) == []
