"""Values and vector-Jacobian products by one forward and one backward pass.

With J = ∂f/∂x the product J(x)ᵀ c costs one backward pass, whatever the dimensions are.  The lean
adjoint needs no more of a velocity field, and the gradient of a reward no more of the reward.
The functions work eagerly, inside transforms of `torch.func`, and inside compiled functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flows.field import Cond, VelocityField


def transforming() -> bool:
    """Tell whether a transform of `torch.func` is at work, or a function is being compiled."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def recording(x: Tensor) -> bool:
    """Tell whether a value computed from ``x`` can be differentiated with respect to ``x``."""
    wanted = x.requires_grad or torch._C._are_functorch_transforms_active()
    return wanted and torch.is_grad_enabled()


def pullback(
    function: Callable[[Tensor], Tensor], x: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Return the value of a function, and a map from cotangents c to Jᵀ c, to be called once.

    J is the Jacobian of ``function`` at ``x``.  Value and products are detached, and parameters
    receive no gradient, unless ``create_graph``.

    The map is None if the value is seen not to depend on anything differentiable.  It gives zeros
    if the value does not depend on ``x``; inside transforms of `torch.func` and in compiled
    functions these two cannot be told apart, and it always does.

    Outside of transforms a graph is recorded, not `torch.func.vjp` taken: modules may checkpoint
    themselves, be sharded, or call autograd on their own.

    Arguments:
        create_graph: value and products can be differentiated in turn, if ``x`` requires a gradient
            or a transform is at work; else it changes nothing.

    Raises:
        RuntimeError: in `torch.inference_mode`, which records nothing.
    """
    create_graph = create_graph and recording(x)
    if transforming():
        with torch.set_grad_enabled(create_graph):
            value, vjp = torch.func.vjp(function, x)[:2]

        def product_of(cotangent: Tensor) -> Tensor:
            with torch.set_grad_enabled(create_graph):
                return vjp(cotangent)[0]

        return value, product_of
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a field or reward cannot be differentiated in torch.inference_mode, which records "
            "nothing: use torch.no_grad instead"
        )
    with torch.enable_grad():
        x = x if create_graph else x.detach().requires_grad_(True)
        value = function(x)

    def pull(cotangent: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            value, x, cotangent, allow_unused=True, create_graph=create_graph
        )
        return torch.zeros_like(x) if product is None else product

    known = value if create_graph else value.detach()
    return known, pull if value.requires_grad else None


def velocity_and_vjp(
    field: VelocityField, x: Tensor, t: Tensor, cotangent: Tensor, cond: Cond | None = None
) -> tuple[Tensor, Tensor]:
    """Return the velocity v(x, t) and the vector-Jacobian product (dv/dx)^T cotangent, detached.

    One forward and one backward pass; parameters receive no gradient.  Shapes: all (B, *).
    """
    v, pull = pullback(lambda x: field(x, t, cond), x)
    return v, torch.zeros_like(x) if pull is None else pull(cotangent.to(v.dtype))
