"""Mixtral 8x7B in its published shape: eight experts, two for each token.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "8x7b_mixtral_train"
model_type = "MIXTRALMOE"

data.update(
    seq_len=4096,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,  # of one expert
    num_layers=32,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    max_position_embeddings=32768,
    rope_base=1000000,
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    num_experts=8,
    top_k=2,
    moe_type="Dropless",
)

loss.update(moe_loss_coeff=0.02)

# Each rank holds one expert of every layer, and as much of the other weights as the tensor ranks leave it.
parallel.update(tensor=dict(size=4, mode="msp"), zero1=dict(size=-1), expert=dict(size=8))
