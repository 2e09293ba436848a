"""A Hugging Face class as a model of this package: its own modules, with our attention, loss and recomputation.

Shapes: B sequences, S tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import ModelConfig
from internlm.model.hf_class.attention import (
    NAME,
    Documents,
    install_attention,
    register_attention,
)
from internlm.model.hf_class.head import HeadForm, head_form
from internlm.model.hf_class.layers import Absent, RecomputableMixin, make_recomputable
from internlm.model.hf_class.meta_build import build_on_meta
from internlm.model.hf_class.probe import attention_calls, gemm_flops_per_token
from internlm.model.hf_class.roles import PlannedRoles, roles_of_layers
from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.roles import Role
from internlm.utils.errors import ConfigError
from internlm.utils.hf_classes import config_object, model_class


class HfClassModel(nn.Module):
    """The modules of a `...ForCausalLM` of transformers, under their own names, as a model that can be parallelized.

    Weights have the names of the class, so its checkpoints have the names of ours.

    Attributes:
        roles: module name -> `Role`, from the plan of the class.
        planned: the same, with the blocks that the plan cannot split.
        attention_calls: how each module calls attention.
        attention_windows: window (None: no limit) -> number of calls of attention that have it.
        vocab_size, has_tied_head: of the head.
        all_names: of the weights of the whole model.
        tied_names: name of the weight of a tied head -> name of that of the embedding.
        logit_softcap: c, where logits l become c tanh(l / c); None: they are l.
        own_tokens: takes values of all tokens `[B, S]` to those of this rank's part of the residual stream; set by
            `parallelize`.
        offloading: moves activations to host memory; None: they stay on the device.
        is_first, is_last, residual_size, residual_dtype: of a pipeline stage; see `Decoder`.

    Raises:
        ConfigError: the class is no language model, or computes attention in a way that is not supported.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.hf_class is not None
        register_attention()
        kind = model_class(config.hf_class)
        hf_config = config_object(config.hf_class)
        dtype = config.torch_dtype

        def make() -> nn.Module:
            # Grouped GEMMs know no float64.
            options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
            try:
                model: nn.Module = kind._from_config(hf_config, dtype=dtype, attn_implementation=NAME, **options)
            except Exception as error:  # The constructor of any class runs here.
                raise ConfigError(
                    f"{kind.__name__} cannot be built from its config, a {type(hf_config).__name__}: "
                    f"{type(error).__name__}: {error}; correct config.json or hf.cfg_extra_kwargs"
                ) from error
            return model

        whole = build_on_meta(make, dtype)
        _refuse_dropout(whole)
        self._adopt(whole)
        self.documents = Documents()
        layers = _layers_of(whole, self.base)
        calls = attention_calls(self.base, config.hidden_size, dtype)
        if not calls:
            raise ConfigError(
                f"{kind.__name__} computes no attention that this project can replace, so packed documents would see "
                "each other and no layout could split it"
            )
        backend = config.attention_backend if config.use_flash_attn else "off"
        install_attention(self.base, calls, self.documents, backend)
        self._layers_name = layers[0]
        for number, layer in enumerate(layers[1]):
            make_recomputable(layer, number, self.documents)
        self.attention_calls = tuple(calls.values())
        self.attention_windows = Counter(call.window for call in calls.values())
        self.hf_config = hf_config
        self._finish(kind, config, calls)

    # -- taking the class apart -----------------------------------------------------------------------------------

    def _adopt(self, whole: nn.Module) -> None:
        """Take the base model and the head of a `...ForCausalLM` as children, under their names."""
        head = whole.get_output_embeddings()  # type: ignore[operator]
        embedding = whole.get_input_embeddings()  # type: ignore[operator]
        names = {module: name for name, module in whole.named_modules()}
        prefix = whole.base_model_prefix
        name = type(whole).__name__
        if not isinstance(head, nn.Linear) or whole.base_model is whole or embedding is None:
            raise ConfigError(f"{name} has no linear head over a base model: only language models are trained")
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"{name} has a {type(embedding).__name__} where a language model has an embedding")
        unknown = [n for n, child in whole.named_children() if n not in (prefix, names[head]) and _has_weights(child)]
        unknown += [n for n, _ in whole.named_parameters(recurse=False)]
        if unknown:
            raise ConfigError(f"{name} has weights besides its base model and its head: {', '.join(unknown)}")
        self.base_name, self.head_name, self.embedding_name = str(prefix), names[head], names[embedding]
        setattr(self, self.base_name, whole.base_model)
        setattr(self, self.head_name, head)
        self.has_tied_head = head.weight is embedding.weight
        self.all_names = [name for name, _ in self.named_parameters()]
        head_weight, embedding_weight = f"{self.head_name}.weight", f"{self.embedding_name}.weight"
        self.tied_names = {head_weight: embedding_weight} if self.has_tied_head else {}
        self.embedding_factor = _embedding_factor(embedding)
        self.padding_token = embedding.padding_idx
        # Modes replace the embedding by one that knows no padding token, so that in no layout it is special.
        embedding.padding_idx = None

    def _finish(self, kind: type, config: ModelConfig, calls: Mapping[str, Any]) -> None:
        self.class_name = kind.__name__
        self.vocab_size = config.vocab_size
        head = self.get_submodule(self.head_name)
        self.head_form: HeadForm = head_form(self.hf_config, has_bias=head.bias is not None)
        self.logit_softcap = self.head_form.softcap
        plan = getattr(self.hf_config, "base_model_tp_plan", None) or {}
        self.planned: PlannedRoles = roles_of_layers(self.base, self.numbered_layers(), plan, list(calls))
        self.roles = {f"{self.base_name}.{name}": role for name, role in self.planned.roles.items()}
        self.roles |= {self.embedding_name: Role.EMBEDDING, self.head_name: Role.HEAD}
        self.own_tokens: Callable[[Tensor], Tensor] = _all_tokens
        self.offloading: Offloading | None = None
        self.is_first = self.is_last = True
        self.residual_size, self.residual_dtype = config.hidden_size, config.torch_dtype

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.get_submodule(self.base_name)

    def numbered_layers(self) -> dict[int, Any]:
        """The layers of this stage by their number in the whole model, in order."""
        layers = self.base.get_submodule(self._layers_name)
        return {layer.number: layer for layer in layers.children() if isinstance(layer, RecomputableMixin)}

    def keep_stage(self, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Remove everything that is not part of one pipeline stage; see `PipelineModel.keep_stage`."""
        stack = self.base.get_submodule(self._layers_name)
        for number, layer in self.numbered_layers().items():
            if number not in layers:
                setattr(stack, str(list(stack.children()).index(layer)), Absent())
        self.is_first, self.is_last = is_first, is_last
        embedding = self.embedding_name.removeprefix(f"{self.base_name}.")
        if not is_last:
            for name in self._names_behind_layers():
                setattr(self.base, name, Absent())
        if not is_first and not (is_last and self.has_tied_head):
            self.base.set_submodule(embedding, Absent())
        if not is_last:
            setattr(self, self.head_name, Absent())

    def _names_behind_layers(self) -> list[str]:
        """The children of the base model that the residual stream passes behind the layers: the final norm.

        The pipeline plan of the class names them; without one, they are those with weights.
        """
        stack = self._layers_name.partition(".")[0]
        plan = list(getattr(self.hf_config, "base_model_pp_plan", None) or ())
        children = [name for name, _ in self.base.named_children()]
        behind = children[children.index(stack) + 1 :]
        planned = plan[plan.index(stack) + 1 :] if stack in plan else []
        return [name for name in behind if name in planned or _has_weights(self.base.get_submodule(name))]

    def notices(self, tensor: int, mode: str) -> list[str]:
        """What a layout or the class does unlike others, one line each.

        Args:
            tensor, mode: of the layout.
        """
        lines = []
        if self.padding_token is not None:
            lines.append(
                f"token {self.padding_token}, which {self.class_name} calls padding, is trained like any other where "
                "documents contain it"
            )
        blocks = self.planned.whole_blocks
        if tensor > 1 and mode == "mtp" and blocks:
            lines.append(
                f"every tensor rank computes {len(blocks)} blocks as a whole, such as '{blocks[0]}': the plan of "
                f"{self.class_name} does not split them as mode mtp needs"
            )
        return lines

    def gemm_flops_per_token(self) -> float | None:
        """FLOPs of a forward pass of the whole model for one token, attention left out; see `gemm_flops_per_token`."""
        layers = gemm_flops_per_token(self.base, self.residual_size, self.residual_dtype)
        return None if layers is None else layers + 2.0 * self.vocab_size * self.residual_size

    # -- computing ------------------------------------------------------------------------------------------------

    def forward(
        self, inputs: Tensor, position_ids: Tensor, varlen: VarlenMetadata | None = None, cache: None = None
    ) -> Tensor:
        """Hidden states for the head.

        Args:
            inputs: token ids, int64 `[B, S]`; in a later pipeline stage the residual stream `[B, S, h]`.
            position_ids: int64 `[B, S]`, position of each token in its document.
            varlen: documents of a packed row (B = 1); None: each row is one document.
            cache: must be None.

        Returns:
            `[B, S, h + 1]` if the head has a bias, else `[B, S, h]`; in an earlier pipeline stage the residual stream.
        """
        if cache is not None:
            raise ConfigError(
                f"{self.class_name} generates with transformers only: export the checkpoint (internlm convert to-hf)"
            )
        hidden = self.embed(inputs) if self.is_first else inputs
        self.documents.varlen = varlen
        for layer in self.numbered_layers().values():
            layer.offloading = self.offloading
        if self.offloading is not None:
            self.offloading.begin_pass()
        out = self.base(inputs_embeds=hidden, position_ids=self.own_tokens(position_ids), use_cache=False)
        hidden = out[0]
        return self.head_form.prepare(hidden) if self.is_last else hidden

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids `[B, S]` -> the residual stream `[B, S, h]`."""
        embedding = self.get_submodule(self.embedding_name)
        if isinstance(embedding, nn.Embedding):
            hidden = F.embedding(input_ids, embedding.weight)
        else:
            hidden = embedding(input_ids)
        return hidden if self.embedding_factor is None else hidden * self.embedding_factor

    def head_weight(self) -> Tensor:
        """Weight of the head, `[V, h]`; with a bias `[V, h + 1]`."""
        head = self.get_submodule(self.head_name)
        return self.head_form.weight(head.weight, head.bias)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of `forward` -> `[..., V]`."""
        logits = F.linear(hidden, self.head_weight())
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _all_tokens(values: Tensor) -> Tensor:
    return values


def _refuse_dropout(whole: nn.Module) -> None:
    """Ranks draw other random numbers than one process, and recomputation other ones than the first pass."""
    dropped = [(name, module.p) for name, module in whole.named_modules() if _drops(module)]
    if dropped:
        name, share = dropped[0]
        raise ConfigError(
            f"'{name}' of {type(whole).__name__} drops {share:.0%} of its values, which this project does in no model; "
            "set the dropouts of its config to 0 in hf.cfg_extra_kwargs"
        )


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _layers_of(whole: nn.Module, base: nn.Module) -> tuple[str, list[nn.Module]]:
    """(name in the base model, members) of the list of layers.

    It is the longest list of modules whose classes transformers never splits between devices.
    """
    whole_kinds = set(getattr(whole, "_no_split_modules", None) or ())
    lists = [
        (name, list(module.children()))
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(type(layer).__name__ in whole_kinds for layer in module.children())
    ]
    if not lists:
        raise ConfigError(
            f"{type(whole).__name__} names no layers: its _no_split_modules ({sorted(whole_kinds)}) fit no list of "
            "modules"
        )
    return max(lists, key=lambda found: len(found[1]))


def _embedding_factor(embedding: nn.Embedding) -> float | None:
    """The factor on the rows of an embedding that its class applies; None: there is none.

    Raises:
        ConfigError: its class does something else with them.
    """
    if type(embedding) is nn.Embedding:
        return None
    probe = copy.deepcopy(embedding)
    probe.weight = nn.Parameter(torch.ones(1, 8, dtype=embedding.weight.dtype, device="cpu"), requires_grad=False)
    probe.padding_idx = None
    with torch.device("cpu"):
        ones = probe(torch.zeros(1, 1, dtype=torch.int64)).flatten()
        probe.weight.mul_(3)
        threes = probe(torch.zeros(1, 1, dtype=torch.int64)).flatten()
    factor = ones[0].item()
    if not torch.equal(ones, torch.full_like(ones, factor)) or not torch.allclose(threes, 3 * ones, rtol=1e-2):
        raise ConfigError(f"{type(embedding).__name__} does more than look up rows and multiply them by a number")
    return factor
