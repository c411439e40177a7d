"""From the losses of a batch to one weight per sample.

Normalise the losses of the batch to [-delta, delta], give every sample a priority f, and take a softmax of f / r:

    h_i = delta (2 l_i - l_max - l_min) / (l_max - l_min),   w_i = p_i e^{f(h_i) / r} / sum_k p_k e^{f(h_k) / r}

which is the solution of  max_w <w, f> - r KL(w || p).  The paper's p is uniform; ours may be other samples' scores.

Source: arXiv 2502.06733, sections 3 and 4, and the functions `h_func`, `f_func_*` and `g_func` of the authors' trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from salience.data.loss_reweighting.gathering import gather_rows
from salience.errors import InputError, nearest

Strategy = Literal["linupper", "quadratic", "extremes", "linear", "uniform"]

# The priority f of a normalised loss h in [-delta, delta].
STRATEGIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linupper": lambda h, delta: (h + delta).clamp(max=delta),
    "quadratic": lambda h, delta: 1 - (h / delta) ** 2,
    "extremes": lambda h, delta: h.abs(),
    "linear": lambda h, delta: 0.5 * h + 0.5 * delta,
    "uniform": lambda h, delta: torch.zeros_like(h),
}

_EPS = 1e-6  # below this range of losses nothing tells the samples apart


class WeightDiagnostics(NamedTuple):
    """What weights do to a batch of M samples.

    `max_weight` is M times the largest weight: the paper's convergence bound asks for 2 at most. `effective_samples`
    is ``1 / sum w^2``, M for equal weights. `correlation` is that of weights and losses, NaN where either is constant.
    """

    max_weight: float
    effective_samples: float
    correlation: float


def loss_weights(
    losses: Float[Tensor, " batch"],
    strategy: Strategy = "linupper",
    r: float = 0.4,
    delta: float = 1.0,
    *,
    valid: Bool[Tensor, " batch"] | None = None,
    prior: Float[Tensor, " batch"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, " batch"]:
    """Weights of the samples of a batch, from their losses.

        linupper   f = min(h + delta, delta)      rises over the lower half of the losses, then stays
        quadratic  f = 1 - h^2 / delta^2          favours the middle: the choice where labels are noisy
        extremes   f = |h|                        favours both ends
        linear     f = (h + delta) / 2
        uniform    f = 0

    Parameters
    ----------
    losses : (batch,) Tensor
        One per sample. Weights are constants: no gradient flows through them.
    strategy : {"linupper", "quadratic", "extremes", "linear", "uniform"}
        In the authors' code for larger models, linupper is called "upper"; in their first one, quadratic is "mid".
    r : float
        Temperature. The largest weight is at most ``e^{delta / r}`` times the smallest (quadratic: ``e^{1 / r}``):
        12.2 times at 0.4, 2.7 times at 1.
    delta : float
        Losses are normalised to [-delta, delta].
    valid : (batch,) bool Tensor, optional
        Samples that count; the others get weight 0 and no say in the range of the losses.
    prior : (batch,) Tensor, optional
        p, at least 0, on any scale; uniform by default.
    group : ProcessGroup, optional
        The processes whose samples make one batch; all of them by default, where `torch.distributed` is initialised.

    Returns
    -------
    (batch,) float32 Tensor
        Sums to 1 over the samples of all processes together (to 0 where no sample is valid).

    Raises
    ------
    InputError
        An unknown strategy, r or delta that is not positive and finite, a loss that is NaN or infinite (told to all
        processes alike), a prior below 0, no samples, or shapes that differ.
    """
    check_parameters(strategy, r, delta)
    everyone = gather_rows(sample_table(losses, valid, prior), group)
    return weights_of_table(everyone.rows, strategy, r, delta)[everyone.own]


def weight_diagnostics(
    weights: Float[Tensor, " batch"], losses: Float[Tensor, " batch"] | None = None
) -> WeightDiagnostics:
    """How uneven weights are, and whether they keep to the bound ``w_i <= 2 / M`` of the paper's analysis.

    Parameters
    ----------
    weights : (batch,) Tensor
        Of all samples of the batch, with sum 1.
    losses : (batch,) Tensor, optional
        For the correlation.

    Raises
    ------
    InputError
        No weights, a negative sum, or another number of losses.
    """
    w = weights.detach().double()
    if w.ndim != 1 or not len(w) or not float(w.sum()) > 0:
        raise InputError(f"weights: shape {tuple(w.shape)}; a vector with a positive sum is needed")
    correlation = math.nan
    if losses is not None:
        if losses.shape != weights.shape:
            raise InputError(f"losses: shape {tuple(losses.shape)}, but weights have {tuple(weights.shape)}")
        a, b = w - w.mean(), losses.detach().double() - losses.detach().double().mean()
        scale = float(a.norm() * b.norm())
        # rounding leaves equal weights unequal in the last digits, which is no correlation
        if float(a.abs().max()) > _EPS * float(w.max()) and scale > 0:
            correlation = float(a @ b) / scale
    return WeightDiagnostics(float(w.max()) * len(w), float(1 / (w**2).sum()), correlation)


def check_parameters(strategy: str, r: float, delta: float) -> None:
    """Refuse parameters that make no weights."""
    if strategy not in STRATEGIES:
        raise InputError(f"strategy: got {strategy!r}; {nearest(str(strategy), STRATEGIES)}")
    for name, value in (("r", r), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{name}: got {value!r}; it must be a positive finite number")


def sample_table(
    losses: Tensor, valid: Tensor | None, prior: Tensor | None, tokens: Tensor | None = None
) -> Float[Tensor, "batch 4"]:
    """Columns loss, valid, prior and tokens of this process's samples, float32, as they are gathered."""
    if losses.ndim != 1 or not losses.is_floating_point():
        raise InputError(
            f"losses: got {losses.dtype} of shape {tuple(losses.shape)}; one number per sample is needed, as with "
            "reduction='none'"
        )
    columns = []
    for name, column in (("losses", losses), ("valid", valid), ("prior", prior), ("tokens", tokens)):
        column = torch.ones_like(losses) if column is None else column
        if column.shape != losses.shape:
            raise InputError(f"{name}: shape {tuple(column.shape)} for {len(losses)} samples")
        columns.append(column.detach().to(losses.device, torch.float32))
    return torch.stack(columns, dim=1)


def weights_of_table(
    rows: Float[Tensor, "everyone 4"], strategy: str, r: float, delta: float
) -> Float[Tensor, " everyone"]:
    """Weights of all samples of all processes; every process computes the same ones."""
    losses, counts, prior = rows[:, 0], rows[:, 1] > 0, rows[:, 2]
    if not len(losses):
        raise InputError("losses: there are none; a batch needs at least one sample")
    # Checked after gathering, so that all processes stop, not one while the others wait for it.
    bad = counts & ~losses.isfinite()
    if bool(bad.any()):
        raise InputError(
            f"losses: {int(bad.sum())} of {int(counts.sum())} are NaN or infinite, the first at position "
            f"{int(bad.nonzero()[0])} of the global batch: lower the learning rate or look at that sample"
        )
    if bool((counts & ~(prior.isfinite() & (prior >= 0))).any()):
        raise InputError("prior: every entry must be a finite number of at least 0")
    counts = counts & (prior > 0)
    if not bool(counts.any()):
        return torch.zeros_like(losses)
    low, high = losses[counts].min(), losses[counts].max()
    span = high - low
    if float(span) < _EPS:  # the formula would amplify rounding noise
        priority = torch.zeros_like(losses)
    else:
        # in this order the ends of the range are -delta and delta exactly
        priority = STRATEGIES[strategy](delta * (2 * (losses - low) / span - 1), delta)
    return torch.softmax((priority / r + prior.log()).masked_fill(~counts, -math.inf), dim=0)
