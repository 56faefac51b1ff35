"""Hessian rows for Hutchinson's estimator, in the shape of gradient rows.

Row i is z∘Hz with random signs z and the Hessian H of the mean loss of mini-batch i. Its
expectation over z is diag(H) of the active weights. Rows are sent to their owners like
gradient rows.
"""

from __future__ import annotations

__all__ = ["make_hessian_derivative", "second_derivatives", "twice_differentiable"]

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.host_copy import upload
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import differentiate


def make_hessian_derivative(
    parameters: Mapping[str, nn.Parameter], positions: Mapping[str, Tensor], seed: int
) -> Callable[[Tensor, int], list[Tensor]]:
    """Return a function that computes z∘Hz of a loss.

    Args:
        parameters: the parameters to differentiate with respect to, by name.
        positions: int64 positions of the active weights in each flattened parameter; z is
            zero elsewhere, so that pruned weights add no noise.
        seed: probe i is drawn under a seed derived from this one and i.

    Returns:
        A function of a loss with graph and its number; one tensor for each parameter.
    """

    def products(loss: Tensor, index: int) -> list[Tensor]:
        signs = _signs(parameters, positions, derive_seed(seed, "probe", index))
        weights = list(parameters.values())
        which = f"the loss of gradient {index}"
        with second_derivatives(which, "criterion 'hessian_diagonal' needs"):
            gradients = differentiate(loss, weights, create_graph=True)
            # A gradient without graph is constant and adds nothing to the Hessian.
            sums = [
                (gradient * sign).sum()
                for gradient, sign in zip(gradients, signs, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not sums:
                return [torch.zeros_like(sign) for sign in signs]
            second = differentiate(sum(sums[1:], sums[0]), weights)
        return [
            torch.zeros_like(sign) if row is None else sign * row
            for row, sign in zip(second, signs, strict=True)
        ]

    return products


@contextlib.contextmanager
def second_derivatives(which: str, needs: str) -> Iterator[None]:
    """Explain why a loss cannot be differentiated twice.

    Args:
        which: names the loss.
        needs: says what needs the derivatives, and what to use instead.

    Yields:
        Nothing.

    Raises:
        PruningError: in place of the error of autograd.
        OutOfMemoryError: as it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, PruningError):
        raise
    except RuntimeError as error:
        raise PruningError(
            f"{which} cannot be differentiated twice, which {needs}: {error}"
        ) from error


class _ComposedHardsigmoid(TorchFunctionMode):
    """Compute hardsigmoid by operations that can be differentiated twice."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3.0) / 6.0
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention and hardsigmoid by operations that can be differentiated twice.

    Yields:
        Nothing; inside, no fused kernel of attention or of encoder layers is used.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _ComposedHardsigmoid():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _signs(
    parameters: Mapping[str, nn.Parameter], positions: Mapping[str, Tensor], seed: int
) -> list[Tensor]:
    """Draw z for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    signs = []
    for name, parameter in parameters.items():
        where = positions[name]
        drawn = torch.randint(
            0, 2, (len(where),), generator=generator, dtype=torch.int8
        )
        sign = torch.zeros_like(parameter, requires_grad=False)
        sign.view(-1)[where] = upload(2 * drawn - 1, sign.device).to(sign.dtype)
        signs.append(sign)
    return signs
