"""The model card (README.md) of an exported folder: what the model is, how it was trained, what was checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internlm.checkpoint.manifest import read_manifest
from internlm.checkpoint.reading import CONTEXT_FILE, read_context
from internlm.checkpoint.weight_source import LazyTensor
from internlm.config.schema import Config
from internlm.convert.findings import Finding
from internlm.convert.hf_folder import CONFIG, HF_FILES
from internlm.utils.storage import StoragePath

MODEL_CARD = "README.md"
_CHECKS = "\n## Checks\n"
_UNCHECKED = "\nNot checked. `internlm convert to-hf --check` compares an export with its checkpoint.\n"


def model_card(
    checkpoint: StoragePath, config: Config, values: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> str:
    """The content of the card, without checks.

    Args:
        checkpoint: the source.
        config: of its run.
        values: the exported config.json.
        tensors: the exported weights.
    """
    num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    language = {**values, **values.get("text_config", {})}
    model = {
        "class of transformers": values["architectures"][0],
        "model type of internlm": config.model_type,
        "parameters": f"{num_parameters:,}",
        "dtype": values["dtype"] if "dtype" in values else values.get("torch_dtype"),
        "layers": language.get("num_hidden_layers"),
        "hidden size": language.get("hidden_size"),
        "attention heads": language.get("num_attention_heads"),
        "key-value heads": language.get("num_key_value_heads"),
        "vocabulary": language.get("vocab_size"),
        "context in tokens": language.get("max_position_embeddings"),
        "experts": config.model.num_experts if config.model.num_experts > 1 else None,
    }
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {'image-text-to-text' if 'vision_config' in values else 'text-generation'}",
            "---",
            "",
            f"# {config.JOB_NAME}",
            "",
            "## Model",
            "",
            *_table(model),
            "",
            "## Training",
            "",
            *_table(_training(checkpoint, config)),
            _CHECKS + _UNCHECKED,
        ]
    )


def add_checks(folder: StoragePath, findings: Sequence[Finding]) -> None:
    """Write the results of checks into the card of a folder, in place of earlier ones."""
    before, heading, _ = (folder / MODEL_CARD).read_text().rpartition(_CHECKS)
    lines = ["", "| checked | result | |", "|---|---|---|"]
    lines += [f"| {one.subject} | {one.outcome} | {one.text.replace('|', chr(92) + '|')} |" for one in findings]
    (folder / MODEL_CARD).write_bytes((before + heading + "\n".join(lines) + "\n").encode())


def _training(checkpoint: StoragePath, config: Config) -> dict[str, Any]:
    """What the config and the counters of the checkpoint tell; weights that were only imported have no counters."""
    manifest = read_manifest(checkpoint)
    imported = checkpoint / HF_FILES / CONFIG
    rows: dict[str, Any] = {"weights imported from a Hugging Face folder": "yes" if imported.is_file() else None}
    if manifest is None or CONTEXT_FILE not in manifest.files:
        return {**rows, "steps": "none recorded: these weights were converted or written without a run"}
    context = read_context(checkpoint)
    state, data, adam = context["state"], config.data, config.adam
    folder = data.train_folder or ("a blend of sources" if data.blend else None)
    return {
        **rows,
        "steps": f"{state['step']:,} of {data.total_steps:,}",
        "tokens, padding included": f"{state['num_consumed_tokens']:,}",
        "sequence length": data.seq_len,
        "ranks": context.get("world_size"),
        "data": folder,
        "optimizer": f"AdamW, peak learning rate {adam.lr:g}, betas {adam.adam_beta1:g} and {adam.adam_beta2:g}, "
        f"weight decay {adam.weight_decay:g}",
        "seed": config.seed,
    }


def _table(rows: Mapping[str, Any]) -> list[str]:
    """A table of two columns, without the rows that are None."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value is not None)]
