"""Why a merge works: which singular directions are aligned, how far apart the weights are, a second-order forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from salience.errors import DataError, InputError
from salience.model.at import training_mode


class AlignmentResult(NamedTuple):
    """How well the singular directions of two networks agree.

    Attributes
    ----------
    score : float
        R; 1 for equal networks, about 0 for independent ones.
    layers : dict of str to float
        R of each layer by itself.
    kept : dict of str to (int, int)
        Number of singular values over the cut, in a and in b.
    spectra : dict of str to (Tensor, Tensor)
        Singular values divided by the largest, in a and in b.
    """

    score: float
    layers: dict[str, float]
    kept: dict[str, tuple[int, int]]
    spectra: dict[str, tuple[Float[Tensor, " rank"], Float[Tensor, " rank"]]]


def singular_alignment(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    *,
    gamma: float = 0.3,
    layers: Sequence[str] | None = None,
) -> AlignmentResult:
    """How well the large singular directions of two networks agree.

        R = sum_l sum_{i in K_l^a, j in K_l^b} (u_i^a . u_j^b) (v_i^a . v_j^b) / sum_l min(|K_l^a|, |K_l^b|)

    with ``K_l`` the singular values of at least gamma times the largest of layer l. The product over left and right
    vectors does not depend on the sign that a decomposition gives them. Convolution kernels are taken as matrices
    (out, in k k).

    Parameters
    ----------
    state_a, state_b : mapping of str to Tensor
    gamma : float in [0, 1]
        0 keeps all directions.
    layers : sequence of str, optional
        Names of the weights; by default all tensors of two axes and more.

    Returns
    -------
    AlignmentResult

    Raises
    ------
    InputError
        gamma outside [0, 1], or no weight.
    DataError
        A weight is missing, has another shape, or is not finite.

    Notes
    -----
    The definition follows the paper; that unequal counts are divided by the smaller one is our choice.
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma: got {gamma!r}; it must lie between 0 and 1")
    names = [name for name, value in state_a.items() if value.ndim > 1 and value.is_floating_point()]
    names = names if layers is None else list(layers)
    if not names:
        raise InputError("layers: there is no weight of two axes or more")
    total, possible = 0.0, 0
    by_layer, kept, spectra = {}, {}, {}
    for name in names:
        for state in (state_a, state_b):
            if name not in state or state[name].shape != state_a[name].shape:
                raise DataError(f"{name!r} is not in both networks with one shape")
            if not torch.isfinite(state[name]).all():
                raise DataError(f"{name!r} holds NaN or infinite entries")
        (ua, sa, va), (ub, sb, vb) = (_decomposed(state[name]) for state in (state_a, state_b))
        a, b = (s >= gamma * s[0] for s in (sa, sb))
        agree = float(((ua[:, a].T @ ub[:, b]) * (va[a] @ vb[b].T)).sum())
        most = int(min(a.sum(), b.sum()))
        total, possible = total + agree, possible + most
        by_layer[name], kept[name] = agree / most, (int(a.sum()), int(b.sum()))
        spectra[name] = (sa / sa[0].clamp_min(1e-300), sb / sb[0].clamp_min(1e-300))
    return AlignmentResult(total / possible, by_layer, kept, spectra)


def distance_reduction(
    state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], permuted_b: Mapping[str, Tensor]
) -> float:
    """By how many percent a permutation shortens the distance: ``100 (1 - ||a - pi(b)|| / ||a - b||)``.

    Small, even where the barrier vanishes: report both side by side.

    Parameters
    ----------
    state_a, state_b, permuted_b : mapping of str to Tensor

    Raises
    ------
    DataError
        The networks are equal, so there is no distance to shorten.
    """
    before, after = (_distance(state_a, state) for state in (state_b, permuted_b))
    if before == 0:
        raise DataError("state_b: equals state_a; there is no distance to shorten")
    return 100 * (1 - after / before)


def taylor_barrier(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    loss: Callable[[nn.Module | Callable], Tensor],
) -> float:
    """The barrier at the midpoint that second-order expansions around both ends would forecast.

        d = (theta_b - theta_a) / 2
        B_2 = 1/2 [ g_a.d + 1/2 d.H_a d  -  g_b.d + 1/2 d.H_b d ]

    Where it stays large although the measured barrier falls, nearness does not explain the fall.

    Supported: any `torch.nn.Module` that can be differentiated twice.

    Parameters
    ----------
    model : torch.nn.Module
        The architecture, run in evaluation mode and left as it is.
    state_a, state_b : mapping of str to Tensor
    loss : callable
        ``loss(network) -> scalar``, which calls ``network(inputs)``.
    """
    names = [name for name, _ in model.named_parameters()]
    d = {name: (state_b[name] - state_a[name]) / 2 for name in names}
    terms = []
    with training_mode(model, False):
        for state, sign in ((state_a, 1.0), (state_b, -1.0)):
            rest = {name: value for name, value in state.items() if name not in d}

            def value(weights: dict[str, Tensor], rest: Mapping[str, Tensor] = rest) -> Tensor:
                return loss(lambda *inputs: functional_call(model, {**rest, **weights}, inputs))

            at = {name: state[name].detach() for name in names}
            gradient, curved = jvp(grad(value), (at,), (d,))[:2]
            slope = sum(float((gradient[name] * d[name]).sum(dtype=torch.float64)) for name in names)
            curve = sum(float((curved[name] * d[name]).sum(dtype=torch.float64)) for name in names)
            terms.append(sign * slope + curve / 2)
    return sum(terms) / 2


def _decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)


def _distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    names = [name for name, value in one.items() if value.is_floating_point()]
    return math.sqrt(sum(float((one[n].double() - two[n].double()).square().sum()) for n in names))
