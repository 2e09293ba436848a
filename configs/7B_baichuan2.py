"""Baichuan 2 7B in its published shape: the head's rows are normalised.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_baichuan2_train"
model_type = "BAICHUAN2"

data.update(
    seq_len=2048,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=125696,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_attention_heads=32,
    norm_head=True,
    max_position_embeddings=4096,
    rope_base=10000,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-6,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    use_flash_attn=True,
)
