"""`internlm ckpt`: lists, shows, compares and verifies checkpoints, on a local disk or in an object store."""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm.checkpoint.inspect import (
    Changed,
    Listed,
    TensorDifference,
    changed_entries,
    changed_values,
    config_of,
    context_of,
    different_tensors,
    dtype_name,
    kinds_of,
    list_checkpoints,
    short_layout,
    weights_only,
)
from internlm.checkpoint.internevo import refuse_internevo
from internlm.checkpoint.manifest import find_damage, read_manifest
from internlm.checkpoint.run_state import MODEL_PREFIX
from internlm.checkpoint.save_folder import find_checkpoints, resolve
from internlm.checkpoint.tensor_files import Entry, TensorReader
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath, storage_path
from internlm.utils.text_table import text_table

_COUNTERS = ("state", "inf_nan_skip_batches", "num_updates", "scaler", "data", "hooks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    a_checkpoint = "checkpoint, or a folder of them (newest); local or a URL"

    ls = actions.add_parser("ls", help="list the checkpoints of a save folder", description=_list.__doc__)
    ls.add_argument("folder", metavar="DIR", help="save folder; local or a URL")
    ls.add_argument("--snapshots", metavar="DIR", help="folder of the snapshots (default: DIR/snapshot)")
    ls.set_defaults(act=_list)

    show = actions.add_parser("show", help="show the contents of a checkpoint", description=_show.__doc__)
    show.add_argument("folder", metavar="DIR", help=a_checkpoint)
    show.add_argument(
        "--tensors",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="also list the tensors; with PATTERN, those whose name contains it, or matches it if it has * or ?",
    )
    show.set_defaults(act=_show)

    diff = actions.add_parser(
        "diff", help="compare two checkpoints", description=f"{_diff.__doc__} Exits with 0 when they are equal, else 1."
    )
    diff.add_argument("first", metavar="A", help=a_checkpoint)
    diff.add_argument("second", metavar="B", help="the other checkpoint")
    diff.add_argument(
        "--values",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the values of the tensors, not only their shapes (default: yes)",
    )
    diff.add_argument("--weights-only", action="store_true", help="compare only the weights")
    diff.set_defaults(act=_diff)

    verify = actions.add_parser(
        "verify",
        help="check every file against the manifest",
        description=f"{_verify.__doc__} Exits with 0 when all match, else 1.",
    )
    verify.add_argument("folder", metavar="DIR", help=a_checkpoint)
    verify.add_argument("--all", action="store_true", help="check all checkpoints and snapshots in the folder")
    verify.set_defaults(act=_verify)


def run(options: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    return options.act(options)


# -- ls ----------------------------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    """List checkpoints, snapshots, exports, and the leftovers of interrupted saves."""
    folder = storage_path(options.folder)
    snapshots = storage_path(options.snapshots) if options.snapshots else None
    found = list_checkpoints(folder, snapshots)
    if not found:
        if not folder.is_folder():
            raise CheckpointError(f"'{folder}' does not exist")
        print(f"no checkpoint in '{folder}'")
        return 0
    head = ("name", "step", "tokens", "kind", "contents", "size", "age", "ranks that wrote it")
    print("\n".join(text_table([head, *map(_row, found)], "<>><<>><")))
    for one in found:
        if one.problem:
            print(f"{one.name}: {one.problem}")
    leftovers = [one for one in found if one.kind == "leftover"]
    if leftovers:
        size = format_bytes(sum(one.num_bytes for one in leftovers))
        print(
            f"{len(leftovers)} leftover(s), {size}: of interrupted saves, or of one in progress; the next save of a "
            "run removes them"
        )
    return 0


def _row(one: Listed) -> tuple[str, ...]:
    manifest, state = one.manifest, one.context.get("state", {})
    return (
        one.name,
        "-" if one.step is None else f"{one.step:,}",
        f"{state['num_consumed_tokens']:,}" if "num_consumed_tokens" in state else "-",
        one.kind,
        "-" if manifest is None else _contents(manifest.contents),
        format_bytes(one.num_bytes),
        "-" if manifest is None else format_age(time.time() - manifest.saved_at),
        short_layout(one.context),
    )


# -- show --------------------------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    """Show the counters, contents, sizes and config of a checkpoint, and on request its tensors."""
    path = resolve(storage_path(options.folder))
    manifest = read_manifest(path)
    assert manifest is not None
    context, config = context_of(path, manifest), config_of(path, manifest)
    entries = TensorReader(path).entries
    state = context.get("state", {})
    weights = [kind for kind in kinds_of(entries) if kind.kind == "model"]
    files = sum(file.size for file in manifest.files.values())
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved_at))
    lines = [
        ("checkpoint", str(path)),
        ("step", f"{manifest.step:,}"),
        ("saved", f"{saved} ({format_age(time.time() - manifest.saved_at)} ago)"),
        ("contents", _contents(manifest.contents)),
        ("samples", _number(state.get("num_consumed_samples"))),
        ("tokens", _number(state.get("num_consumed_tokens"))),
        ("skipped", _number(context.get("inf_nan_skip_batches"), "updates")),
        ("data", _pairs(context.get("data", {}))),
        ("parameters", _number(sum(kind.num_elements for kind in weights))),
        ("files", f"{len(manifest.files):,}, {format_bytes(files)}"),
        ("written by", f"{short_layout(context)} rank(s)" if context else "-"),
        *_config_lines(config),
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in lines if text != "-"))
    for line in str(context.get("layout", "")).splitlines():
        print(f"{'':<{width}}  {line}")
    rows = [("kind", "tensors", "elements", "size", "dtype")]
    rows += [
        (
            kind.kind,
            f"{kind.num_tensors:,}",
            f"{kind.num_elements:,}",
            format_bytes(kind.num_bytes),
            ", ".join(kind.dtypes),
        )
        for kind in kinds_of(entries)
    ]
    rest = files - sum(kind.num_bytes for kind in kinds_of(entries))
    rows.append(("other", "", "", format_bytes(rest), ""))
    print("\n" + "\n".join(text_table(rows, "<>>><")))
    if options.tensors is not None:
        print("\n" + "\n".join(_tensor_table(entries, options.tensors)))
    return 0


def _config_lines(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not config:
        return []
    model, data = config.get("model", {}), config.get("data", {})
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_kv_attention_heads", "vocab_size", "dtype")
    return [
        ("job", str(config.get("JOB_NAME", "-"))),
        ("architecture", f"{config.get('model_type', '-')}: {_pairs({name: model.get(name) for name in names})}"),
        ("training", _pairs({name: data.get(name) for name in ("seq_len", "micro_bsz", "micro_num", "total_steps")})),
        ("rate", _pairs({"lr": config.get("adam", {}).get("lr")})),
    ]


def _tensor_table(entries: Mapping[str, Entry], pattern: str) -> list[str]:
    glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
    rows = [
        (key, str(list(entry.shape)), dtype_name(entry.dtype), format_bytes(entry.num_bytes))
        for key, entry in entries.items()
        if fnmatch.fnmatchcase(key, glob) or fnmatch.fnmatchcase(key.removeprefix(MODEL_PREFIX), glob)
    ]
    if not rows:
        raise CheckpointError(f"--tensors {pattern}: none of the {len(entries):,} tensor names matches")
    return text_table([("tensor", "shape", "dtype", "size"), *rows], "<<<>")


# -- diff --------------------------------------------------------------------------------------------------------------


def _diff(options: argparse.Namespace) -> int:
    """Compare counters, configs, and tensors by name, shape, dtype and value."""
    paths = [resolve(storage_path(text)) for text in (options.first, options.second)]
    readers = [TensorReader(path) for path in paths]
    entries = [reader.entries for reader in readers]
    is_equal = True
    print(f"A  {paths[0]}\nB  {paths[1]}")
    if options.weights_only:
        entries = [weights_only(found) for found in entries]
    else:
        is_equal &= _print_changes("counters", changed_values(*[_counters(path) for path in paths]))
        is_equal &= _print_changes("config", changed_values(*[_config(path) for path in paths]))
    changes = changed_entries(*entries)
    is_equal &= _print_changes(
        "tensors", [Changed(one.name, _describe(one.first), _describe(one.second)) for one in changes]
    )
    both = [key for key in entries[0] if key in entries[1] and entries[0][key].shape == entries[1][key].shape]
    if options.values:
        is_equal &= _print_different(different_tensors(readers[0], readers[1], both), both)
    if is_equal:
        what = "weights" if options.weights_only else "counters, configs and tensors"
        print(f"equal: {what}, {len(both):,} tensors" + ("" if options.values else ", values not compared"))
    return 0 if is_equal else 1


def _print_different(differences: Iterator[TensorDifference], keys: Sequence[str]) -> bool:
    """Print each differing tensor as soon as it is found, as reading may take long; returns whether all are equal."""
    width, count = max(map(len, keys), default=0), 0
    for one in differences:
        if not count:
            print(f"\nvalues\n  {'tensor':<{width}}  {'max |a - b|':>11}  {'different':>13}  {'of':>13}")
        gap = f"{one.max_difference:.3g}"
        print(f"  {one.key:<{width}}  {gap:>11}  {one.num_different:>13,}  {one.num_elements:>13,}", flush=True)
        count += 1
    if count:
        print(f"values: {count:,} of {len(keys):,} tensors differ")
    return not count


def _config(path: StoragePath) -> dict[str, Any]:
    manifest = read_manifest(path)
    assert manifest is not None
    return config_of(path, manifest)


def _counters(path: StoragePath) -> dict[str, Any]:
    manifest = read_manifest(path)
    assert manifest is not None
    context = context_of(path, manifest)
    return {
        "step": manifest.step,
        "contents": _contents(manifest.contents),
        "ranks": context.get("world_size"),
        "layout": short_layout(context),
        **{name: context[name] for name in _COUNTERS if name in context},
    }


def _describe(entry: Entry | None) -> str:
    return "absent" if entry is None else f"{list(entry.shape)} {dtype_name(entry.dtype)}"


def _print_changes(title: str, changes: Sequence[Changed]) -> bool:
    """Print the differences; returns whether there are none."""
    if changes:
        rows = [(change.name, _short(change.first), _short(change.second)) for change in changes]
        print(f"\n{title}: {len(changes):,} differ")
        print("\n".join(text_table([("", "A", "B"), *rows], "<<<")))
    return not changes


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- verify ------------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    """Compare the size and checksum of every file with the checkpoint's manifest."""
    folder = storage_path(options.folder)
    if not folder.exists():
        raise CheckpointError(f"'{folder}' does not exist")
    refuse_internevo(folder)
    paths = [folder]
    if options.all:
        found = list_checkpoints(folder)
        paths = [one.path for one in found if one.kind in ("checkpoint", "snapshot")]
        for one in found:
            if one.kind == "incomplete":
                print(f"{one.path}: incomplete, not loadable: {one.problem}")
        if not paths:
            raise CheckpointError(f"there is no complete checkpoint in '{folder}'")
    elif not folder.name.isdigit() or find_checkpoints(folder):
        paths = [resolve(folder)]
    good = [_verify_one(path) for path in paths]
    return 0 if all(good) else 1


def _verify_one(path: StoragePath) -> bool:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        print(f"{path}: DAMAGED\n  {error}")
        return False
    if manifest is None:
        print(
            f"{path}: INCOMPLETE\n  its manifest {path.name}.step is missing: the save did not finish; use another step"
        )
        return False
    damage = find_damage(path, manifest)
    size = format_bytes(sum(file.size for file in manifest.files.values()))
    print(f"{path}: {'DAMAGED' if damage else 'good'}, {len(manifest.files):,} files, {size}")
    for line in damage:
        print(f"  {line}")
    return not damage


# -- formatting --------------------------------------------------------------------------------------------------------


def _contents(contents: Sequence[str]) -> str:
    return ", ".join(contents)


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{int(value):,} {unit}".rstrip()


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or "-"


def format_bytes(size: float) -> str:
    """Format a number of bytes, as in `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def format_age(seconds: float) -> str:
    """Format a duration, as in `42 s`, `7 min`, `3 h` or `12 days`."""
    seconds = max(0.0, seconds)
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // 86400:,.0f} days"
