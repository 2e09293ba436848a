"""LLaVA-1.5 7B, stage 2: projector and language model are trained on conversations.

The vision tower stays frozen. Start from the last checkpoint of stage 1.
For 8 ranks, or a multiple of them.
"""

from internlm.config import read_base

with read_base():
    from configs._base_.default_runtime import *

JOB_NAME = "7b_llava_stage2"
model_type = "LLAVA"

data.update(
    is_multimodal=True,
    image_size=336,
    patch_size=14,
    seq_len=2048,
    micro_bsz=4,  # sequences of a micro-batch
    micro_num=4,  # micro-batches of a step, on each data rank
    # None trains on dummy data. JSON of LLaVA's form needs type="streaming", conversations={}, tokenizer_path and
    # image_folder; see doc/multimodal.md.
    train_folder=None,
    valid_folder=None,
    total_steps=5197,
)
ckpt.update(
    save_ckpt_folder=f"local:llm_ckpts/{JOB_NAME}",
    load_ckpt_info=dict(path="local:llm_ckpts/xxxx", content=("model",)),
)

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
adam = dict(lr=2e-5, weight_decay=0.0)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.03)
