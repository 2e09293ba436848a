"""What happens to a parameter outside of autograd's sight: a gradient arrives, and a value becomes readable.

A gradient may be computed later than autograd would (zero-bubble schedules), or arrive when a collective ends (isp);
and a weight may be read before its module is called (prefetching). The optimizer subscribes to the first and answers
the second; the parallel modes do the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Receiver = Callable[[Tensor], None]
"""Takes a gradient of the parameter, of its shape, in its dtype or in fp32; called once for each gradient."""


def subscribe(parameter: nn.Parameter, receiver: Receiver, wait_until_readable: Callable[[], None]) -> None:
    """Send every gradient of `parameter` to `receiver` instead of leaving it in `.grad`.

    Args:
        parameter: a leaf.
        receiver: called for gradients of autograd and for delivered ones alike.
        wait_until_readable: called before the parameter is read outside of its module's forward pass.
    """

    def take(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        # The hook is called all the same where a backward pass gave no gradient because it comes later.
        if gradient is not None:
            receiver(gradient)

    parameter.register_post_accumulate_grad_hook(take)
    parameter.gradient_receiver = receiver  # type: ignore[attr-defined]
    parameter.wait_until_readable = wait_until_readable  # type: ignore[attr-defined]


def deliver_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Hand over a gradient, in any dtype, that autograd did not compute; without a receiver it is added to `.grad`."""
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
