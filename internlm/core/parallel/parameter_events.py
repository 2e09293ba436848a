"""Events of a parameter that autograd does not see: a gradient is delivered, or the value is read early.

A gradient may be computed after the backward pass (zero-bubble schedules), or arrive when a collective completes (isp).
A weight may be read before its module is called (prefetching). The optimizer subscribes to both events; the parallel
modes raise them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Receiver = Callable[[Tensor], None]
"""Receives one gradient of the parameter, in the parameter's shape, in its dtype or in fp32."""


def subscribe(parameter: nn.Parameter, receiver: Receiver, wait_until_readable: Callable[[], None]) -> None:
    """Send every gradient of `parameter` to `receiver` instead of leaving it in `.grad`.

    Args:
        parameter: a leaf.
        receiver: called for gradients from autograd and for delivered ones.
        wait_until_readable: called before the parameter is read outside of its module's forward pass.
    """
    parameter.register_post_accumulate_grad_hook(_take)
    parameter.gradient_receiver = receiver  # type: ignore[attr-defined]
    parameter.wait_until_readable = wait_until_readable  # type: ignore[attr-defined]


def _take(leaf: Tensor) -> None:
    """Hook after autograd. It refers to nothing: what a hook refers to, such as the optimizer, is never freed."""
    gradient, leaf.grad = leaf.grad, None
    # Autograd calls the hook even if the gradient is None because it is delivered later.
    if gradient is not None:
        leaf.gradient_receiver(gradient)  # type: ignore[attr-defined]


def deliver_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Deliver a gradient, in any dtype, that autograd did not compute; without a receiver it is added to `.grad`."""
    receiver: Receiver | None = getattr(parameter, "gradient_receiver", None)
    if receiver is not None:
        receiver(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def wait_until_readable(parameter: nn.Parameter) -> None:
    """Return once `parameter` holds its updated value."""
    wait: Callable[[], None] | None = getattr(parameter, "wait_until_readable", None)
    if wait is not None:
        wait()
