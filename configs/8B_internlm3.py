"""InternLM3 8B in its published shape."""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "8b_internlm3_train"
model_type = "INTERNLM3"

# Folders of tokens as tools/tokenizer.py writes them; None trains on dummy data.
TRAIN_FOLDER = None
VALID_FOLDER = None

data = dict(
    seq_len=4096,
    micro_bsz=2,  # sequences of a micro-batch
    micro_num=1,  # micro-batches of a step, on each data rank
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
    vocab_size=128512,
    hidden_size=4096,
    intermediate_size=10240,
    num_layers=48,
    num_attention_heads=32,
    num_kv_attention_heads=2,
    enable_qkv_fusion=False,
    max_position_embeddings=32768,
    rope_base=50000000,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    no_bias=True,
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
