"""LLaVA-1.5 7B, stage 2: projector and language model are trained on conversations.

The vision tower stays frozen. Start from the last checkpoint of stage 1.
For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *
    from configs._base_.models.llava_7B import *

JOB_NAME = "7b_llava_stage2"

data.update(
    is_multimodal=True,
    image_size=336,
    patch_size=14,
    seq_len=2048,
    micro_bsz=4,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    # None trains on dummy data. JSON of LLaVA's form needs type="streaming", conversations={}, tokenizer_path and
    # image_folder; see doc/multimodal.md.
    train_folder=None,
    valid_folder=None,
    total_steps=5197,
)
ckpt.update(
    save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}",
    load_ckpt_info=dict(path="local:llm_ckpts/xxxx", content=("model",)),
)

adam = dict(lr=2e-5, weight_decay=0.0)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.03)
