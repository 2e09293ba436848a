"""What differs between a blend and that of the checkpoint it continues, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from internlm.data.sources.blend_members import BlendSource
from internlm.data.sources.blend_order import Weights


def settings_of(source: BlendSource, schedule: Sequence[tuple[int, Weights]]) -> dict[str, Any]:
    """The settings of a source in its blend, as JSON values.

    Args:
        source: of the blend.
        schedule: see `BlendOrder.schedule`.

    Returns:
        "share": (first sample, share) of each change of its share while no source has ended; "epochs_max"; "on_end".
    """
    share: list[list[Any]] = []
    for index, weights in schedule:
        weight = str(weights.get(source.name, Fraction(0)))
        if not share or share[-1][1] != weight:
            share.append([index, weight])
    return {"share": share, "epochs_max": source.epochs_max, "on_end": source.on_end}


def describe_changes(
    index: int,
    sources: Sequence[BlendSource],
    schedule: Sequence[tuple[int, Weights]],
    saved: Mapping[str, Any],
    common_facts: Collection[str],
) -> list[str]:
    """What differs between the sources of a saved state and those of a blend, one sentence each.

    Args:
        index: the next sample.
        sources: of the blend.
        schedule: see `BlendOrder.schedule`.
        saved: "sources" of the saved state.
        common_facts: names of facts that the loader compares.
    """
    if not saved:
        text = (
            "the checkpoint has no blend: every source starts at its first sample, and shares are counted from sample "
            f"{index:,} on"
        )
        return [text] if index > 0 else []
    notices = []
    for source in sources:
        if source.name not in saved:
            notices.append(f"the blend has a new source '{source.name}', which starts at its first sample")
            continue
        old = saved[source.name]
        if old.get("is_absent"):
            notices.append(
                f"the blend has the source '{source.name}' again, which continues at its sample {old['samples']:,}"
            )
        for key, value in settings_of(source, schedule).items():
            if old["settings"].get(key) != value:
                before, now = (_readable(each) for each in (old["settings"].get(key), value))
                notices.append(f"source '{source.name}': its {key} was {before}, is {now} from sample {index:,} on")
        changed = {
            key: (old["facts"].get(key), value)
            for key, value in source.stream.facts.items()
            if old["facts"].get(key, value) != value and key not in common_facts
        }
        if changed:
            what = ", ".join(f"{key} was {before}, is {now}" for key, (before, now) in changed.items())
            notices.append(
                f"source '{source.name}': its order differs from that of the checkpoint ({what}): it continues at its "
                f"sample {old['samples']:,} of the new order, so it may repeat some documents and miss others"
            )
    names = {source.name for source in sources}
    notices += [
        f"the blend no longer has the source '{name}', which had {saved[name]['samples']:,} samples; checkpoints keep "
        "its position, from which it continues if it is added again"
        for name in saved
        if name not in names
    ]
    return notices


def _readable(setting: Any) -> str:
    if not isinstance(setting, list):
        return repr(setting)
    steps = [(f"{float(Fraction(share)):.6g}", first) for first, share in setting]
    return ", ".join(share + (f" from sample {first:,} on" if first else "") for share, first in steps)
