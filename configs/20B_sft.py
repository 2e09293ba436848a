"""InternLM 20B: tensor parallel over 4 ranks."""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *
    from configs._base_.models.internlm_20B import *

JOB_NAME = "20b_train"

# Folders of tokens as tools/tokenizer.py writes them; None trains on dummy data.
TRAIN_FOLDER = None
VALID_FOLDER = None

data = dict(
    seq_len=4096,
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
