"""The values that quantised weights may take: evenly spaced, or the quantiles of a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from scipy.stats import norm
from torch import Tensor

from salience.errors import InputError

_SMALLEST = 1e-5  # of the largest weight of a row: a row of zeros has a scale all the same
_SHRINKS = [1 - step / 100 for step in range(80)]  # 1, .99, …, .21
_POWER = 2.4  # of the rounding error that the search for a clip minimises
_CELLS = 1 << 18  # entries that the search works on at once, so that they stay in the cache


class Scales(NamedTuple):
    """Step and zero point of each row: a weight is ``scale * (code - zero)``; of a normal grid ``scale * level``.

    Attributes
    ----------
    scale, zero : Tensor (out, groups)
    """

    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]


@dataclass(frozen=True)
class Grid:
    r"""A grid of :math:`2^b` values for each row of weights.

        w_q = s (c - z),    c = clamp(round(w / s) + z, 0, 2^b - 1)

    Symmetric: :math:`z = 2^{b-1}` and :math:`s = \max |w| / (2^{b-1} - 1)`. Asymmetric: s and z span the smallest to
    the largest weight. With `clip`, s is shrunk by whichever of 1, .99, …, .21 makes the sum of
    :math:`|w_q - w|^{2.4}` least.

    Parameters
    ----------
    bits : int
        2..8.
    sym : bool
        Zero point in the middle.
    clip : bool
        Search for the best clip.
    kind : {"uniform", "nf"}
        Evenly spaced, or NormalFloat: quantiles of a normal distribution (Dettmers et al., "QLoRA", 2023, section 3).

    Raises
    ------
    InputError
        Bits outside 2..8, or another kind.
    """

    bits: int = 3
    sym: bool = True
    clip: bool = True
    kind: Literal["uniform", "nf"] = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise InputError(f"bits: got {self.bits!r}; a whole number in 2..8 is wanted")
        if self.kind not in ("uniform", "nf"):
            raise InputError(f"grid: got {self.kind!r}; allowed are 'uniform' and 'nf'")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def levels(self, like: Tensor) -> Float[Tensor, " codes"]:
        """The values of a normal grid for a scale of 1, from -1 to 1; 0 is one of them."""
        half, edge = 2 ** (self.bits - 1), 0.9677083  # of QLoRA: an infinite quantile is of no use
        above = [norm.ppf(edge + (0.5 - edge) * step / half) for step in range(half)]
        below = [-norm.ppf(edge + (0.5 - edge) * step / (half - 1)) for step in range(half - 1)]
        levels = sorted([*above, 0.0, *below])
        return torch.tensor(levels, dtype=like.dtype, device=like.device) / levels[-1]

    def fit(self, W: Float[Tensor, "out in_"]) -> Scales:
        """Scale and zero point of each row, as (out, 1)."""
        rows = max(1, _CELLS // max(W.shape[1], 1))
        parts = [self._fit(part) for part in W.split(rows)]
        return Scales(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, in the type of `w`; scale and zero point must broadcast with it."""
        if self.kind == "nf":
            levels = self.levels(w)
            return torch.bucketize(w / scale, (levels[1:] + levels[:-1]) / 2).to(w.dtype)
        return torch.round(w / scale).add_(zero).clamp_(0, self.top)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The weights that codes stand for, in the type of `scale`."""
        if self.kind == "nf":
            return self.levels(scale)[codes.long()] * scale
        return (codes.to(scale.dtype) - zero).mul_(scale)

    def _fit(self, W: Tensor) -> Scales:
        low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
        if self.sym or self.kind == "nf":
            high = torch.maximum(-low, high).clamp(min=_SMALLEST)
            low = -high
        else:
            empty = (low == 0) & (high == 0)
            low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        best = self._scales(low, high)
        if not self.clip:
            return best
        least = torch.full_like(low, torch.inf)
        for shrink in _SHRINKS:
            now = self._scales(shrink * low, shrink * high)
            apart = self.decode(self.encode(W, *now), *now).sub_(W).abs_()
            error = apart.log2_().mul_(_POWER).exp2_().sum(1, keepdim=True)  # a third of the time of a power
            better = error < least
            least = torch.where(better, error, least)
            best = Scales(torch.where(better, now.scale, best.scale), torch.where(better, now.zero, best.zero))
        return best

    def _scales(self, low: Tensor, high: Tensor) -> Scales:
        if self.kind == "nf":
            return Scales(high, torch.zeros_like(high))
        if self.sym:
            scale = high / (2 ** (self.bits - 1) - 1)
            return Scales(scale, torch.full_like(scale, 2 ** (self.bits - 1)))
        scale = (high - low).clamp(min=_SMALLEST) / self.top
        return Scales(scale, torch.round(-low / scale))


def round_to_nearest(
    W: Float[Tensor, "out in_"], grid: Grid, group_size: int = -1
) -> tuple[UInt8[Tensor, "out in_"], Float[Tensor, "out in_"], Scales]:
    """Quantise each weight by itself: what every other method has to beat.

    Parameters
    ----------
    W : Tensor (out, in)
        float32 or float64.
    grid : Grid
    group_size : int
        Consecutive inputs that share a scale; -1 for all of a row.

    Returns
    -------
    codes, weight, scales
        As of `gptq_solve`.

    Raises
    ------
    InputError
        `group_size` does not divide the inputs.
    """
    size = check_group(W.shape[1], group_size)
    parts = [grid.fit(part) for part in W.split(size, 1)]
    scales = Scales(torch.cat([part.scale for part in parts], 1), torch.cat([part.zero for part in parts], 1))
    scale, zero = spread(scales, W.shape[1])
    codes = grid.encode(W, scale, zero)
    return codes.to(torch.uint8), grid.decode(codes, scale, zero), scales


def spread(scales: Scales, columns: int) -> Scales:
    """Scale and zero point of each single weight, as (out, in) or, of one group, (out, 1)."""
    groups = scales.scale.shape[1]
    if groups == 1:
        return scales
    return Scales(*(part.repeat_interleave(columns // groups, 1) for part in scales))


def check_group(columns: int, group_size: int) -> int:
    """The size of a group in columns; -1 stands for all."""
    if group_size == -1:
        return columns
    if group_size < 1 or columns % group_size:
        raise InputError(f"group_size: {group_size} does not divide the {columns} inputs of the layer; -1 takes a row")
    return group_size
