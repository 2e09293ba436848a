"""gpt-oss-20b in its published shape: 32 experts, four for each token, and windows of 128 tokens in every other layer.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "20b_gpt_oss_train"
model_type = "GPT_OSS"

data.update(
    seq_len=4096,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,  # of one expert
    num_layers=24,
    num_attention_heads=64,
    num_kv_attention_heads=8,
    head_dim=64,
    sliding_window=128,
    sliding_window_pattern=2,  # every second layer has full attention
    max_position_embeddings=131072,
    rope_base=150000,
    rope_scaling=dict(type="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False),
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=1.0,  # every layer is recomputed: scores of attention with sinks take memory
    num_experts=32,
    top_k=4,
    moe_type="Dropless",
)

loss.update(moe_loss_coeff=0.01)

parallel.update(
    tensor=dict(size=1, mode="isp"),
    weight=dict(size=4, overlap=True),
    zero1=dict(size=-1),
    expert=dict(size=8),
)
