"""LLaVA-1.5 7B, stage 1: the projector is trained on captions, all else is frozen.

Start from a language model and a vision tower: name the folder of Vicuna 7B in ckpt.load_ckpt_info.
For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *
    from configs._base_.models.llava_7B import *

JOB_NAME = "7b_llava_stage1"

data.update(
    is_multimodal=True,
    image_size=336,
    patch_size=14,
    seq_len=2048,
    micro_bsz=4,  # sequences of a micro-batch
    micro_num=8,  # micro-batches of a step, on each data rank
    # None trains on dummy data. JSON of LLaVA's form needs type="streaming", conversations={}, tokenizer_path and
    # image_folder; see doc/multimodal.md.
    train_folder=None,
    valid_folder=None,
    total_steps=2180,
)
ckpt.update(
    save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}",
    load_ckpt_info=dict(path="local:llm_ckpts/xxxx", content=("model",), ckpt_type="hf"),
)

optimizer = dict(groups=[dict(match="*", freeze=True), dict(match="vision_proj.*")])
adam = dict(lr=1e-3, weight_decay=0.0)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.03)
