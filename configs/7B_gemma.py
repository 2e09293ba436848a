"""Gemma 7B in its published shape; tie_word_embeddings is the family's choice.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_gemma_train"
model_type = "GEMMA"

data.update(
    seq_len=2048,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=256000,
    hidden_size=3072,
    intermediate_size=24576,
    num_layers=28,
    num_attention_heads=16,
    num_kv_attention_heads=16,
    head_dim=256,
    add_unit_offset=True,  # norms multiply by 1 + weight
    use_swiglu=False,  # the gate is GeLU
    max_position_embeddings=8192,
    rope_base=10000,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-6,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    use_flash_attn=True,
)
