"""Qwen3 30B-A3B in its published shape: 128 experts, eight for each token.

For 16 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "30b_a3b_qwen3_train"
model_type = "QWEN3MOE"

data.update(
    seq_len=4096,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=768,  # of one expert
    num_layers=48,
    num_attention_heads=32,
    num_kv_attention_heads=4,
    head_dim=128,
    max_position_embeddings=32768,
    rope_base=1000000,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    num_experts=128,
    top_k=8,
    moe_type="Dropless",
)

loss.update(moe_loss_coeff=0.001)

parallel.update(
    tensor=dict(size=1, mode="isp"),
    weight=dict(size=8, overlap=True),
    zero1=dict(size=-1),
    expert=dict(size=16),
)
