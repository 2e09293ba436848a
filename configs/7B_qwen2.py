"""Qwen2 7B in its published shape."""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_qwen2_train"
model_type = "QWEN2"

# Folders of tokens as tools/tokenizer.py writes them; None trains on dummy data.
TRAIN_FOLDER = None
VALID_FOLDER = None

data = dict(
    seq_len=2048,
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

model = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_attention_heads=28,
    num_kv_attention_heads=4,
    qkv_bias=True,
    o_bias=False,
    use_sliding_window=False,
    sliding_window=131072,
    max_window_layers=28,
    max_position_embeddings=131072,
    rope_base=1000000,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    use_flash_attn=True,
)

parallel = dict(
    zero1=dict(size=8),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1),
    weight=dict(size=1),
)
