"""InternLM 7B, as InternEvo's 7B_sft: data parallel with the optimizer state over 8 ranks."""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *
    from configs._base_.models.internlm_7B import *

JOB_NAME = "7b_train"

# Folders of tokens as tools/tokenizer.py writes them; None trains on dummy data.
TRAIN_FOLDER = None
VALID_FOLDER = None

data = dict(
    seq_len=2048,
    micro_bsz=2,  # sequences of a micro-batch
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
