"""Draws layouts, models and batches at random, and compares each with one process.

    python tests/fuzz_layouts.py --seconds 300 --seed 7
    python tests/fuzz_layouts.py --case "ranks=4 layout:tensor=2,mode=msp model:tied=true"

Each failure is printed with the line that repeats it, and again as simple as it still fails. Exits 1 when there is one.
What it finds becomes a test in `tests/layouts/test_regressions.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.layouts import verdict_of
from helpers.ranks import RankFailedError, RankPool

from internlm.verify.case import Combination
from internlm.verify.choices import BatchChoices, LayoutChoices, ModelChoices, StepChoices
from internlm.verify.record import InconsistentRanksError

STEPS = 2
PARTS: dict[str, tuple[type, dict[str, tuple[Any, ...]]]] = {
    "layout": (
        LayoutChoices,
        {
            "tensor": (1, 2, 2, 4),
            "mode": ("mtp", "msp", "fsp", "isp", "isp"),
            "context": (1, 1, 1, 2, 2, 4),
            "context_placement": ("head_first", "head_first", "context_first", "interleaved"),
            "context_cut": ("auto", "contiguous", "zigzag", "document_zigzag"),
            "context_exchange": ("auto", "ring", "direct", "all_gather"),
            "context_window": (1, 1, 2),
            "weight": (1, 1, 2, 4),
            "overlap": (False, True),
            "pipeline": (1, 1, 2, 2, 4),
            "schedule": ("1F1B", "ZBH1", "ZBV", "DUALPIPEV"),
            "chunks": (1, 1, 2, 3),
            "zero": (-1, -1, 1, 2, 4),
            "fsdp": (False, False, False, True),
        },
    ),
    "model": (
        ModelChoices,
        {
            "family": ("INTERNLM2", "INTERNLM", "LLAMA2", "QWEN2", "QWEN3", "BAICHUAN2", "GEMMA", "MISTRAL"),
            "heads": (4, 8, 12),
            "kv_heads": (1, 2, 4),
            "layers": (0, 0, 3, 5, 7),
            "vocab": (64, 61, 66),
            "tied": (None, True, False),
            "norm_head": (None, True),
            "qk_norm": (None, True),
            "bias": (None, True, False),
            "fused": (None, True, False),
            "window": (False, False, True),
            "split_hidden": (True, False),
            "checkpoint": (0.0, 0.5, 1.0),
            "dtype": ("float32", "float32", "bfloat16"),
            "fp32_norm": (False, True),
            "fp32_residual": (False, True),
            "multi_token": (0, 0, 0, 1, 2, 3),
        },
    ),
    "documents": (
        BatchChoices,
        {
            "packed": (True, False),
            "ragged": (True, False),
            "masked": ("none", "uneven", "micro_batches", "ends", "all"),
        },
    ),
    "stepping": (
        StepChoices,
        {
            "micro_batches": (0, 0, 0, 4, 8, 12),
            "clip": (0.5, 0.0, 0.01),
            "bucket": (3000, 500, 100_000),
            "overlap_grad": (False, True),
            "overlap_param": (False, True),
            "reduce_bf16": (False, False, True),
            "grad_bf16": (False, False, True),
            "moments_bf16": (False, False, True),
            "offload": (False, False, True),
            "groups": ("none", "none", "frozen_ends", "frozen_layer", "factors"),
        },
    ),
}

PARTS_OF_EXPERTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "layout": {
        "expert": (1, 2, 2, 4, 8),
        "expert_zero": (-1, -1, 1, 2),
        "expert_tensor": (False, False, True),
        "expert_weight": (1, 1, 2, 4, 8),
        "expert_overlap": (False, False, True),
    },
    "model": {
        "family": (
            "QWEN3MOE",
            "QWEN2MOE",
            "MIXTRALMOE",
            "INTERNLM_MoE",
            "GLM4_MOE",
            "GPT_OSS",
            "OLMOE",
            "DEEPSEEK_V2",
            "DEEPSEEK_V3",
        ),
        "experts": (2, 4, 4, 6, 8, 16, 64),
        "top_k": (1, 2, 2, 3, 4),
        "shared_experts": (0, 1, 2),
        "q_latent": (True, True, False),
        "dense_layers": (0, 0, 1, 2),
        "router": ("normalized", "plain", "grouped", "biased", "sigmoid", "sigmoid_grouped"),
        "selection": ("dropless", "dropless", "largest", "first", "gshard", "gshard_random"),
        "save_policy": ("nothing", "attention", "matmuls"),
        "dtype": ("float64",),
        "fp32_norm": (False,),
        "fp32_residual": (False,),
    },
    "stepping": {
        "reduce_bf16": (False,),
        "grad_bf16": (False,),
        "moments_bf16": (False,),
        "offload": (False,),
        "groups": ("none", "none", "frozen_ends", "frozen_layer", "factors", "frozen_experts", "frozen_routers"),
    },
}
"""What is drawn instead for a mixture of experts, in float64."""

PARTS_OF_PICTURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "family": ("LLAVA",),
        "tower": ("clip", "clip_with_class", "siglip"),
        "projector": ("mlp2x_gelu", "mlp2x_gelu", "linear", "identity"),
        "multi_token": (0,),
        "save_policy": ("nothing", "attention", "matmuls"),
    },
    "stepping": {"groups": ("none", "projector", "tower", "tower", "frozen_ends", "frozen_layer", "factors")},
}
"""What is drawn instead for a model that reads pictures."""


def combinations(random: Random, share_of_experts: float, share_of_pictures: float) -> Iterator[Combination]:
    """Valid combinations without end; a share of them are mixtures of experts, and a share read pictures."""
    while True:
        ranks = random.choice((1, 2, 4, 4, 8, 8))
        drawn = random.random()
        instead = PARTS_OF_EXPERTS if drawn < share_of_experts else {}
        if share_of_experts <= drawn < share_of_experts + share_of_pictures:
            instead = PARTS_OF_PICTURES
        parts: dict[str, Any] = {
            name: cls(**{field: random.choice(values) for field, values in (options | instead.get(name, {})).items()})
            for name, (cls, options) in PARTS.items()
        }
        combination = Combination(ranks, **parts)
        if not combination.problems():
            yield combination


class Trials:
    """Tries combinations on ranks that are kept."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}
        self.num_refused = 0

    def ranks(self, world_size: int) -> RankPool:
        """The ranks for a world size."""
        return self._pools.setdefault(world_size, RankPool(world_size))

    def failure(self, combination: Combination) -> str:
        """Why a combination does not train as one process does; empty when it does, or is refused by name."""
        try:
            return verdict_of(str(combination), self.ranks, STEPS).explain()
        except RankFailedError as error:
            cause = str(error).strip().splitlines()[-1]
            if cause.startswith("internlm.utils.errors.ConfigError"):
                self.num_refused += 1
                return ""
            return str(error)
        except InconsistentRanksError as error:
            return str(error)

    def simplify(self, combination: Combination) -> Combination:
        """A combination that fails, too, with as many defaults as can be."""
        for simpler in self._simpler(combination):
            if simpler != combination and not simpler.problems() and self.failure(simpler):
                return self.simplify(simpler)
        return combination

    @staticmethod
    def _simpler(combination: Combination) -> Iterator[Combination]:
        for ranks in (1, 2, 4):
            if ranks < combination.ranks:
                yield replace(combination, ranks=ranks)
        for name in PARTS:
            part = getattr(combination, name)
            yield replace(combination, **{name: type(part)()})
            for field in fields(part):
                if getattr(part, field.name) != field.default:
                    yield replace(combination, **{name: replace(part, **{field.name: field.default})})

    def close(self) -> None:
        """End all ranks."""
        for pool in self._pools.values():
            pool.close()


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="compare random layouts with one process")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random layouts (default: 0)")
    parser.add_argument("--experts", type=float, default=0.4, metavar="P", help="share of mixtures (default: 0.4)")
    parser.add_argument("--pictures", type=float, default=0.15, metavar="P", help="share with pictures (default: 0.15)")
    parser.add_argument("--case", metavar="LINE", help="try only this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trials, failures, number = Trials(), 0, 0
    started = time.monotonic()
    drawn = (
        iter([Combination.parse(options.case)])
        if options.case
        else combinations(Random(options.seed), options.experts, options.pictures)
    )
    try:
        for combination in drawn:
            number += 1
            failure = trials.failure(combination)
            if failure:
                failures += 1
                print(f'FAILED python tests/fuzz_layouts.py --case "{combination}"\n{failure}', flush=True)
                if not options.case:
                    simplest = trials.simplify(combination)
                    again = trials.failure(simplest) or "It does not fail again."
                    print(f'SIMPLEST python tests/fuzz_layouts.py --case "{simplest}"\n{again}', flush=True)
            if time.monotonic() - started > options.seconds:
                break
    finally:
        trials.close()
    print(f"{number} combinations, {trials.num_refused} of them refused by name, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
