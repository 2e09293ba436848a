"""AdamW on fp32 masters that are sharded over (a part of) the data ranks: ZeRO stage 1, "hybrid" as in InternEvo.

With `parallel.zero1.size = k` the optimizer state is sharded over k neighbouring data ranks and replicated over the
rest: gradients are reduce-scattered over the k ranks and the shards summed over the replicas; updated parameters are
gathered over the k ranks. Which groups those are comes from each parameter's ShardSpec. The optimizer knows nothing
of models.

Sources: ZeRO, Rajbhandari et al. 2020 (arXiv:1910.02054); AdamW, Loshchilov and Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import subscribe
from internlm.core.parallel.shard_spec import Box, shard_spec_of
from internlm.solver.grad_scaler import ConstantGradScaler, GradScaler
from internlm.solver.optimizer.bucketing import build_buckets, wait_before_forward
from internlm.solver.optimizer.shard_state import AdamStep
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm
from internlm.solver.optimizer.unused import UnusedParameters
from internlm.solver.optimizer.updates import build_states

# torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6; the same constant gives the same updates.
CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, as scalar fp32 tensors on the device.

    Attributes:
        grad_norm: global L2 norm before clipping, loss scale removed.
        skipped: 1.0 when the update was skipped because the norm is inf or NaN.
    """

    grad_norm: Tensor
    skipped: Tensor


class HybridZeroOptimizer:
    """AdamW on sharded flat fp32 masters, with gradient reduction, one global norm, clipping and skipping.

    A step is: `begin_step(num_backwards)`, so many backward passes, then `step(lr, beta2)`. Gradients are *summed* over
    data ranks: the loss must already be divided by the global number of valid tokens. Nothing in a step waits for the
    device, but the first one, which finds out what is in use (see `unused`), and all with an offloaded state.

    Args:
        model: after `parallelize`; or the chunks of a pipeline that this rank holds, in forward order. A parameter may
            be in several chunks. Parameters become views of flat buffers, but those that FSDP keeps.
        context: where this rank stands.
        scaler: the loss scaler; None (bf16 and fp32 need none) is a constant 1.
        betas, eps, weight_decay: of AdamW; the learning rate comes with each step.
        weight_decay_norms_and_biases: decay one-dimensional parameters too (InternEvo's way).
        clip_grad_norm: largest global norm; 0 leaves gradients as they are.
        overlap_sync_grad: start reducing a bucket while backward still runs.
        overlap_sync_param: gather parameters while the next forward runs; whoever reads them outside of a forward pass
            calls `finish_gathering` first.
        reduce_bucket_size: elements a bucket holds at most (a larger single parameter has a bucket of its own).
        reduce_dtype: dtype in which gradients travel that are accumulated over micro batches in fp32.
        form: how gradients and the optimizer's state are kept.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        context: ParallelContext,
        scaler: GradScaler | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        weight_decay_norms_and_biases: bool = False,
        clip_grad_norm: float = 0.0,
        overlap_sync_grad: bool = True,
        overlap_sync_param: bool = False,
        reduce_bucket_size: int = 512 * 1024 * 1024,
        reduce_dtype: torch.dtype = torch.float32,
        form: StateForm = FP32_STATE,
    ) -> None:
        self.context = context
        self.scaler = scaler or ConstantGradScaler(context.device)
        self.clip_grad_norm = clip_grad_norm
        self.form = form
        self.overlap_sync_grad = overlap_sync_grad
        self.overlap_sync_param = overlap_sync_param
        self.chunks = [model] if isinstance(model, nn.Module) else list(model)
        held = Counter(p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad)
        if not held:
            raise ValueError("the model has no parameter that requires a gradient")
        self.buckets = build_buckets(
            list(held),
            context,
            decay_all=weight_decay_norms_and_biases,
            bucket_size=reduce_bucket_size,
            reduce_dtype=reduce_dtype,
            form=form,
        )
        self._num_chunks = [[held[parameter] for parameter in bucket.parameters] for bucket in self.buckets]
        self._betas, self._eps = betas, eps
        self.states, self._updater = build_states(self.buckets, form, weight_decay)
        self._unused = UnusedParameters(self.states)
        self._divisor = torch.ones((), device=context.device)
        self._is_reduced = self._is_updated = False
        self._next_reduction = 0
        self._install_hooks()

    # -- construction ---------------------------------------------------------------------------------------------

    def _install_hooks(self) -> None:
        for number, bucket in enumerate(self.buckets):
            for index, parameter in enumerate(bucket.parameters):
                subscribe(parameter, partial(self._on_gradient, number, index), bucket.finish_gathering)
        for chunk in self.chunks:
            wait_before_forward(chunk, self.buckets)

    # -- a step ---------------------------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> Tensor:
        """Scalar fp32 by which the loss must be multiplied before backward."""
        return self.scaler.scale

    @property
    def beta2(self) -> float:
        """Second AdamW coefficient of the last step."""
        return self._betas[1]

    def begin_step(self, num_backwards: int) -> None:
        """Start a step with no gradients.

        Args:
            num_backwards: backward passes that each chunk will see. A parameter is complete after as many gradients for
                each chunk that holds it; then the reduction of its bucket may start under the passes that remain.
        """
        for bucket, num_chunks in zip(self.buckets, self._num_chunks, strict=True):
            bucket.begin_step([num_backwards * count for count in num_chunks])
        self._next_reduction = 0
        self._is_reduced = self._is_updated = False

    def _on_gradient(self, number: int, index: int, gradient: Tensor) -> None:
        self.buckets[number].accumulate(index, gradient)
        if not self.overlap_sync_grad:
            return
        # In bucket order only: every rank must issue the same collectives in the same order.
        while self._next_reduction < len(self.buckets) and self.buckets[self._next_reduction].is_complete:
            self._start_next_reduction()

    def _start_next_reduction(self) -> None:
        self.buckets[self._next_reduction].start_reduction()
        if self._next_reduction > 0:
            # Its first part had the time of a whole bucket's backward pass.
            self.buckets[self._next_reduction - 1].continue_reduction()
        self._next_reduction += 1

    @torch.no_grad()
    def step(self, lr: float, beta2: float | None = None) -> StepResult:
        """Reduce what is left, clip, update the masters and start gathering the parameters.

        Args:
            lr: learning rate of this step.
            beta2: second AdamW coefficient of this step; None keeps the one before.
        """
        self.reduce_gradients()
        grad_norm = self._global_grad_norm() / self.scaler.scale
        skipped = torch.where(torch.isfinite(grad_norm), 0.0, 1.0)
        self._divisor = self.scaler.scale
        if self.clip_grad_norm > 0:
            self._divisor = self._divisor * ((grad_norm + CLIP_EPSILON) / self.clip_grad_norm).clamp(min=1.0)
        if beta2 is not None:
            self._betas = self._betas[0], beta2
        self._unused.update()
        self._updater.run(
            self._unused.used_parts(), AdamStep(lr, *self._betas, self._eps, divisor=self._divisor, skipped=skipped)
        )
        self._is_updated = True
        self.scaler.update(skipped)
        self.gather_parameters()
        return StepResult(grad_norm, skipped)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Finish summing the gradients over ranks; collective. Afterwards `sharded_gradients` can be read."""
        if self._is_reduced:
            return
        while self._next_reduction < len(self.buckets):
            self._start_next_reduction()
        self.buckets[-1].continue_reduction()
        for bucket in self.buckets:
            bucket.finish_reduction()
        self._divisor = self.scaler.scale
        self._is_reduced = True

    def _global_grad_norm(self) -> Tensor:
        squares = [bucket.squared_grad_norm() / bucket.kind.num_holders(self.context) for bucket in self.buckets]
        return all_reduce(torch.stack(squares).sum(), self.context.world_group).sqrt().float()

    # -- parameters -----------------------------------------------------------------------------------------------

    def gather_parameters(self) -> None:
        """Collect on all ranks what each has updated."""
        # Forward needs the first parameters first.
        for bucket in reversed(self.buckets):
            bucket.start_gathering()
        if not self.overlap_sync_param:
            self.finish_gathering()

    def finish_gathering(self) -> None:
        """Wait until all parameters may be read outside a forward pass (saving, evaluation by hand)."""
        for bucket in self.buckets:
            bucket.finish_gathering()

    def reset_masters(self, *, keep_loaded: bool = False) -> None:
        """Take the fp32 masters anew from the parameters, after a checkpoint's weights were loaded into them.

        Args:
            keep_loaded: leave masters alone that `sharded_state` has, as they were loaded too.
        """
        for bucket in self.buckets:
            if not (keep_loaded and bucket.kind.has_master):
                bucket.reset_master()

    # -- state ----------------------------------------------------------------------------------------------------

    def sharded_state(self) -> Iterator[tuple[str, nn.Parameter, list[tuple[Box, Tensor]]]]:
        """Every tensor of the optimizer's state, as boxes of global tensors shaped like their parameters.

        Yields:
            (key, parameter, pieces) with keys `master/<name>` (fp32; absent for fp32 parameters, their own masters),
            `exp_avg/<name>` and `exp_avg_sq/<name>` (of `form.moment_dtype`), where the name is that of the ShardSpec;
            writing into the pieces writes into the state. Several parameters may hold parts of one name.
        """
        for state in self.states:
            shards = state.moments
            if state.bucket.kind.has_master:
                shards["master"] = state.bucket.master
            for kind, shard in shards.items():
                for parameter, pieces in state.bucket.pieces(shard):
                    yield f"{kind}/{shard_spec_of(parameter).name}", parameter, pieces

    def sharded_gradients(self) -> Iterator[tuple[str, nn.Parameter, list[tuple[Box, Tensor]]]]:
        """The gradient of the last step, summed over all ranks, without loss scale; in fp32, of float64 parameters in
        float64. Clipped, as it was applied, after `step`; not clipped between `reduce_gradients` and `step`.

        Valid after `reduce_gradients` or `step` until the next `begin_step`.

        Yields:
            (name of the ShardSpec, parameter, pieces), where the pieces are this rank's share; nothing may be written
            into them.
        """
        for bucket in self.buckets:
            is_divided = self._is_updated and self._updater.divides(bucket.grad_shard.dtype)
            for parameter, pieces in bucket.pieces(bucket.grad_shard):
                if not is_divided:
                    pieces = [(box, piece.float() / self._divisor) for box, piece in pieces]
                yield shard_spec_of(parameter).name, parameter, pieces

    @property
    def num_updates(self) -> int:
        """Updates taken so far (skipped ones do not count); waits for the device."""
        return int(self.states[0].num_updates.item())

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for state in self.states:
            state.num_updates.fill_(value)
