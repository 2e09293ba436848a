"""Cost of the forms of optimizer state: time of a step, and loss with moments in bf16.

    python benchmarks/optimizer_forms.py [--megabytes 80] [--rounds 12] [--steps 400]

Times `HybridZeroOptimizer.step` on bf16 weights in every `StateForm`, interleaved, and prints the median in
milliseconds and relative to fp32 state. Then trains a two-layer model on 20 batches of random tokens with moments in
fp32, in bf16 with stochastic rounding (as implemented), and in bf16 with rounding to nearest (for comparison). Prints
the mean loss of the last tenth of the steps, and the sum of the square roots of the second moments relative to fp32.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.config.schema import ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import Box, ShardSpec, attach_shard_spec
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm
from internlm.solver.optimizer.stochastic_rounding import StochasticRounding

DTYPES = (torch.float32, torch.bfloat16)
FORMS = [StateForm(*form) for form in itertools.product(DTYPES, DTYPES, (False, True))]


def step_times(megabytes: int, rounds: int) -> None:
    """Print the time of a step in every form."""
    runs = []
    for form in FORMS:
        weights = [nn.Parameter(torch.ones(1024, 1024, dtype=torch.bfloat16)) for _ in range(megabytes // 2)]
        for number, weight in enumerate(weights):
            attach_shard_spec(weight, ShardSpec.whole(f"w{number}", weight.shape))
        optimizer = HybridZeroOptimizer(
            nn.ParameterList(weights), ParallelContext.create(), clip_grad_norm=1.0, form=form
        )
        runs.append((form, weights, optimizer, list[float]()))
    gradient = torch.ones(1024, 1024, dtype=torch.bfloat16)
    for _ in range(rounds + 1):
        for _, weights, optimizer, seconds in runs:
            optimizer.begin_step(1)
            for weight in reversed(weights):
                deliver_gradient(weight, gradient)
            started = time.perf_counter()
            optimizer.step(1e-3)
            seconds.append(time.perf_counter() - started)
    base = statistics.median(runs[0][3][1:])
    for form, _, _, seconds in runs:
        median = statistics.median(seconds[1:])
        print(f"{form}: {1000 * median:.1f} ms, {median / base:.2f}x")


def nearest(self: StochasticRounding, bits: Tensor, box: Box, key: str) -> None:
    """Replaces the random numbers of `StochasticRounding.add` with rounding to nearest, ties to even."""
    bits.add_(((bits >> 16) & 1) + 0x7FFF)


def train(form: StateForm, beta2: float, num_steps: int) -> tuple[float, float]:
    """Mean loss of the last tenth of the steps, and the sum of the square roots of the second moments."""
    config = ModelConfig(
        num_layers=2, hidden_size=32, intermediate_size=56, num_attention_heads=4, vocab_size=61, dtype="torch.float32"
    )
    context = ParallelContext.create()
    with torch.device("meta"):
        model = build_model("INTERNLM2", config)
    model = parallelize(model, context, seed=7)
    optimizer = HybridZeroOptimizer(model, context, rule=AdamW((0.9, beta2)), clip_grad_norm=1.0, form=form)
    losses = []
    for step in range(num_steps):
        tokens = torch.randint(0, 61, (4, 21), generator=torch.Generator().manual_seed(step % 20))
        optimizer.begin_step(1)
        logits = model.logits(model(tokens[:, :-1], torch.arange(20).expand(4, -1)))  # type: ignore[operator]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        # The learning rate decays in the second half of the steps.
        optimizer.step(1e-3 * min(1.0, 2 * (1 - step / num_steps)))
        losses.append(float(loss.detach()))
    roots = sum(float(state.tensors["exp_avg_sq"].float().sqrt().sum()) for state in optimizer.states)
    return statistics.mean(losses[-num_steps // 10 :]), roots


def rounding(num_steps: int) -> None:
    """Print the effect of rounding on the loss and the second moments."""
    for beta2 in (0.95, 0.99, 0.999):
        loss, roots = train(FP32_STATE, beta2, num_steps)
        print(f"beta2 {beta2}: fp32 {loss:.4f}", end="")
        form = StateForm(moments=torch.bfloat16)
        stochastic = train(form, beta2, num_steps)
        with patch.object(StochasticRounding, "add", nearest):
            to_nearest = train(form, beta2, num_steps)
        for name, found in (("stochastic", stochastic), ("nearest", to_nearest)):
            print(f"; {name} {found[0]:.4f}, moment {found[1] / roots:.3f}", end="")
        print()


def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=80, help="size of the bf16 weights")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    step_times(options.megabytes, options.rounds)
    rounding(options.steps)


if __name__ == "__main__":
    main()
