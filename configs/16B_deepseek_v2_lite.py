"""DeepSeek-V2-Lite in its published shape: latent attention, 64 experts, six for each token, and two that all share.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "16b_deepseek_v2_lite_train"
model_type = "DEEPSEEK_V2"

data.update(
    seq_len=4096,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,  # of the first layer, which is dense
    num_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,  # queries have no latent vector
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=4096,
    rope_base=10000,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    num_experts=64,
    top_k=6,
    num_shared_experts=2,
    moe_type="Dropless",
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    moe_layer_kwargs=dict(normalize_expert_weights=False),
)

loss.update(moe_loss_coeff=0.001)

parallel.update(
    tensor=dict(size=1, mode="isp"),
    weight=dict(size=4, overlap=True),
    zero1=dict(size=-1),
    expert=dict(size=8),
)
