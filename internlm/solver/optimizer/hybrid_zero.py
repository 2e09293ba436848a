"""An optimizer whose fp32 masters are sharded over (a part of) the data ranks: ZeRO stage 1, "hybrid" as in InternEvo.

With `parallel.zero1.size = k` the optimizer state is sharded over k neighbouring data ranks and replicated over the
rest: gradients are reduce-scattered over the k ranks and the shards all-reduced over the replicas; updated parameters
are all-gathered over the k ranks. The groups follow from each parameter's ShardSpec. The optimizer knows nothing of
models, and only the protocol of an update rule (`rules/update_rule.py`).

A step is four parts: reduction (`bucket.py`), norm and clipping (`gradient_clipping.py`), update (`shard_updaters.py`),
gathering of the parameters (`flat_bucket.py`). Source: ZeRO, Rajbhandari et al. 2020 (arXiv:1910.02054).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import subscribe
from internlm.core.parallel.shard_spec import Box, shard_spec_of
from internlm.solver.grad_scaler import ConstantGradScaler, GradScaler
from internlm.solver.optimizer.bucket_building import build_buckets, wait_before_forward
from internlm.solver.optimizer.gradient_clipping import clip_divisor, global_grad_norm
from internlm.solver.optimizer.parameter_groups import ParameterGroup, check_frozen
from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.solver.optimizer.rules.update_rule import HyperParameters, UpdateRule, UpdateStep
from internlm.solver.optimizer.shard_updaters import build_states
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm
from internlm.solver.optimizer.untrained_parameters import UntrainedParameters


@dataclass(frozen=True)
class UpdateResult:
    """The outcome of one optimizer step, as scalar fp32 tensors on the device.

    Attributes:
        grad_norm: global L2 norm before clipping, loss scale removed.
        skipped: 1.0 when the update was skipped because the norm is inf or NaN.
    """

    grad_norm: Tensor
    skipped: Tensor


class HybridZeroOptimizer:
    """Sharded flat fp32 masters and optimizer state, with gradient reduction, one global norm, clipping and skipping.

    A step is `begin_step(num_backwards)`, that many backward passes, then `step(hyper_parameters)`. Gradients are
    *summed* over data ranks: the loss must already be divided by the global number of valid tokens. No step waits for
    the device, except while there are untrained parameters (usually only the first step), and with an offloaded state.

    Args:
        model: after `parallelize`; or the chunks of a pipeline that this rank holds, in forward order. A parameter may
            be in several chunks. Parameters that require a gradient become views of flat buffers, except under FSDP.
        context: where this rank stands.
        scaler: the loss scaler; None: a constant scale of 1, for bf16 and fp32.
        rule: the update rule; `step` takes the learning rate.
        weight_decay: default for parameters whose group does not set it.
        weight_decay_norms_and_biases: decay one-dimensional parameters too, as InternEvo does.
        groups: parameter groups by name. Frozen ones must be frozen already: see `freeze_parameters`.
        clip_grad_norm: largest global norm after clipping; 0 disables clipping.
        overlap_sync_grad: start reducing a bucket while backward still runs.
        overlap_sync_param: gather parameters while the next forward runs; a reader outside a forward pass must call
            `finish_gathering` first.
        reduce_bucket_size: maximum number of elements in a bucket; a larger parameter gets a bucket of its own.
        reduce_dtype: dtype in which gradients that are accumulated in fp32 are communicated.
        form: dtypes and device of gradients and optimizer state.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        context: ParallelContext,
        scaler: GradScaler | None = None,
        *,
        rule: UpdateRule = AdamW(),  # noqa: B008 (frozen)
        weight_decay: float = 0.01,
        weight_decay_norms_and_biases: bool = False,
        groups: Sequence[ParameterGroup] = (),
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
        chunk_counts = Counter(p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad)
        if rule.works_on != "elements":
            raise ValueError(f"{type(rule).__name__} works on {rule.works_on}: only rules on elements are supported")
        if not chunk_counts and context.size("pipeline") == 1:
            raise ValueError("the model has no parameter that requires a gradient")
        check_frozen(chunk_counts, groups)
        self.buckets = build_buckets(
            list(chunk_counts),
            context,
            groups=groups,
            weight_decay=weight_decay,
            decay_all=weight_decay_norms_and_biases,
            bucket_size=reduce_bucket_size,
            reduce_dtype=reduce_dtype,
            form=form,
        )
        self._num_chunks = [[chunk_counts[parameter] for parameter in bucket.parameters] for bucket in self.buckets]
        self._defaults: HyperParameters = dict(rule.hyper_parameters)
        self.hyper_parameters = self._defaults
        self.states, self._num_updates, self._updater = build_states(self.buckets, form, rule, context.device)
        self._untrained = UntrainedParameters(self.states)
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

    def begin_step(self, num_backwards: int) -> None:
        """Start a step without gradients.

        Args:
            num_backwards: number of backward passes of each chunk. A parameter is complete after that many gradients
                from each chunk that contains it; the reduction of its bucket may then overlap the remaining passes.
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
            # Its reduce-scatter has overlapped the backward pass of a whole bucket.
            self.buckets[self._next_reduction - 1].continue_reduction()
        self._next_reduction += 1

    @torch.no_grad()
    def step(self, hyper_parameters: HyperParameters | float) -> UpdateResult:
        """Reduce the remaining gradients, clip, update the masters and start gathering the parameters.

        Args:
            hyper_parameters: "lr" and those of the rule, for this step; omitted ones have the rule's defaults. A number
                is the learning rate.

        Raises:
            ValueError: the rule has no hyper-parameter of a given name.
        """
        if self._is_updated:
            raise RuntimeError("the update of this step was already made: call begin_step and backward before the next")
        given = hyper_parameters if isinstance(hyper_parameters, Mapping) else {"lr": hyper_parameters}
        unknown = given.keys() - {"lr", *self._defaults}
        if unknown:
            known = sorted({"lr", *self._defaults})
            raise ValueError(f"unknown hyper-parameters {sorted(unknown)}: the update rule has {known}")
        self.hyper_parameters = {**self._defaults, **given}
        self.reduce_gradients()
        loss_scale = self.scaler.scale
        grad_norm = global_grad_norm(self.buckets, self.context) / loss_scale
        skipped = torch.where(torch.isfinite(grad_norm), 0.0, 1.0)
        self._divisor = clip_divisor(grad_norm, loss_scale, self.clip_grad_norm)
        self._untrained.update()
        step = UpdateStep(self.hyper_parameters, self._num_updates, self._divisor, skipped)
        self._updater.run(self._untrained.trained_parts(), step)
        self._is_updated = True
        self.scaler.update(skipped)
        self.gather_parameters()
        return UpdateResult(grad_norm, skipped)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Finish the reduction of gradients; collective. Afterwards `sharded_gradients` can be read."""
        if self._is_reduced:
            return
        while self._next_reduction < len(self.buckets):
            self._start_next_reduction()
        for bucket in self.buckets[-1:]:
            bucket.continue_reduction()
        for bucket in self.buckets:
            bucket.finish_reduction()
        self._divisor = self.scaler.scale
        self._is_reduced = True

    # -- parameters -----------------------------------------------------------------------------------------------

    def gather_parameters(self) -> None:
        """All-gather the updated parameters."""
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
        """Overwrite the fp32 masters with the parameters, after a checkpoint's weights were loaded.

        Args:
            keep_loaded: keep the masters that `sharded_state` yields, as they were loaded too.
        """
        for bucket in self.buckets:
            if not (keep_loaded and bucket.kind.has_master):
                bucket.reset_master()

    # -- state ----------------------------------------------------------------------------------------------------

    def sharded_state(self) -> Iterator[tuple[str, nn.Parameter, list[tuple[Box, Tensor]]]]:
        """Every tensor of the optimizer's state, as boxes of global tensors shaped like their parameters.

        Yields:
            (key, parameter, pieces) with keys `master/<name>` (fp32; absent for fp32 parameters, their own masters) and
            `<state>/<name>` for each of the rule's `state_names` (of `form.moment_dtype`), where the name is that of
            the ShardSpec; writing into the pieces writes into the state. Several parameters may be parts of one name.
        """
        for state in self.states:
            shards = dict(state.tensors)
            if state.bucket.kind.has_master:
                shards["master"] = state.bucket.master
            for kind, shard in shards.items():
                for parameter, pieces in state.bucket.pieces(shard):
                    yield f"{kind}/{shard_spec_of(parameter).name}", parameter, pieces

    def sharded_gradients(self) -> Iterator[tuple[str, nn.Parameter, list[tuple[Box, Tensor]]]]:
        """Gradients of the last step, summed over all ranks, without loss scale.

        In fp32, or in float64 for float64 parameters. Clipped after `step`, not clipped between `reduce_gradients` and
        `step`. Valid after `reduce_gradients` or `step` until the next `begin_step`.

        Yields:
            (name of the ShardSpec, parameter, pieces), where the pieces are this rank's shard and read-only.
        """
        for bucket in self.buckets:
            is_divided = self._is_updated and self._updater.divides(bucket.grad_shard.dtype)
            for parameter, pieces in bucket.pieces(bucket.grad_shard):
                if not is_divided:
                    pieces = [(box, piece.float() / self._divisor) for box, piece in pieces]
                yield shard_spec_of(parameter).name, parameter, pieces

    @property
    def num_updates(self) -> int:
        """Number of updates so far, without skipped ones; waits for the device."""
        return int(self._num_updates.item())

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates.fill_(value)
