"""InternLM2 1.8B."""

model_type = "INTERNLM2"

model = dict(
    num_layers=24,
    hidden_size=2048,
    num_attention_heads=16,
    num_kv_attention_heads=8,
    vocab_size=92544,
    mlp_ratio=4,
    no_bias=True,
    norm_head=True,
    rope_base=1000000,
    qk_interleaved=False,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=0.2,
    use_flash_attn=True,
)

parallel = dict(
    zero1=dict(size=8),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1),
    weight=dict(size=1),
)
