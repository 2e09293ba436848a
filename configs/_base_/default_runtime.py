"""What the example configs share: data, checkpoints, optimisation, schedules and monitoring.

A config changes single keys with `data.update(seq_len=4096)`, or replaces a section whole with `data = dict(...)`.
"""

data = dict(
    total_steps=50000,
    valid_every=0,  # steps between evaluations, once there is a valid_folder
    pack_sample_into_one=False,
    min_length=50,
)

ckpt = dict(
    checkpoint_every=500,
    # Goes on from the newest complete checkpoint there; else from load_ckpt_info, if given; else from scratch.
    auto_resume=True,
)

# Data parallel, with the state of the optimizer split over each 8 ranks.
parallel = dict(
    zero1=dict(size=8),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1),
    weight=dict(size=1),
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,  # reduce gradients while backward runs
    overlap_sync_param=False,
    reduce_bucket_size=512 * 1024 * 1024,  # elements
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(
    lr=1e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_beta2_c=0,
    adam_eps=1e-8,
    weight_decay=0.01,
)

# total_steps is data.total_steps unless it is given here.
lr_scheduler = dict(
    type="cosine",
    init_steps=0,
    warmup_ratio=0.01,
    eta_min=1e-5,
)

# Used with dtype "torch.float16" only.
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

enable_tb = True
use_fp32_norm = False
cudnn_benchmark = False
cudnn_deterministic = False
