"""InternLM2 20B."""

model_type = "INTERNLM2"

model = dict(
    num_layers=48,
    hidden_size=6144,
    num_attention_heads=48,
    num_kv_attention_heads=8,
    vocab_size=92544,
    mlp_ratio=8 / 3,
    no_bias=True,
    rope_base=1000000,
    qk_interleaved=False,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=1.0,
    use_flash_attn=True,
)

parallel = dict(
    zero1=dict(size=16),
    tensor=dict(size=2, mode="mtp"),
    pipeline=dict(size=1),
    weight=dict(size=1),
)
