"""OLMoE-1B-7B in its published shape: 64 experts, eight for each token.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_a1b_olmoe_train"
model_type = "OLMOE"

data.update(
    seq_len=4096,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=1024,  # of one expert
    num_layers=16,
    num_attention_heads=16,
    max_position_embeddings=4096,
    rope_base=10000,
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    num_experts=64,
    top_k=8,
    moe_type="Dropless",
    moe_layer_kwargs=dict(normalize_expert_weights=False),
)

loss.update(moe_loss_coeff=0.01, moe_z_loss_coeff=0.001)

parallel.update(
    tensor=dict(size=1, mode="isp"),
    weight=dict(size=4, overlap=True),
    zero1=dict(size=-1),
    expert=dict(size=8),
)
