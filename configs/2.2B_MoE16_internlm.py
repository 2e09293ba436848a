"""A mixture of 16 experts and a shared one, with the attention of the first InternLM: 2.2B weights, 0.7B active.

For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "2.2b_moe16_internlm_train"
model_type = "INTERNLM_MoE"

data.update(
    seq_len=2048,
    micro_bsz=1,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    train_folder=None,  # of tokens as tools/tokenizer.py writes them; None trains on dummy data
    valid_folder=None,
)
ckpt.update(save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}")

model = dict(
    vocab_size=103168,
    hidden_size=1024,
    mlp_ratio=1.5,  # width of one expert
    num_layers=24,
    num_attention_heads=16,
    max_position_embeddings=2048,
    dtype="torch.bfloat16",
    num_experts=16,
    top_k=2,
    num_shared_experts=1,
    moe_type="Dropless",
)

loss.update(moe_loss_coeff=0.1)
parallel.update(zero1=dict(size=-1), expert=dict(size=8))
