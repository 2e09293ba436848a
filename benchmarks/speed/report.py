"""Formats results of `throughput.py` as rows of numbers and as Markdown. Needs no torch."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

HEADER = (
    "contender", "tokens/s per GPU, median (min - max)", "TFLOP/s full, causal", "MFU full, causal",
    "of the matmul ceiling", "HFU", "peak memory, reserved", "data, host", "x of the limit", "ours, x its speed",
    "its memory, x ours",
)  # fmt: skip


def make_row(
    name: str, rounds: list[dict[str, Any]], facts: dict[str, Any], ceilings: list[dict[str, Any]], tokens: int
) -> dict[str, Any]:
    """The numbers of a contender.

    Args:
        name: of the contender.
        rounds: its answers, one per round.
        facts: FLOPs per token of the model and datasheet peak, which may be unknown, and the contender's host share and
            parameters.
        ceilings: results of `Ceiling.measure`, one per round; empty if not measured.
        tokens: per step.

    Returns:
        Rates per second, FLOP/s, fractions, bytes; None if unknown. MFU counts the FLOPs of the model, HFU also
        recomputed ones (causal); both are fractions of the datasheet's bf16 peak.
    """
    rates = [tokens / each["seconds"] for each in rounds]
    rate = statistics.median(rates)
    is_known = "flops_full" in facts
    full, causal = (facts[name] * rate if is_known else None for name in ("flops_full", "flops_causal"))
    peak = facts.get("peak_flops")
    ceiling = statistics.median(each["ceiling_flops"] for each in ceilings) if ceilings else None
    limits = [one["seconds"] / two["limit_seconds"] for one, two in zip(rounds, ceilings, strict=False)]
    # Peers recompute nothing, or do not report it.
    recomputed = facts.get("recomputed_flops", 0.0)
    return {
        "contender": name,
        "tokens_per_second": rate,
        "tokens_per_second_rounds": rates,
        "flops_full": full,
        "flops_causal": causal,
        "mfu_full": _share(full, peak),
        "mfu_causal": _share(causal, peak),
        "hfu_causal": None if causal is None or recomputed is None else _share(causal + recomputed * rate, peak),
        "ceiling_flops": ceiling,
        "of_ceiling_full": _share(full, ceiling),
        "of_ceiling_causal": _share(causal, ceiling),
        "times_of_limit": statistics.median(limits) if limits else None,
        "peak_bytes": max(each["peak_bytes"] for each in rounds),
        "reserved_bytes": rounds[-1]["reserved_bytes"],
        "data_share": statistics.median(each["data_share"] for each in rounds) if "host_share" in facts else None,
        "host_share": facts.get("host_share"),
        "parameters": facts.get("parameters"),
        "warmup_seconds": facts.get("warmup_seconds"),
    }


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Compare the first row with all rows, by medians of the ratios of simultaneous rounds."""
    ours = rows[0]
    for row in rows:
        if "error" in row or "error" in ours:
            continue
        pairs = zip(ours["tokens_per_second_rounds"], row["tokens_per_second_rounds"], strict=True)
        row["ours_times_its_speed"] = statistics.median(mine / its for mine, its in pairs)
        row["its_memory_times_ours"] = row["peak_bytes"] / ours["peak_bytes"]


def markdown(result: dict[str, Any]) -> str:
    """A heading, the command, and a table of the rows; the row of a failed contender shows its error."""
    lines = [f"### {result['title']}", "", f"    {result['command']}", ""]
    lines += [f"{result['device']}, torch {result['torch']}, commit {result['commit']}.", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in result["rows"]:
        cells = [row["contender"], _one_line(row["error"])] if "error" in row else _cells(row)
        lines.append("| " + " | ".join([*cells, *[""] * (len(HEADER) - len(cells))]) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    rates = row["tokens_per_second_rounds"]
    reserved = row["reserved_bytes"]
    return [
        row["contender"],
        f"{row['tokens_per_second']:.0f} ({min(rates):.0f} - {max(rates):.0f})",
        "-" if row["flops_full"] is None else f"{row['flops_full'] / 1e12:.4g}, {row['flops_causal'] / 1e12:.4g}",
        f"{_percent(row['mfu_full'])}, {_percent(row['mfu_causal'])}",
        f"{_percent(row['of_ceiling_full'])}, {_percent(row['of_ceiling_causal'])}",
        _percent(row["hfu_causal"]),
        f"{row['peak_bytes'] / 1e9:.2f} GB" + (f", {reserved / 1e9:.2f} GB" if reserved else ""),
        f"{_percent(row['data_share'])}, {_percent(row['host_share'])}",
        _number(row["times_of_limit"]),
        _number(row.get("ours_times_its_speed")),
        _number(row.get("its_memory_times_ours")),
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200].replace("|", "\\|")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    """Join results into one JSON file and one page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="files of throughput.py --json")
    parser.add_argument("--note", action="append", default=[], help="line above the tables; repeatable")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, required=True)
    options = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.results if path.exists()]
    options.json.write_text(json.dumps({"notes": options.note, "results": results}, indent=1), encoding="utf-8")
    page = "".join(f"- {note}\n" for note in options.note) + "\n" + "\n".join(map(markdown, results))
    options.markdown.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
