"""What all selectors of subsets share: ranks, marginals, selections, scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from salience.errors import DataError, InputError, NothingToDo
from salience.model.at import training_mode
from salience.scores import Scores

_PAIRS = 4_000_000  # pairs of elements that are worked on at once


class SubsetExamples(NamedTuple):
    """Ground sets with their best subsets.

    `V` (sets, n, …) are the elements, `S` (sets, n) bool says which belong to the best subset, `valid` (sets, n) bool
    which rows are elements and not padding (None: all of them).
    """

    V: Shaped[Tensor, "sets n ..."]
    S: Bool[Tensor, "sets n"]
    valid: Bool[Tensor, "sets n"] | None = None

    def checked(self, name: str = "examples") -> SubsetExamples:
        """The same with `valid` filled in and S as bool; refuses what does not fit."""
        V, S = self.V, torch.as_tensor(self.S)
        V, valid = checked_sets(f"{name}.V", V, self.valid)
        if S.shape != V.shape[:2]:
            raise InputError(f"{name}.S: shape {tuple(S.shape)} for sets of shape {tuple(V.shape[:2])}")
        if not bool(((S == 0) | (S == 1)).all()):
            raise InputError(f"{name}.S: must hold bits, 1 for the elements of the best subset")
        S = S.bool().to(V.device)
        outside = (S & ~valid).any(1).nonzero()
        if len(outside):
            raise DataError(f"{name}.S: of set {int(outside[0])} holds an element that valid calls padding")
        return SubsetExamples(V, S, valid)


def pad_sets(sets: Sequence[Shaped[Tensor, "_ ..."]]) -> tuple[Shaped[Tensor, "sets n ..."], Bool[Tensor, "sets n"]]:
    """Sets of several sizes as one tensor, filled up with zeros, and the mask `valid` of what are elements.

    It pads masks of best subsets as well.

    Raises
    ------
    InputError
        There are no sets, or their elements differ in shape.
    """
    parts = [torch.as_tensor(one) for one in sets]
    if not parts or len({part.shape[1:] for part in parts}) != 1 or any(part.ndim == 0 for part in parts):
        raise InputError(f"sets: shapes {[tuple(part.shape) for part in parts][:5]}; (n_i, …) with equal … are needed")
    sizes = torch.tensor([len(part) for part in parts])
    valid = torch.arange(int(sizes.max())) < sizes[:, None]
    return nn.utils.rnn.pad_sequence(parts, batch_first=True), valid


class Objective(NamedTuple):
    """A loss ``(V, S, valid, generator) -> scalar``, and the parameters that it trains."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
    parameters: Iterable[nn.Parameter]


class SubsetSelector(nn.Module):
    """Base of the selectors: a subclass gives `objectives` and the values by which elements are ranked."""

    has_marginals = True  # whether `values` are log-odds

    def objectives(self) -> list[Objective]:
        """The losses of training, in the order in which their steps are taken on each batch."""
        raise NotImplementedError

    def _values(self, V: Tensor, valid: Bool[Tensor, "batch n"], seed: int) -> Float[Tensor, "batch n"]:
        raise NotImplementedError

    @torch.no_grad()
    def values(
        self,
        V: Shaped[Tensor, "sets n ..."],
        valid: Bool[Tensor, "sets n"] | None = None,
        *,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Float[Tensor, "sets n"]:
        """By what elements are ranked, larger first: log-odds of belonging to the best subset; -inf for padding.

        Parameters
        ----------
        V : (sets, n, …) Tensor
            Moved to the network's device.
        valid : (sets, n) bool Tensor, optional
            False for padding.
        seed : int
            Of the draws within. What a set gets depends on nothing but the set and this: not on its batch or padding.
        batch_size : int
            Sets at once, at most; fewer where they are so large that their n^2 draws would fill the memory.

        Raises
        ------
        InputError
            Shapes that do not fit, a set without elements.
        DataError
            A number that is not finite.
        """
        V, valid = checked_sets("V", V, valid)
        device = next(self.parameters(), torch.empty(0)).device
        at_once = max(1, min(batch_size, _PAIRS // V.shape[1] ** 2))
        parts = []
        with training_mode(self, False):
            for some, which in zip(V.split(at_once), valid.split(at_once)):
                which = which.to(device)
                found = self._values(some.to(device), which, seed)
                parts.append(found.masked_fill(~which, -torch.inf).to(V.device))
        return torch.cat(parts)

    def marginals(
        self, V: Shaped[Tensor, "sets n ..."], valid: Bool[Tensor, "sets n"] | None = None, *, seed: int = 0
    ) -> Float[Tensor, "sets n"]:
        """Probability of every element to belong to the best subset; 0 for padding. Arguments as of `values`."""
        if not self.has_marginals:
            raise InputError(f"{type(self).__name__} orders the elements and has no probabilities; give k to `select`")
        return self.values(V, valid, seed=seed).sigmoid()

    def select(
        self,
        V: Shaped[Tensor, "sets n ..."],
        k: int | Sequence[int] | Int[Tensor, " sets"] | None = None,
        valid: Bool[Tensor, "sets n"] | None = None,
        *,
        seed: int = 0,
    ) -> list[Int[Tensor, " k"]]:
        """Positions of the chosen elements of every set, the surest first.

        Parameters
        ----------
        V, valid, seed
            As of `values`.
        k : int or (sets,) ints, optional
            How many to choose, one number for all sets or one for each. Without it, all elements with a probability
            above one half; that may be none.

        Raises
        ------
        InputError
            k is negative or larger than a set; otherwise as of `values`.
        """
        values = self.values(V, valid, seed=seed)
        sizes = torch.isfinite(values).sum(1)
        if k is None:
            if not self.has_marginals:
                raise InputError(f"k: {type(self).__name__} orders the elements only; say how many to choose")
            counts = (values > 0).sum(1)
        else:
            counts = _counts(k, sizes.cpu())
        order = values.argsort(dim=1, descending=True, stable=True)
        return [row[: int(count)] for row, count in zip(order, counts)]

    def scores(self, V: Shaped[Tensor, "n ..."], ids: Sequence[str | int] | None = None, *, seed: int = 0) -> Scores:
        """`Scores` of the elements of one set, by which `Scores.top` chooses as `select` does.

        Parameters
        ----------
        V : (n, …) Tensor
            One ground set.
        ids : (n,) sequence, optional
            Names of the elements, by default their positions.
        seed : int
            As of `values`.
        """
        found = self.values(torch.as_tensor(V)[None], seed=seed)[0]
        provenance = {
            "method": type(self).__name__, "seed": seed, "values": "log-odds" if self.has_marginals else "order",
        }  # fmt: skip
        return Scores(found.double().cpu().numpy(), range(len(found)) if ids is None else ids, "sample", provenance)


def checked_sets(
    name: str, V: Shaped[Tensor, "sets n ..."], valid: Tensor | None
) -> tuple[Tensor, Bool[Tensor, "sets n"]]:
    """Ground sets and their validity mask; refuses what is no batch of sets, in words that name `name`."""
    V = torch.as_tensor(V)
    if V.ndim < 3:
        raise InputError(f"{name}: shape {tuple(V.shape)}; (sets, n, …) is needed, with at least one axis of features")
    if not len(V):
        raise NothingToDo(f"{name}: there is no set")
    if valid is None:
        valid = torch.ones(V.shape[:2], dtype=torch.bool, device=V.device)
    if valid.dtype != torch.bool or valid.shape != V.shape[:2]:
        raise InputError(
            f"valid: {valid.dtype} of shape {tuple(valid.shape)}; bool of shape {tuple(V.shape[:2])} is needed"
        )
    valid = valid.to(V.device)
    empty = (~valid.any(1)).nonzero()
    if len(empty) or V.shape[1] == 0:
        raise InputError(f"{name}: set {int(empty[0]) if len(empty) else 0} has no elements")
    if V.is_floating_point():
        bad = (~torch.isfinite(V).flatten(2).all(2) & valid).nonzero()
        if len(bad):
            at, element = bad[0].tolist()
            raise DataError(f"{name}: element {element} of set {at} holds a number that is not finite")
    return V, valid


def warn_of_one_sided(S: Bool[Tensor, "sets n"], valid: Bool[Tensor, "sets n"]) -> None:
    """Say so where best subsets are empty or whole sets, from which nothing, or one side only, is learnt."""
    empty, whole = int((~S.any(1)).sum()), int((valid == S).all(1).sum())
    if empty:
        warnings.warn(f"train: {empty} of {len(S)} best subsets are empty; nothing is learnt from them", stacklevel=3)
    if whole:
        warnings.warn(f"train: {whole} of {len(S)} best subsets are whole sets, without negatives", stacklevel=3)


def _counts(k: int | Sequence[int] | Tensor, sizes: Int[Tensor, " sets"]) -> Int[Tensor, " sets"]:
    counts = torch.as_tensor(k).cpu()
    if counts.ndim == 0:
        counts = counts.expand(len(sizes))
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.shape != sizes.shape:
        raise InputError(
            f"k: {counts.dtype} of shape {tuple(counts.shape)}; one whole number, or one per set, is needed"
        )
    wrong = ((counts < 0) | (counts > sizes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise InputError(f"k: {int(counts[at])} for set {at}, which has {int(sizes[at])} elements")
    return counts


def sampled_negatives(
    S: Bool[Tensor, "batch n"], valid: Bool[Tensor, "batch n"], ratio: int, generator: torch.Generator
) -> Bool[Tensor, "batch n"]:
    """`ratio` times |S*| random elements that are not in S*, or as many as there are."""
    keys = torch.rand(S.shape, generator=generator).to(S.device).masked_fill(S | ~valid, 2.0)
    rank = keys.argsort(1).argsort(1)
    return (rank < ratio * S.sum(1, keepdim=True)) & ~S & valid


def set_cross_entropy(
    log_odds: Float[Tensor, "batch n"], S: Bool[Tensor, "batch n"], counted: Bool[Tensor, "batch n"]
) -> Float[Tensor, ""]:
    """Mean over the sets of ``-sum_i N_i [S*_i log q_i + (1 - S*_i) log(1 - q_i)]``, with q the sigmoid of log-odds.

    Taken from log-odds, so that q = 0 and q = 1 are no trouble; the code of EquiVSet adds 1e-12 to q instead.
    """
    losses = nn.functional.binary_cross_entropy_with_logits(log_odds, S.to(log_odds.dtype), reduction="none")
    return (losses * counted).sum(1).mean()
