"""InternLM2 20B on long sequences: isp over 4 weight ranks in 4 pipeline stages; every layer is recomputed.

For 128 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *
    from configs._base_.models.internlm2_20B import *

JOB_NAME = "20b_internlm2_train"

data.update(
    seq_len=16384,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

parallel = dict(
    zero1=dict(size=8),
    tensor=dict(size=1, mode="isp"),
    pipeline=dict(size=4, mode="1F1B"),
    weight=dict(size=4, overlap=True, launch_allgather_before="wo", forward_overlap_per="layer"),
)
