"""The utility F(S; V) of a subset S of a ground set V."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salience.errors import InputError, nearest

Fuse = Literal["hidden", "scalar", "none"]

_CELLS = 300 * 300  # rows times elements of a set that are worked on at once


def feed_forward(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """`layers` hidden layers with ReLU, then a linear one; without hidden layers it is linear."""
    widths = [inputs, *[hidden] * layers]
    inner = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*inner, nn.Linear(widths[-1], outputs))


def encode(
    encoder: nn.Module, V: Shaped[Tensor, "batch n ..."], valid: Bool[Tensor, "batch n"], dim: int
) -> Float[Tensor, "batch n dim"]:
    """Features of every element; padding never enters the encoder and gets zeros."""
    found = encoder(V[valid])
    if found.ndim != 2 or found.shape[1] != dim:
        raise InputError(f"encoder: gave shape {tuple(found.shape)} for elements; (elements, dim = {dim}) is needed")
    features = found.new_zeros(*valid.shape, dim)
    features[valid] = found
    return features


class SetUtility(nn.Module):
    """How good a subset is, given the set that it was taken from.

        e_i = phi(x_i),   h_S = sum_{i in S} e_i,   h_V = sum_{i in V} e_i
        hidden   F(S; V) = w' relu(A(h_S) + B(h_V))
        scalar   F(S; V) = sigma(theta_1(h_S) + theta_2(h_V))
        none     F(S)    = theta_1(h_S)

    Sums are sufficient statistics that keep the sizes, which means lose. With ``sigma`` the identity, theta_2(h_V)
    cancels in every difference F(S + i; V) - F(S - i; V): V would be ignored, and "scalar" be "none".

    Parameters
    ----------
    encoder : torch.nn.Module
        phi, elements (elements, …) to features (elements, dim).
    dim, hidden : int
    layers : int
        Hidden layers of theta_1 and theta_2; A and B have one less, and the one that joins them.
    fuse : {"hidden", "scalar", "none"}
        "none" is the utility of EquiVSet.
    sigma : torch.nn.Module, optional
        Of "scalar", a sigmoid by default; then F lies in (0, 1) and a marginal in (0.27, 0.73). `torch.nn.Softplus()`
        is without an upper bound.

    Raises
    ------
    InputError
        A parameter out of range; at calls, shapes that do not fit.

    Notes
    -----
    Source: arXiv 2402.03139, section 3.4, equation 4. Reconstructed: "scalar" has as many parameters as the authors
    report (one more head than EquiVSet), but which sigma their code uses was not seen. "hidden" is ours: it cannot
    cancel, whatever is learnt.
    """

    def __init__(
        self, encoder: nn.Module, *, dim: int = 256, hidden: int = 500, layers: int = 2, fuse: Fuse = "hidden",
        sigma: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if fuse not in get_args(Fuse):
            raise InputError(f"fuse: got {fuse!r}; {nearest(str(fuse), get_args(Fuse))}")
        if min(dim, hidden) < 1 or layers < (fuse == "hidden"):
            raise InputError(
                f"dim, hidden, layers: got {dim}, {hidden}, {layers}; sizes of at least 1 are needed, and layers of "
                "at least 1 for fuse='hidden' (0 elsewhere)"
            )
        if sigma is not None and fuse != "scalar":
            raise InputError(f"sigma: is of fuse='scalar' only, not of fuse={fuse!r}")
        self.encoder, self.dim, self.fuse = encoder, dim, fuse
        if fuse == "hidden":
            self.of_subset = feed_forward(dim, hidden, hidden, layers - 1)
            self.of_set = feed_forward(dim, hidden, hidden, layers - 1)
            self.out = nn.Sequential(nn.ReLU(), nn.Linear(hidden, 1))
        else:
            self.of_subset = feed_forward(dim, hidden, 1, layers)
            self.of_set = feed_forward(dim, hidden, 1, layers) if fuse == "scalar" else None  # type: ignore[assignment]
            self.out = nn.Identity() if fuse == "none" else (nn.Sigmoid() if sigma is None else sigma)  # type: ignore[assignment]

    def forward(
        self,
        V: Shaped[Tensor, "batch n ..."],
        subsets: Shaped[Tensor, "batch *samples n"],
        valid: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, " batch *samples"]:
        """F of every subset.

        Parameters
        ----------
        V : (batch, n, …) Tensor
            Ground sets.
        subsets : (batch, …, n) Tensor
            Bits, or numbers in [0, 1] that gradients flow through.
        valid : (batch, n) bool Tensor, optional
            Which rows of V are elements, where sets of several sizes were padded to one.
        """
        if valid is None:
            valid = torch.ones(V.shape[:2], dtype=torch.bool, device=V.device)
        if subsets.ndim < 2 or (len(subsets), subsets.shape[-1]) != tuple(V.shape[:2]):
            raise InputError(
                f"subsets: shape {tuple(subsets.shape)} for sets of shape {tuple(V.shape[:2])}; (batch, …, n) is needed"
            )
        return self.value(encode(self.encoder, V, valid, self.dim), subsets)

    def value(
        self, features: Float[Tensor, "batch n dim"], subsets: Shaped[Tensor, "batch *samples n"]
    ) -> Float[Tensor, " batch *samples"]:
        """F of every subset, from features that are known; padding has features of zero, as `encode` gives them."""
        with torch.autocast(features.device.type, enabled=False):  # see `gains`
            features = _at_least_single(features)
            rows = subsets.to(features.dtype).reshape(len(subsets), -1, subsets.shape[-1])
            return self._joined(rows @ features, self._background(features)).reshape(subsets.shape[:-1])

    def gains(
        self, features: Float[Tensor, "batch n dim"], subsets: Bool[Tensor, "batch samples n n"]
    ) -> Float[Tensor, "batch samples n"]:
        """F(S + i; V) - F(S - i; V), for i and S of each row: row i of `subsets` is a subset for element i.

        Heads run in single precision even under autocast: differences of large F lose their digits otherwise. Sets of
        more than 300 elements are worked on in blocks of rows, and blocks are computed again for the gradient.
        """
        n = features.shape[1]
        others = subsets & ~torch.eye(n, dtype=torch.bool, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            features = _at_least_single(features)
            rows = max(1, _CELLS // n)
            if rows >= n:
                return self._gains_of_rows(features, others, features)
            return torch.cat(
                [
                    checkpoint(self._gains_of_rows, features, some, own, use_reentrant=False)
                    for some, own in zip(others.split(rows, dim=2), features.split(rows, dim=1))
                ],
                dim=2,
            )

    def _gains_of_rows(
        self,
        features: Float[Tensor, "batch n dim"],
        others: Bool[Tensor, "batch samples rows n"],
        own: Float[Tensor, "batch rows dim"],
    ) -> Float[Tensor, "batch samples rows"]:
        background = self._background(features)
        below = others.to(features.dtype) @ features[:, None]  # h of S - i for all samples and rows in one product
        above = below + own[:, None]
        value_above, value_below = (self._joined(h.flatten(1, 2), background) for h in (above, below))
        return (value_above - value_below).reshape(others.shape[:-1])

    def _background(self, features: Tensor) -> Tensor | None:
        return None if self.of_set is None else self.of_set(features.sum(1, keepdim=True))

    def _joined(self, pooled: Float[Tensor, "batch rows dim"], background: Tensor | None) -> Tensor:
        inner = self.of_subset(pooled)
        return self.out(inner if background is None else inner + background).squeeze(-1)


def _at_least_single(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
