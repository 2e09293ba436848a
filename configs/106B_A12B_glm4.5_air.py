"""GLM-4.5-Air in its published shape: 128 experts, eight for each token, and one that all share.

For 64 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "106b_a12b_glm4.5_air_train"
model_type = "GLM4_MOE"

data.update(
    seq_len=4096,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=10944,  # of the first layer, which is dense
    num_layers=46,
    num_attention_heads=96,
    num_kv_attention_heads=8,
    head_dim=128,
    qkv_bias=True,
    partial_rotary_factor=0.5,
    max_position_embeddings=131072,
    rope_base=1000000,
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=1.0,  # every layer is recomputed in backward
    num_experts=128,
    top_k=8,
    num_shared_experts=1,
    moe_type="Dropless",
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    moe_layer_kwargs=dict(scoring_func="sigmoid", selection_bias=True),
)

loss.update(moe_loss_coeff=0.0, moe_bias_update_rate=0.001, moe_sequence_loss_coeff=0.0001)

parallel.update(
    tensor=dict(size=1, mode="isp"),
    weight=dict(size=8, overlap=True),
    zero1=dict(size=-1),
    expert=dict(size=32),
)
