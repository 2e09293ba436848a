"""What InternEvo saved comes out as the model that it was, bit for bit, whatever its layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model import tiny_model

from internlm.checkpoint.inference import load_model_for_inference
from internlm.checkpoint.internevo import is_internevo
from internlm.checkpoint.tensor_files import TensorReader
from internlm.cli import main
from internlm.convert.from_internevo import Imported, import_internevo
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

from internevo_format import Checkpoint, Split, write

SECTION: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "dtype": torch.bfloat16,
    "qk_interleaved": False,
    "checkpoint": False,
    "parallel_output": True,
    "apply_post_layer_norm": False,
}
GQA = {"num_kv_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "INTERNLM": {},
    "INTERNLM2": GQA,
    "INTERNLM3": GQA,
    "LLAMA2": GQA,
    "QWEN2": GQA,
    "BAICHUAN2": {"norm_head": True},
    "GEMMA": {**GQA, "head_dim": 8, "add_unit_offset": True, "tie_word_embeddings": False},
    "MISTRAL": {**GQA, "sliding_window": 16},
}
SPLITS: dict[str, Split] = {
    "one file": Split(),
    "two tensor ranks": Split(tp=2),
    "four tensor ranks, vocabulary split": Split(tp=4, embed_dim=0),
    "three stages": Split(pp=3),
    "two tensor ranks, two stages, older names": Split(tp=2, pp=2, older_names=True),
    "two chunks in one numbering": Split(tp=2, pp=2, chunks=2),
    "two chunks in lists": Split(pp=2, chunks=2, chunk_lists=True),
    "V": Split(pp=2, chunks=2, v_shape=True),
    "four weight ranks": Split(wp=4),
    "two weight ranks, two stages": Split(wp=2, pp=2),
    "head over fewer ranks": Split(wp=4, head_ranks=2),
    "no prefix, biases on every rank": Split(tp=2, model_prefix=False, row_bias_everywhere=True),
}


def model_of(model_type: str, section: dict[str, Any]) -> Any:
    """The model, with values that no other weight of it has: biases and norms are not all zero or one."""
    values = {name: value for name, value in section.items() if name != "num_chunks"}
    model = tiny_model(model_type, **values)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def section_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**SECTION, **FAMILIES[model_type], **changes}


def save(folder: Path, model_type: str, split: Split, model: Any = None, **changes: Any) -> dict[str, torch.Tensor]:
    section = section_of(model_type, **changes)
    if split.chunks > 1:
        section["num_chunks"] = split.chunks
    written = {name: value for name, value in section.items() if name != "tie_word_embeddings"}
    return write(folder, model or model_of(model_type, section), Checkpoint(model_type, written), split)


def read_back(imported: Imported) -> dict[str, torch.Tensor]:
    reader = TensorReader(imported.path)
    return {name: reader.read(name) for name in reader.names()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_and_split_comes_back(tmp_path: Path, model_type: str, split: Split) -> None:
    state = save(tmp_path / "old", model_type, split)
    imported = import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    assert imported.path.name == "40"
    assert_same(read_back(imported), state)


def test_the_imported_checkpoint_is_one_that_runs(tmp_path: Path) -> None:
    section = section_of("LLAMA2", dtype=torch.float32)
    model = model_of("LLAMA2", section)
    write(tmp_path / "old", model, Checkpoint("LLAMA2", section), Split(tp=2, pp=2))
    import_internevo(tmp_path / "old", storage_path(tmp_path / "new"))
    loaded, config = load_model_for_inference(tmp_path / "new")
    assert (config.model_type, config.JOB_NAME, config.data.seq_len) == ("LLAMA2", "old_run", 64)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids, positions), model(ids, positions), rtol=0, atol=0)  # type: ignore[operator]
