"""InternLM2 20B on long sequences: isp over 4 weight ranks in 4 pipeline stages."""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *
    from configs._base_.models.internlm2_20B import *

JOB_NAME = "20b_internlm2_train"

# Folders of tokens as tools/tokenizer.py writes them; None trains on dummy data.
TRAIN_FOLDER = None
VALID_FOLDER = None

data = dict(
    seq_len=16384,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    total_steps=50000,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
    valid_every=500,
    pack_sample_into_one=False,
    min_length=50,
)

ckpt = dict(
    save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}",
    checkpoint_every=500,
    # Goes on from the newest complete checkpoint there; else from load_ckpt_info, if given; else from scratch.
    auto_resume=True,
)

parallel = dict(
    zero1=dict(size=8),
    tensor=dict(size=1, mode="isp"),
    pipeline=dict(size=4, mode="1F1B"),
    weight=dict(size=4, overlap=True, launch_allgather_before="wo", forward_overlap_per="layer"),
)
