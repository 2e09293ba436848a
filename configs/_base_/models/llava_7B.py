"""LLaVA-1.5 7B: Vicuna 7B, a CLIP tower of pictures of 336 x 336 pixels, and a projector of two layers."""

model_type = "LLAVA"

model = dict(
    vocab_size=32000,
    image_token_id=200000,  # outside of the vocabulary
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_attention_heads=32,
    num_kv_attention_heads=32,
    max_position_embeddings=4096,
    rope_base=10000,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=True,
    use_flash_attn=True,
    vit_cfg=dict(
        mm_vision_tower="openai/clip-vit-large-patch14-336",  # a folder, or a name on the Hugging Face Hub
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        config=dict(  # that of the folder, so that --dry-run and layout need no download
            model_type="clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
    ),
    vision_proj_cfg=dict(mm_projector_type="mlp2x_gelu"),
)
