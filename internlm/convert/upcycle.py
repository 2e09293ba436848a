"""Sparse upcycling: makes a mixture of experts of a dense checkpoint (Komatsuzaki et al. 2022).

Every expert starts as a copy of the feed-forward block of its layer (https://arxiv.org/abs/2212.05055). The weights of
a token's experts are normalized, so the fresh mixture computes the function of the dense model, whatever it chooses.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm.checkpoint.data_tokenizer import DATA_TOKENIZER
from internlm.checkpoint.manifest import find_damage, read_manifest
from internlm.checkpoint.reading import read_config
from internlm.checkpoint.run_state import MODEL_PREFIX
from internlm.checkpoint.save_folder import resolve
from internlm.checkpoint.tensor_files import TensorReader, write_weights
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.loader import check_config
from internlm.config.schema import Config
from internlm.convert.hf_folder import CONFIG, HF_FILES, side_files
from internlm.convert.tokenizer_files import IDS
from internlm.core.parallel.materialize import draw
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.model.decoder import Decoder
from internlm.model.initialization import initializer_of
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import StoragePath

PAIRS = {
    "INTERNLM": "INTERNLM_MoE",
    "INTERNLM2": "MIXTRALMOE",
    "LLAMA2": "MIXTRALMOE",
    "LLAMA3": "MIXTRALMOE",
    "MISTRAL": "MIXTRALMOE",
    "QWEN2": "QWEN2MOE",
    "QWEN3": "QWEN3MOE",
}
"""Dense model type -> the type with experts that is otherwise the same."""

_BLOCK = ".feed_forward."


@dataclass(frozen=True)
class Upcycling:
    """How to make a mixture.

    Attributes:
        num_experts: routed experts of a layer.
        top_k: experts of a token.
        noise: standard deviation of noise on the experts, as a multiple of that of each weight; 0: exact copies.
        shared_expert: make the dense block the shared expert, too.
        dense_layers: number of first layers that stay dense.
        seed: of routers and noise.

    Raises:
        ConfigError: a value is out of range.
    """

    num_experts: int
    top_k: int
    noise: float = 0.0
    shared_expert: bool = False
    dense_layers: int = 0
    seed: int = 1024

    def __post_init__(self) -> None:
        mistakes = []
        if self.num_experts < 2:
            mistakes.append(f"--num-experts {self.num_experts}: a mixture has at least 2 experts")
        if not 1 <= self.top_k <= max(self.num_experts, 1):
            mistakes.append(f"--top-k {self.top_k}: must be from 1 to --num-experts {self.num_experts}")
        if self.dense_layers < 0:
            mistakes.append(f"--dense-layers {self.dense_layers}: must be at least 0")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            mistakes.append(f"--noise {self.noise}: must be a finite number, at least 0")
        if mistakes:
            raise ConfigError(mistakes)


@dataclass(frozen=True)
class Upcycled:
    """The result of `upcycle`.

    Attributes:
        path: folder of the new checkpoint.
        model_type: of the mixture.
        keys: of the model section that differ from those of the dense model.
        notices: one line for each property of the mixture that may be unwanted.
    """

    path: StoragePath
    model_type: str
    keys: dict[str, Any]
    notices: list[str]


def upcycle(checkpoint: StoragePath, out: StoragePath, settings: Upcycling) -> Upcycled:
    """Write the checkpoint `<out>/0/` of a mixture, with one tensor of the dense model in memory, and one expert.

    Args:
        checkpoint: of a dense model, or a save folder, whose newest complete checkpoint is used.
        out: save folder; must not have a checkpoint 0.
        settings: how to make it.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or `out` has a checkpoint 0.
        ConfigError: there is no mixture that computes the function of the model.
    """
    target = out / "0"
    if target.exists():
        raise CheckpointError(f"'{target}' already exists; give another --out")
    source = resolve(checkpoint)
    manifest = read_manifest(source)
    damage = find_damage(source, manifest) if manifest else []
    if damage:
        raise CheckpointError(f"the checkpoint '{source}' is damaged: {'; '.join(damage)}")
    dense_config = read_config(source)
    dense = _decoder(dense_config, source)
    config = _config(dense_config, dense, settings, source, target)
    mixture = _decoder(config, source)
    reader = TensorReader(source)
    _check(reader, dense, mixture)
    weights = _Weights(reader, settings, halves=config.model.num_shared_experts > 0 and _is_added(mixture))
    tensors = {name: weights.lazy(name, parameter) for name, parameter in mixture.named_parameters()}
    path = write_weights(out, tensors, config=config, step=0, files=_side_files(source))
    new, old = (one.model.model_dump(mode="json") for one in (config, dense_config))
    keys = {name: value for name, value in new.items() if value != old[name]}
    notices = []
    if settings.top_k == 1:
        notices.append(
            "with top_k = 1, the normalized weight of the expert is always 1: only the balance loss trains the router"
        )
    if weights.halves:
        notices.append(
            "w2 of the routed experts is half of the dense one, and the gate of the shared expert starts at 0, where "
            "its sigmoid is 1/2: together they compute the dense block"
        )
    return Upcycled(path, config.model_type, keys, notices)


def _decoder(config: Config, source: StoragePath) -> Decoder:
    with torch.device("meta"):
        model = build_model(config.model_type, config.model, norm_dtype=torch.float32 if config.use_fp32_norm else None)
    if not isinstance(model, Decoder):
        raise CheckpointError(f"'{source}': model_type '{config.model_type}' is not a decoder of this package")
    return model


def _config(config: Config, dense: Decoder, settings: Upcycling, source: StoragePath, target: StoragePath) -> Config:
    """The config of the mixture, with placeholders for the required keys of a run."""
    a = dense.architecture
    if a.experts is not None:
        raise ConfigError(f"'{source}' is a mixture of {a.experts.form.num_experts} experts already")
    if config.model_type not in PAIRS:
        raise ConfigError(
            f"'{source}': no model type with experts is otherwise like model_type = '{config.model_type}'. Supported: "
            f"{', '.join(PAIRS)}"
        )
    if a.mlp_bias:
        raise ConfigError(
            f"'{source}': the feed-forward blocks have biases (model.mlp_bias), which experts do not have"
        )
    section = config.model.model_dump(mode="json") | {
        "num_experts": settings.num_experts,
        "top_k": settings.top_k,
        "num_shared_experts": int(settings.shared_expert),
        "moe_type": "Dropless",
        "intermediate_size": a.intermediate_size,
        "first_k_dense_replace": settings.dense_layers,
    }
    del section["moe_layer_kwargs"]
    if config.model_type == "INTERNLM2":
        section["enable_qkv_fusion"] = a.fused_qkv  # All that distinguishes it from Llama.
    if all(window is None for window in a.windows):
        section["sliding_window"] = None  # Mixtral has a window wherever its size is given.
    tokenizer_path = config.data.tokenizer_path
    if target.is_local and tokenizer_path == str((source / HF_FILES).local.absolute()):
        tokenizer_path = str((target / HF_FILES).local.absolute())
    result = Config.model_validate(
        {
            "JOB_NAME": "upcycled",
            "model_type": PAIRS[config.model_type],
            "model": section,
            "use_fp32_norm": config.use_fp32_norm,
            "data": {
                "seq_len": config.data.seq_len,
                "micro_bsz": 1,
                "total_steps": 1,
                "tokenizer_path": tokenizer_path,
            },
            "ckpt": {"enable_save_ckpt": False},
        }
    )
    check_config(result)
    old, new = a.function, _decoder(result, source).architecture.function
    changed = [name for name in old if name not in ("experts", "layer_kinds") and old[name] != new[name]]
    if changed:
        raise ConfigError(
            f"'{source}': model_type = '{result.model_type}' does not have the model's {', '.join(changed)}"
        )
    return result


def _is_added(mixture: Decoder) -> bool:
    """Whether the gated output of the shared expert is added to that of the routed ones."""
    experts = mixture.architecture.experts
    return experts is not None and experts.shared_mix == "sigmoid"


def _check(reader: TensorReader, dense: Decoder, mixture: Decoder) -> None:
    """Check that the checkpoint has the weights of its config, and the mixture all of them."""
    stored = {name: reader.shape(name) for name in reader.names()}
    expected = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    outside = {name: tuple(parameter.shape) for name, parameter in mixture.named_parameters() if _BLOCK not in name}
    assert outside == {name: shape for name, shape in expected.items() if _BLOCK not in name}
    if stored != expected:
        names = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        raise CheckpointError(
            f"the weights in '{reader.path}' do not fit its config: {', '.join(names[:4])}"
            + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        )


def _side_files(source: StoragePath) -> dict[str, bytes]:
    """The tokenizer and generation config that the checkpoint was imported with, and the record of its tokenizer."""
    files = side_files(source / HF_FILES) if (source / HF_FILES).is_folder() else {}
    ids = {name: value for name, value in json.loads(files.pop(CONFIG, b"{}")).items() if name in IDS}
    # The code of the model is that of the dense one.
    files = {name: data for name, data in files.items() if not name.endswith(".py") or "tokeniz" in name}
    if ids:
        files[CONFIG] = json.dumps(ids, indent=1).encode()
    result = {f"{HF_FILES}/{name}": data for name, data in files.items()}
    if (source / DATA_TOKENIZER).is_file():
        result[DATA_TOKENIZER] = (source / DATA_TOKENIZER).read_bytes()
    return result


class _Weights:
    """The weights of a mixture.

    Args:
        reader: the dense checkpoint.
        settings: how to make it.
        halves: whether routed and shared experts each contribute half of the dense block.
    """

    def __init__(self, reader: TensorReader, settings: Upcycling, *, halves: bool) -> None:
        self.halves = halves
        self._reader = reader
        self._settings = settings
        self._last: tuple[str, Tensor] | None = None

    def lazy(self, name: str, parameter: nn.Parameter) -> LazyTensor:
        """A weight, computed on demand."""
        shape = tuple(parameter.shape)
        if ".feed_forward.experts." in name:
            parts = self._parts(name)
            dtype = self._reader.entries[f"{MODEL_PREFIX}{parts[0]}"].dtype
            return LazyTensor.stacked(shape, dtype, partial(self._expert, name, parts))
        if ".feed_forward.router." in name or ".feed_forward.shared_gate." in name:
            return LazyTensor(shape, parameter.dtype, self._drawn(name, parameter))
        dense_name = name.replace(".feed_forward.shared.", _BLOCK)
        return LazyTensor(
            shape, self._reader.entries[f"{MODEL_PREFIX}{dense_name}"].dtype, partial(self._read, dense_name)
        )

    def _parts(self, name: str) -> list[str]:
        """The dense weights whose rows are those of an expert."""
        block = name[: name.index(_BLOCK) + len(_BLOCK)]
        if name.endswith(".w2"):
            return [f"{block}w2.weight"]
        fused = f"{block}w13.weight"
        return (
            [fused]
            if f"{MODEL_PREFIX}{fused}" in self._reader.entries
            else [f"{block}{w}.weight" for w in ("w1", "w3")]
        )

    def _drawn(self, name: str, parameter: nn.Parameter) -> Callable[[], Tensor]:
        """Initial values, as a run with this seed would draw them; a gate that is added starts at 0."""
        if self.halves and ".shared_gate." in name:
            return lambda: torch.zeros(parameter.shape, dtype=parameter.dtype)
        spec, initializer = ShardSpec.whole(name, parameter.shape), initializer_of(parameter)
        return partial(draw, spec, initializer, self._settings.seed, parameter.dtype, torch.device("cpu"))

    def _read(self, name: str) -> Tensor:
        return finite(self._reader.read(name), name, f"'{self._reader.path}'")

    def _rows(self, parts: list[str]) -> Tensor:
        """The rows of an expert without noise; the last ones are kept, for the next expert of the layer."""
        if self._last is None or self._last[0] != parts[0]:
            self._last = None
            tensors = [self._read(name) for name in parts]
            self._last = parts[0], tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return self._last[1]

    def _expert(self, name: str, parts: list[str], expert: int) -> Tensor:
        rows = self._rows(parts)
        is_down = name.endswith(".w2")
        scale = 0.5 if self.halves and is_down else 1.0
        if not self._settings.noise:
            return rows * scale
        wide = torch.promote_types(rows.dtype, torch.float32)
        key = f"{self._settings.seed}/upcycling/{name}/{expert}"
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
        )
        result = []
        for part in rows.to(wide).chunk(1 if is_down else 2):
            noise = torch.randn(part.shape, generator=generator, dtype=wide)
            result.append(scale * (part + self._settings.noise * part.std() * noise))
        return finite(torch.cat(result), f"{name}[{expert}]", "with noise", rows.dtype)
