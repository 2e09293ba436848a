"""Mistral 7B v0.1 in its published shape: every layer attends to a window.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_mistral_train"
model_type = "MISTRAL"

data.update(
    seq_len=8192,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    use_sliding_window=True,
    sliding_window=4096,
    max_window_layers=0,  # the first layer with a window
    max_position_embeddings=32768,
    rope_base=10000,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    use_flash_attn=True,
)
