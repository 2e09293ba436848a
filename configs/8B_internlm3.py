"""InternLM3 8B in its published shape.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "8b_internlm3_train"
model_type = "INTERNLM3"

data.update(
    seq_len=4096,
    micro_bsz=2,  # sequences of a micro-batch
    micro_num=1,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

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
