"""`internlm verify`: trains a small copy of a config's model in its layout and in one process, and compares them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from internlm.commands.config_options import add_config_options
from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize.build import check_buildable
from internlm.initialize.hf_class_checks import TOLERANCE, check_class, class_differences, small_copy
from internlm.utils.errors import ConfigError
from internlm.utils.logging import configure_logging
from internlm.utils.paths import local_path
from internlm.verify.case import Case, Combination
from internlm.verify.choices import BatchChoices, LayoutChoices, from_text, to_text
from internlm.verify.hf_class_table import HEADER, LAYOUTS, ClassRow, class_name, config_text
from internlm.verify.matrix import expert_matrix, full_matrix, pairwise_matrix
from internlm.verify.ranks import LocalRanks, RankFailedError
from internlm.verify.record import InconsistentRanksError, Record
from internlm.verify.report import Verdict, judge, matrix_table, steps_table
from internlm.verify.run import DEFAULT_STEPS
from internlm.verify.shrink import left_out, shrink

LARGEST_WORLD = 32
"""Maximum number of ranks. Each is a process on this machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_options(parser, required=False)
    parser.add_argument("--world-size", type=int, default=8, metavar="N", help="ranks to start here (default: 8)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, metavar="K", help=f"steps to train (default: {DEFAULT_STEPS})"
    )
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="NAME=N,...",
        help="use this layout instead of the config's, such as tensor=2,mode=isp,weight=2,pipeline=2,schedule=ZBV; "
        "repeatable",
    )
    parser.add_argument(
        "--keep-dtype",
        action="store_true",
        help="compute in model.dtype (default: float32, which exposes small defects; with float8, experts or "
        "classes of transformers: float64); "
        "experts are then those of one process, as rounding may change the choice of a router",
    )
    parser.add_argument(
        "--hf",
        type=local_path,
        action="append",
        default=[],
        metavar="DIR",
        help="compare the class of a Hugging Face folder: its own logits, packed documents, and layouts on two ranks; "
        "repeatable, a row of a table each",
    )
    parser.add_argument("--matrix", action="store_true", help="compare a built-in matrix of layouts, not a config")
    parser.add_argument("--full", action="store_true", help="with --matrix: all layouts, not a pairwise covering")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="with --matrix: file for the table")


def run(options: argparse.Namespace) -> int:
    """Print the comparison; returns the exit code: 0 equal, 1 different or failed."""
    configure_logging()
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: must be at least 1")
    if not 1 <= options.world_size <= LARGEST_WORLD:
        raise ConfigError(f"--world-size {options.world_size}: must be 1 to {LARGEST_WORLD}, all ranks run here")
    if options.matrix:
        if options.config or options.layout or options.overrides:
            raise ConfigError("--matrix brings its own configs and layouts: remove --config, --layout and --set")
        rows = full_matrix() if options.full else pairwise_matrix() + expert_matrix()
        return _compare_matrix(rows, options.steps, options.output)
    if options.hf:
        if options.config or options.layout or options.overrides or options.full or options.output:
            raise ConfigError("--hf brings its own configs and layouts: remove all options but --hf and --steps")
        return _compare_classes(options)
    if options.config is None:
        raise ConfigError("give --config FILE.py, --hf DIR, or --matrix")
    if options.full or options.output:
        raise ConfigError("--full and --output need --matrix")
    return _compare_config(options)


def _compare_config(options: argparse.Namespace) -> int:
    layouts: list[LayoutChoices | None] = [from_text(LayoutChoices, text) for text in options.layout] or [None]
    # Check all cases before any of them runs.
    cases = [pair for layout in layouts for pair in _cases(options, layout)]
    is_equal = True
    with (
        LocalRanks(options.world_size, options.config) as ranks,
        LocalRanks(1, options.config) as single,
    ):
        for case, left_out_lines in cases:
            layout = to_text(LayoutChoices.of(case.config)) or "data parallel"
            numerics = "; float8, in float64" if case.config.float8.enable_float8_linear else ""
            if case.needs_replay:
                numerics += f"; {case.config.model.dtype.removeprefix('torch.')}, with the routing of one process"
            print(f"{case.world_size} rank(s), {layout}{numerics}", *left_out_lines, sep="\n", flush=True)
            verdict = _verdict(case, options.steps, ranks, single, {})
            if verdict.steps:
                print(steps_table(verdict))
            print(verdict.explain() or "equal to one process: losses, gradient norm, every gradient and every weight")
            print(flush=True)
            is_equal = is_equal and verdict.is_equal
    return 0 if is_equal else 1


def _compare_classes(options: argparse.Namespace) -> int:
    rows: list[ClassRow] = []
    with TemporaryDirectory() as temporary, LocalRanks(2) as ranks, LocalRanks(1) as single:
        options.config, options.world_size = Path(temporary) / "config.py", 2
        for folder in options.hf:
            options.config.write_text(config_text(folder.resolve(), packed=True), encoding="utf-8")
            config = load_config(options.config, world_size=2).config
            row = ClassRow(class_name(config), class_differences(small_copy(config.model)))
            packs = row.differences.packed <= TOLERANCE
            options.config.write_text(config_text(folder.resolve(), packed=packs), encoding="utf-8")
            references: dict[str, Record] = {}
            for column, layout in LAYOUTS.items():
                row.add(column, partial(_verdict_of_layout, options, layout, ranks, single, references))
            rows.append(row)
            print("\n".join([str(row), *row.reasons]), flush=True)
    print(f"\n{HEADER}", *rows, sep="\n")
    return 0 if all(row.is_right for row in rows) else 1


def _verdict_of_layout(
    options: argparse.Namespace, layout: str, ranks: LocalRanks, single: LocalRanks, references: dict[str, Record]
) -> Verdict:
    ((case, _),) = _cases(options, from_text(LayoutChoices, layout))
    check_class(case.config, ParallelContext.create())
    return _verdict(case, options.steps, ranks, single, references)


def _cases(options: argparse.Namespace, layout: LayoutChoices | None) -> list[tuple[Case, list[str]]]:
    """The small copy of the user's run, in its own layout or the given one; a float8 run both without and with it.

    With each comes what is not compared.
    """
    values = {f"--layout {to_text(layout)}": layout.keys()} if layout is not None else {}
    loaded = load_config(options.config, options.overrides, world_size=options.world_size, options=values)
    # A router chooses: with another order of additions, rounding in fp32 may change an expert. Code of transformers may
    # choose too, or amplify rounding.
    model = loaded.config.model
    chooses = model.num_experts > 1 or model.hf_class is not None
    exposing = "torch.float64" if chooses else "torch.float32"
    configs = [shrink(loaded.config, None if options.keep_dtype else exposing)]
    if loaded.config.float8.enable_float8_linear:
        configs.append(shrink(loaded.config, float8=True))
    for config in configs:
        check_buildable(config, options.world_size)
    return [
        (
            Case(config, options.world_size, BatchChoices(packed=config.data.use_packed_dataset)),
            left_out(loaded.config, config),
        )
        for config in configs
    ]


def _compare_matrix(combinations: Iterable[Combination], steps: int, output: Path | None) -> int:
    rows: list[tuple[Combination, Verdict]] = []
    ranks: dict[int, LocalRanks] = {}
    references: dict[str, Record] = {}
    try:
        for number, combination in enumerate(combinations, start=1):
            for world_size in (1, combination.ranks):
                ranks.setdefault(world_size, LocalRanks(world_size))
            verdict = _verdict(combination.case(), steps, ranks[combination.ranks], ranks[1], references)
            rows.append((combination, verdict))
            if output is not None:
                print(f"{number}: {'equal' if verdict.is_equal else 'DIFFERENT'}  {combination}", flush=True)
    finally:
        for local_ranks in ranks.values():
            local_ranks.close()
    if output is None:
        print(matrix_table(rows), end="")
    else:
        output.write_text(matrix_table(rows), encoding="utf-8")
    return 0 if all(verdict.is_equal for _, verdict in rows) else 1


def _verdict(case: Case, steps: int, ranks: LocalRanks, single: LocalRanks, references: dict[str, Record]) -> Verdict:
    """Run a case and, unless `references` already has it, its reference."""
    reference = case.reference()
    try:
        if case.needs_replay:
            with TemporaryDirectory() as folder:
                expected = single.run(reference.with_routing(Path(folder), write=True), steps)
                return judge(case, ranks.run(case.with_routing(Path(folder)), steps), expected)
        if reference.fingerprint not in references:
            references[reference.fingerprint] = single.run(reference, steps)
        return judge(case, ranks.run(case, steps), references[reference.fingerprint])
    except (RankFailedError, InconsistentRanksError) as error:
        return Verdict(failure=str(error))
