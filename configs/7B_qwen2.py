"""Qwen2 7B in its published shape.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_qwen2_train"
model_type = "QWEN2"

data.update(
    seq_len=2048,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

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
