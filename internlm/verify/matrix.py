"""The matrices of layouts and models that the tests compare: pairwise coverings of the options of all axes."""

from __future__ import annotations

from internlm.verify.case import Combination
from internlm.verify.covering import Covering

_DOCUMENTS = (
    "",
    "documents:packed=false",
    "documents:masked=micro_batches",
    "documents:masked=ends,ragged=false",
    "documents:packed=false,masked=none,ragged=false",
)

_HEADS = ("", "model:kv_heads=2", "model:kv_heads=1")

_CHECKPOINT = (
    "",
    "model:checkpoint=0.5",
    "model:checkpoint=1",
    "model:checkpoint=1,save_policy=attention",
    "model:checkpoint=0.5,save_policy=matmuls",
)

_LATER_TOKENS = ("", "model:multi_token=1", "model:multi_token=2")

DENSE = Covering(
    axes={
        "split": (
            "",
            "layout:tensor=2,mode=mtp",
            "layout:tensor=2,mode=msp",
            "layout:tensor=2,mode=fsp",
            "layout:tensor=2,mode=isp",
            "layout:tensor=2,mode=isp,weight=2",
            "layout:tensor=2,mode=isp,weight=4,overlap",
            "layout:mode=isp,weight=2,overlap",
            "layout:tensor=4,mode=msp",
            "layout:tensor=4,mode=isp,weight=2",
        ),
        "pipeline": (
            "",
            "layout:pipeline=2",
            "layout:pipeline=4",
            "layout:pipeline=2,chunks=2",
            "layout:pipeline=2,schedule=ZBH1",
            "layout:pipeline=2,schedule=ZBV",
            "layout:pipeline=2,schedule=DUALPIPEV",
            "layout:pipeline=4,schedule=ZBV",
        ),
        "data": (
            "data=1",
            "data=2",
            "data=2 layout:zero=1",
            "data=4 layout:zero=2",
            "data=2 layout:fsdp",
        ),
        "optimizer": (
            "",
            "stepping:overlap_grad,overlap_param,bucket=1000",
            "stepping:clip=0,overlap_param",
            "stepping:offload,overlap_grad",
        ),
        "documents": _DOCUMENTS,
        "heads": _HEADS,
        "family": (
            "",
            "model:family=INTERNLM,bias=true",
            "model:family=LLAMA2,split_hidden=false",
            "model:family=QWEN2",
            "model:family=QWEN3",
            "model:family=BAICHUAN2",
            "model:family=GEMMA",
            "model:fused=true",
        ),
        "dtype": ("", "model:dtype=bfloat16", "model:dtype=bfloat16,fp32_norm,fp32_residual"),
        "checkpoint": _CHECKPOINT,
        "tied": ("", "model:tied=true"),
        "later tokens": _LATER_TOKENS,
    },
    constrained=("split", "pipeline", "data", "optimizer"),
)

EXPERTS = Covering(
    axes={
        "split": (
            "",
            "layout:tensor=2,mode=mtp",
            "layout:tensor=2,mode=msp",
            "layout:tensor=2,mode=fsp",
            "layout:tensor=2,mode=isp",
            "layout:tensor=2,mode=isp,weight=2",
            "layout:mode=isp,weight=2,overlap",
        ),
        "expert": (
            "",
            "layout:expert=2",
            "layout:expert=4",
            "layout:expert_tensor",
            "layout:expert=2,expert_tensor",
            "layout:expert_weight=4,expert_overlap",
            "layout:expert=2,expert_weight=2",
        ),
        "data": (
            "data=1",
            "data=2",
            "data=2 layout:expert_zero=1",
            "data=2 layout:zero=1",
            "data=4 layout:zero=2,expert_zero=2",
            "data=2 layout:fsdp",
        ),
        "pipeline": (
            "",
            "layout:pipeline=2",
            "layout:pipeline=2,chunks=2",
            "layout:pipeline=2,schedule=ZBH1",
            "layout:pipeline=2,schedule=ZBV",
            "layout:pipeline=2,schedule=DUALPIPEV",
        ),
        "optimizer": (
            "",
            "stepping:overlap_grad,overlap_param,bucket=1000",
            "stepping:clip=0,overlap_param",
            "stepping:groups=frozen_experts,overlap_grad",
            "stepping:groups=frozen_routers",
        ),
        "router": (
            "model:experts=4",
            "model:experts=4,top_k=4",
            "model:experts=8,top_k=1,router=plain",
            "model:experts=8,top_k=3,router=grouped",
            "model:experts=8,router=sigmoid",
            "model:experts=8,top_k=3,router=sigmoid_grouped",
            "model:experts=64,top_k=2",
        ),
        "selection": (
            "",
            "model:selection=largest",
            "model:selection=first",
            "model:selection=gshard",
            "model:selection=gshard_random",
        ),
        "family": (
            "model:family=QWEN3MOE",
            "model:family=QWEN2MOE,shared_experts=1,dense_layers=1",
            "model:family=MIXTRALMOE,shared_experts=2,fused=true",
            "model:family=INTERNLM_MoE,shared_experts=1",
            "model:family=GLM4_MOE,shared_experts=2",
            "model:family=DEEPSEEK_V2,shared_experts=2",
            "model:family=DEEPSEEK_V3,q_latent=false",
            "model:family=OLMOE,kv_heads=1",
            "model:family=GPT_OSS,kv_heads=2",
        ),
        "documents": (
            "",
            "documents:packed=false",
            "documents:masked=micro_batches",
            "documents:masked=ends,ragged=false",
        ),
        "checkpoint": _CHECKPOINT,
        "later tokens": _LATER_TOKENS,
        # Routing is discrete: in another dtype, a different order of additions can change an expert.
        "dtype": ("model:dtype=float64",),
    },
    constrained=("split", "expert", "data", "pipeline"),
)
"""Mixtures of experts."""

CONTEXT = Covering(
    axes={
        "split": (
            "",
            "layout:tensor=2,mode=mtp",
            "layout:tensor=2,mode=msp",
            "layout:tensor=2,mode=fsp",
            "layout:mode=isp",
            "layout:tensor=2,mode=isp",
            "layout:tensor=2,mode=isp,weight=4,overlap",
            "layout:mode=isp,weight=2,overlap",
        ),
        "context": (
            "layout:context=2",
            "layout:context=2,context_cut=contiguous,context_exchange=ring",
            "layout:context=2,context_cut=document_zigzag,context_exchange=all_gather",
            "layout:context=4,context_cut=zigzag",
            "layout:context=4,context_cut=document_zigzag,context_exchange=ring",
            "layout:context=4,context_cut=contiguous,context_window=2",
        ),
        "pipeline": (
            "",
            "layout:pipeline=2",
            "layout:pipeline=2,chunks=2",
            "layout:pipeline=2,schedule=ZBV",
            "layout:pipeline=2,schedule=DUALPIPEV",
        ),
        "data": (
            "data=1",
            "data=2",
            "data=2 layout:zero=1",
            "data=2 layout:zero=2",
            "data=2 layout:fsdp",
            "data=1 layout:fsdp",
        ),
        "optimizer": ("", "stepping:overlap_grad,overlap_param,bucket=1000", "stepping:offload,overlap_grad"),
        "documents": _DOCUMENTS,
        "heads": _HEADS,
        "family": (
            "",
            "model:family=INTERNLM,bias=true",
            "model:window=true",
            "model:window=true,fused=true",
            "model:family=QWEN3",
            "model:family=GEMMA",
            "model:family=LLAMA2,split_hidden=false",
        ),
        "dtype": ("model:dtype=float64", "", "model:dtype=bfloat16"),
        "checkpoint": (
            "",
            "model:checkpoint=1",
            "model:checkpoint=1,save_policy=attention",
            "model:checkpoint=0.5,save_policy=matmuls",
        ),
        "tied": ("", "model:tied=true"),
        "later tokens": _LATER_TOKENS,
    },
    constrained=("split", "context", "pipeline", "data"),
)
"""Samples that are dealt to context ranks."""

VISION = Covering(
    axes={
        "split": (
            "",
            "layout:tensor=2,mode=mtp",
            "layout:tensor=2,mode=msp",
            "layout:tensor=2,mode=fsp",
            "layout:tensor=2,mode=isp,weight=2,overlap",
            "layout:mode=isp,weight=2",
        ),
        "order": (
            "",
            "layout:context=2",
            "layout:pipeline=2",
            "layout:pipeline=2,chunks=2",
            "layout:pipeline=2,schedule=ZBV",
            "layout:pipeline=2,schedule=ZBH1",
            "layout:pipeline=2,schedule=DUALPIPEV",
        ),
        "data": ("data=1", "data=2", "data=2 layout:zero=1", "data=2 layout:fsdp"),
        "tower": (
            "model:family=LLAVA",
            "model:family=LLAVA,tower=clip_with_class,projector=linear",
            "model:family=LLAVA,tower=siglip",
        ),
        "groups": (
            "",
            "stepping:groups=projector",
            "stepping:groups=tower",
            "stepping:groups=tower,overlap_grad,bucket=500",
        ),
        "documents": ("", "documents:packed=false", "documents:masked=ends,ragged=false"),
        "checkpoint": ("", "model:checkpoint=1", "model:checkpoint=0.5,save_policy=matmuls"),
        "tied": ("", "model:tied=true"),
        "dtype": ("", "model:dtype=float64", "model:dtype=bfloat16"),
    },
    constrained=("split", "order", "data"),
)
"""Models that read pictures."""

GROUPS = (
    "ranks=4 layout:tensor=2,mode=isp,weight=2,pipeline=2,schedule=ZBV stepping:groups=frozen_layer,overlap_param",
    "ranks=2 layout:fsdp model:checkpoint=1 stepping:groups=frozen_ends",
    "ranks=4 layout:tensor=2,mode=msp,zero=1 stepping:groups=factors,overlap_grad",
)
"""Rows with parameter groups, which interact with sharding and with the pipeline schedule."""

FLOAT8_EXPERTS = tuple(
    f"{layout} model:dtype=float64,float8,experts=4,checkpoint=1,save_policy=matmuls"
    for layout in (
        "ranks=4 layout:tensor=2,mode=msp,expert=2,expert_tensor model:family=QWEN3MOE",
        "ranks=4 layout:tensor=2,mode=isp,weight=2,expert=2,expert_weight=2 model:family=QWEN3MOE",
        "ranks=4 layout:tensor=2,mode=mtp,expert_tensor,fsdp model:family=QWEN2MOE,shared_experts=1",
    )
)
"""Rows with experts in float8, in each form in which ranks hold them."""


def pairwise_matrix() -> list[Combination]:
    """Dense models: rows in which every valid pair of options occurs, followed by `GROUPS`; equal on every machine."""
    return DENSE.pairwise() + [Combination.parse(text) for text in GROUPS]


def expert_matrix() -> list[Combination]:
    """Mixtures of experts: rows in which every valid pair of options occurs, followed by `FLOAT8_EXPERTS`."""
    return EXPERTS.pairwise() + [Combination.parse(text) for text in FLOAT8_EXPERTS]


def context_matrix() -> list[Combination]:
    """Samples that are dealt to context ranks: rows in which every valid pair of options occurs."""
    return CONTEXT.pairwise()


def vision_matrix() -> list[Combination]:
    """Models that read pictures: rows in which every valid pair of options occurs."""
    return VISION.pairwise()


def full_matrix() -> list[Combination]:
    """All layouts of the four matrices, with options of the other axes sampled from a fixed seed."""
    return DENSE.full() + EXPERTS.full() + CONTEXT.full() + VISION.full()
