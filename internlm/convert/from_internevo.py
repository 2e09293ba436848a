"""Converts a checkpoint of InternEvo: weights, optimizer state, and the model's config."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.tensor_files import write_weights
from internlm.checkpoint.weight_source import LazyTensor, finite
from internlm.config.legacy import translate_legacy
from internlm.config.loader import check_config, read_tree
from internlm.config.schema import Config
from internlm.config.validation import build_config
from internlm.convert.internevo_expert_keys import expert_keys
from internlm.convert.internevo_experts import ExpertSizes, InternEvoExperts, expert_files
from internlm.convert.internevo_files import InternEvoFiles, read_value
from internlm.convert.internevo_folder import ROWS_BY_PROJECTION, InternEvoFolder, RowOrder
from internlm.convert.internevo_optimizer import InternEvoOptimizer
from internlm.convert.internevo_run import RUN_SECTIONS, differences, not_imported, run_state
from internlm.convert.internevo_shards import has_optimizer
from internlm.model.decoder import Decoder
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import StoragePath

CONFIG_TEXT, MODEL_SECTION, COUNTERS = "config_file.pt", "model_config.pt", "context.pt"

_IMPORTED_KEYS = ("JOB_NAME", "model_type", "seed", "use_fp32_norm", "model")
_IMPORTED_DATA_KEYS = ("seq_len", "micro_bsz", "total_steps", "tokenizer_path")


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        path: folder of the new checkpoint.
        layout: description of the layout that wrote the files.
        counters: InternEvo's counters (step_count, batch_count, num_consumed_tokens ...); empty if it has none.
        notices: one line for everything that was chosen, changed or omitted.
        config: of the new checkpoint.
        step: of the new checkpoint.
        options: lr, betas, eps and weight_decay of the optimizer; empty if it was not imported.
    """

    path: StoragePath
    layout: str
    counters: dict[str, Any]
    notices: list[str]
    config: Config
    step: int
    options: dict[str, Any]


def import_internevo(
    folder: Path,
    out: StoragePath,
    *,
    config_file: Path | None = None,
    model_type: str | None = None,
    weights_only: bool = False,
) -> Imported:
    """Write an InternEvo checkpoint as `<out>/<step>/`, with one tensor, or one expert, in memory at a time.

    Args:
        folder: the checkpoint, on a local disk.
        out: save folder for the new checkpoint.
        config_file: the run's config; None uses the one in the checkpoint, which is executed as Python.
        model_type: the family, if no config names it.
        weights_only: skip the optimizer state.

    Raises:
        CheckpointError: a file is missing or damaged, the weights do not fit the config, or this kind of checkpoint is
            not supported.
        ConfigError: there is no config, or it describes no valid model.
    """
    InternEvoFiles.check(folder)
    with_optimizer = not weights_only and has_optimizer(folder)
    tree, text, notices = _read_config(folder, config_file, model_type, with_optimizer)
    section = tree["model"]
    if int(section.get("num_experts", 1)) > 1:
        notices += expert_keys(tree, section)
    files = InternEvoFiles(folder, _num_chunks(tree))
    _refuse_unknown_rows(tree["model_type"], section, files)
    _add_defaults(tree["model_type"], section, notices)
    keys = _IMPORTED_KEYS + (RUN_SECTIONS if with_optimizer else ())
    config, model = _build(tree, keys)
    changes = _changes_from_files(model, files)
    if changes:
        section.update(changes)
        section.pop("no_bias", None)
        config, model = _build(tree, keys)
        notices += [f"model.{name} = {value}: as the weights in the files" for name, value in changes.items()]
    if model.architecture.experts is None and (names := expert_files(files)):
        raise CheckpointError(
            f"'{folder}' has expert files ('{names[0]}'), but the config's model is no mixture of experts (model_type, "
            "model.num_experts)"
        )
    order = RowOrder(
        by_projection=config.model_type in ROWS_BY_PROJECTION, fused_gate_up=section.get("mlp_layer_fusion") is True
    )
    source = InternEvoFolder(files, model, order)
    experts = _experts(files, model, section)
    if experts is not None and with_optimizer:
        with_optimizer = False
        notices.append("the optimizer state of mixtures of experts is not imported, as experts have files of their own")
    stored = {source.dtype(name) for name in source.names()}
    stored |= set() if experts is None else {experts.dtype(name) for name in experts.names()}
    if stored != {parameter.dtype for parameter in model.parameters()}:
        dtypes = ", ".join(sorted(map(str, stored)))
        notices.append(f"the weights keep the dtype of the files ({dtypes}); model.dtype = {config.model.dtype}")
    counters = _read_counters(folder, notices)
    tensors = {
        name: LazyTensor(source.shape(name), source.dtype(name), partial(_read, source, name, folder))
        for name in source.names()
    }
    if experts is not None:
        tensors |= {name: _stacked(experts, name, folder) for name in experts.names()}
    extra = {} if text is None else {"config_file.py": text.encode()}
    step = _step(folder, counters, notices)
    target = out / str(step)
    if target.exists():
        raise CheckpointError(f"'{target}' already exists and would be replaced; give another --out")
    kind = {"tp": "tensor", "wp": "weight"}[files.split]
    layout = f"{files.num_ranks} {kind} parallel rank(s), {files.num_stages} pipeline stage(s)"
    if experts is not None:
        layout += f", experts in {experts.num_groups} file(s) of {experts.num_ranks} rank(s) for each layer"
    if not with_optimizer:
        notices.append(f"{_why_without(folder)}: moments start at zero, masters are copies of the weights")
        path = write_weights(out, tensors, config=config, step=step, files=extra)
        return Imported(path, layout, counters, notices, config, step, {})
    optimizer = InternEvoOptimizer(files)
    notices += [*not_imported(counters), *differences(optimizer, config, counters, step)]
    state = run_state(optimizer, source, counters, step)
    path = write_weights(out, tensors, config=config, step=step, files=extra, optimizer=state)
    if optimizer.differences:
        worst = max(optimizer.differences, key=optimizer.differences.__getitem__)
        notices.append(
            f"{len(optimizer.differences)} tensor(s) of the optimizer differ between replicas, most of all {worst}, by "
            f"{optimizer.differences[worst]:.2g}: those of the first rank are used"
        )
    layout += f", {optimizer.num_zero} ZeRO rank(s)"
    return Imported(path, layout, counters, notices, config, step, optimizer.options)


def _experts(files: InternEvoFiles, model: Decoder, section: dict[str, Any]) -> InternEvoExperts | None:
    """The expert files; None for a dense model."""
    a = model.architecture
    if a.experts is None:
        return None
    sizes = ExpertSizes(a.experts.form.num_experts, a.hidden_size, a.experts.width)
    is_grouped = section.get("moe_layer_kwargs", {}).get("use_grouped_mlp")
    fused = section.get("mlp_layer_fusion") is True
    return InternEvoExperts(files, sizes, is_grouped=is_grouped, fused_gate_up=fused)


def _stacked(experts: InternEvoExperts, name: str, folder: Path) -> LazyTensor:
    def read(expert: int) -> Tensor:
        return finite(experts.read(name, expert), f"{name}[{expert}]", f"'{folder}'")

    return LazyTensor.stacked(experts.shape(name), experts.dtype(name), read)


def _why_without(folder: Path) -> str:
    return "the optimizer state is not imported" if has_optimizer(folder) else "there are no optimizer files"


def _read(source: InternEvoFolder, name: str, folder: Path) -> Tensor:
    return finite(source.read(name), name, f"'{folder}'")


def _read_config(
    folder: Path, config_file: Path | None, model_type: str | None, with_optimizer: bool
) -> tuple[dict[str, Any], str | None, list[str]]:
    """Read the config: its unvalidated keys in current spelling, the text of the whole file, and notices."""
    tree: dict[str, Any] = {}
    text: str | None = None
    if config_file is not None:
        tree, _ = read_tree(config_file)
        text = config_file.read_text(encoding="utf-8")
    else:
        if (folder / CONFIG_TEXT).exists():
            text = _read_text(folder / CONFIG_TEXT)
            tree = _execute(text, folder / CONFIG_TEXT)
        if (folder / MODEL_SECTION).exists():
            tree["model"] = read_value(folder / MODEL_SECTION)
        if not isinstance(tree.get("model"), dict):
            raise ConfigError(
                f"'{folder}' has neither {CONFIG_TEXT} nor {MODEL_SECTION} with a model section: give --config FILE"
            )
        if text is None and model_type is None:
            raise ConfigError(
                f"'{folder}' has no {CONFIG_TEXT} that names the family: give --model-type or --config FILE"
            )
    imported = ("model", *(RUN_SECTIONS if with_optimizer else ()))
    notices = [notice for notice in translate_legacy(tree, {}) if notice.startswith(imported)]
    if with_optimizer and isinstance(tree.setdefault("adam", {}), dict):
        tree["adam"].setdefault("weight_decay_norms_and_biases", True)
    if model_type is not None:
        tree["model_type"] = model_type
    tree.setdefault("model_type", Config.model_fields["model_type"].default)
    if not isinstance(tree.get("model"), dict):
        raise ConfigError(f"{config_file}: there is no model section")
    return tree, text, notices


def _read_text(path: Path) -> str:
    text = read_value(path)
    if not isinstance(text, str):
        raise CheckpointError(f"'{path}' contains a {type(text).__name__} instead of text; give --config FILE")
    return text


def _execute(text: str, origin: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config_file.py"
        path.write_text(text, encoding="utf-8")
        try:
            return read_tree(path)[0]
        except ConfigError as error:
            problems = [problem.replace(str(path), str(origin)) for problem in error.mistakes]
            raise ConfigError(
                [*problems, "give the config that belongs to the checkpoint with --config FILE"]
            ) from error


def _num_chunks(tree: dict[str, Any]) -> int:
    pipeline = tree.get("parallel", {}).get("pipeline", {})
    mode = pipeline.get("mode", "") if isinstance(pipeline, dict) else ""
    return 2 if str(mode).upper() == "ZBV" else int(tree["model"].get("num_chunks", 1))


def _refuse_unknown_rows(model_type: str, section: dict[str, Any], files: InternEvoFiles) -> None:
    fused = section.get("enable_qkv_fusion", model_type == "INTERNLM2")
    if fused and model_type in ("INTERNLM2", "INTERNLM3") and "layers.0.attention.wq.weight" in files.names():
        raise CheckpointError(
            f"'{files.folder}': the model fuses q, k and v (enable_qkv_fusion), but the files have wq, wk and wv. Some "
            "versions of InternEvo store slices of the fused rows, ordered by key-value group, under these names; "
            "others store q, k and v. If these are q, k and v, give --config FILE with model.enable_qkv_fusion = False"
        )


def _add_defaults(model_type: str, section: dict[str, Any], notices: list[str]) -> None:
    """Set omitted keys to InternEvo's defaults where this package has others."""
    if "dtype" not in section:
        section["dtype"] = "torch.float16"
        notices.append("model.dtype = torch.float16: InternEvo's default, as the config omits it")
    if model_type == "BAICHUAN2" and "norm_head" not in section:
        section["norm_head"] = False
        notices.append("model.norm_head = False: InternEvo's default, as the config omits it")
    if model_type == "GEMMA" and "add_unit_offset" not in section:
        raise ConfigError(
            "model.add_unit_offset is not given: norms of InternEvo's GEMMA then scale by the weight, those of this "
            "package by 1 + weight. Give --config FILE with add_unit_offset = True if the run had it"
        )
    if not {"qk_interleaved", "adapt_hf"} & section.keys():
        notices.append(
            "model.qk_interleaved = False: InternEvo's default, as the config omits it; versions without adapt_hf "
            "chose by family"
        )


def _build(tree: dict[str, Any], names: Sequence[str]) -> tuple[Config, Decoder]:
    """Build the config of the new checkpoint, and its model on the meta device."""
    data = tree.get("data", {})
    length = tree["model"].get("max_position_embeddings", 2048)
    required = {"seq_len": length, "micro_bsz": 1, "total_steps": 1}
    sections = {name: tree[name] for name in names if name in tree}
    # Layout and data of the old run need not be those of the next one; the whole text is stored with the weights.
    data = {**required, **{name: data[name] for name in _IMPORTED_DATA_KEYS if name in data}}
    config, problems = build_config({**sections, "data": data, "ckpt": {"enable_save_ckpt": False}})
    if problems:
        advice = ["give a corrected config for the checkpoint with --config FILE"]
        if any(problem.keys[0].startswith(RUN_SECTIONS) for problem in problems):
            advice = [f"{advice[0]}; --weights-only imports the weights without the optimizer and its sections"]
        raise ConfigError([problem.text for problem in problems] + advice)
    check_config(config)
    with torch.device("meta"):
        model = build_model(config.model_type, config.model, norm_dtype=torch.float32 if config.use_fp32_norm else None)
    if not isinstance(model, Decoder):
        raise ConfigError(f"model_type = '{config.model_type}': only this package's decoders can be imported")
    return config, model


def _changes_from_files(model: Decoder, files: InternEvoFiles) -> dict[str, bool]:
    """Keys of the model section in which the weights of the files differ from the config's model."""
    a, names = model.architecture, files.names()

    def has_bias(*parts: str) -> bool:
        return any(f"layers.0.{part}.bias" in names for part in parts)

    keys = {
        "tie_word_embeddings": (a.tie_word_embeddings, "output.weight" not in names),
        "qkv_bias": (a.qkv_bias, has_bias("attention.wqkv", "attention.wq")),
        "o_bias": (a.o_bias, has_bias("attention.wo")),
        "mlp_bias": (a.mlp_bias, has_bias("feed_forward.w1", "feed_forward.w13")),
    }
    changed = {name: found for name, (expected, found) in keys.items() if expected != found}
    if any(name.endswith("_bias") for name in changed):
        changed |= {name: found for name, (_, found) in keys.items() if name.endswith("_bias")}
    return changed


def _read_counters(folder: Path, notices: list[str]) -> dict[str, Any]:
    if not (folder / COUNTERS).exists():
        return {}
    try:
        counters = read_value(folder / COUNTERS)
    except CheckpointError as error:
        notices.append(f"the counters cannot be read: {error}")
        return {}
    return counters if isinstance(counters, dict) else {}


def _step(folder: Path, counters: dict[str, Any], notices: list[str]) -> int:
    """The number of steps that the run has taken."""
    markers = [path.stem for path in folder.glob("*.step") if path.stem.isdigit()]
    if not markers:
        notices.append("InternEvo's completion marker (<step>.step) is missing: its save may not have finished")
    if "step_count" in counters:
        return int(counters["step_count"])
    for text in (*markers, folder.name):
        if text.isdigit():
            return int(text)
    notices.append("no file records the step: the new checkpoint is of step 0")
    return 0
