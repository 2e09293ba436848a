"""The `moe` section: routing of a mixture of experts that is written, or read instead of chosen."""

from __future__ import annotations

from internlm.config.schema.base import PathText, Section, section, used_with


class MoeReplayConfig(Section):
    """Chosen experts in files, so that runs are compared at equal routing; see doc/moe.md."""

    write: PathText = used_with(
        None, "Local folder to which the experts of every token are written in each training step.", "model.num_experts"
    )
    read: PathText = used_with(
        None,
        "Local folder from which they are read; the routers' own choice is ignored in training.",
        "model.num_experts",
    )


class MoeConfig(Section):
    """Tools for mixtures of experts. Their sizes and routers are keys of `model`."""

    replay: MoeReplayConfig = section(MoeReplayConfig, "Chosen experts in files.")
