"""A small InternLM2 that learns real text in minutes on two CPU cores: the config to read first.

For any number of ranks.
"""

JOB_NAME = "demo"
model_type = "INTERNLM2"

data = dict(
    # Written by the demo's data step; None instead of a folder trains on dummy data.
    train_folder="data/demo/train",
    valid_folder="data/demo/valid",
    tokenizer_path="data/demo/tokenizer.json",
    seq_len=256,
    micro_bsz=2,  # sequences of a micro-batch, which come from one place of the text
    micro_num=4,  # micro-batches of a step, on each data rank, from four places
    total_steps=750,
    valid_every=150,
    num_worker=1,
)

model = dict(
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_attention_heads=8,
    num_kv_attention_heads=4,
    mlp_ratio=8 / 3,
    multiple_of=64,
    max_position_embeddings=256,
    dtype="torch.bfloat16",
)

adam = dict(lr=3e-3, weight_decay=0.1)
lr_scheduler = dict(warmup_ratio=0.05, eta_min=3e-4)  # cosine over all steps
hybrid_zero_optimizer = dict(overlap_sync_grad=True, clip_grad_norm=1.0)

ckpt = dict(
    save_ckpt_folder="runs/demo/checkpoints",
    checkpoint_every=150,
    auto_resume=True,  # the second run goes on where the first one stopped
)

monitor = dict(log_every=25)
