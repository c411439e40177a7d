"""Calibration text as sequences of token ids, each token with what is known of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salience.errors import DataError, InputError, NothingToDo
from salience.scores import Scores


class Calibration(NamedTuple):
    """Sequences to calibrate on.

    Attributes
    ----------
    ids : int64 Tensor (sequences, tokens)
    mask : bool Tensor (sequences, tokens)
        Which tokens are real: the model sees these.
    given : float32 Tensor (sequences, tokens) or None
        Importance from elsewhere.
    fitted : bool Tensor (sequences, tokens) or None
        Which real tokens may have weight; all by default. The model sees the others all the same.
    """

    ids: Int[Tensor, "sequence token"]
    mask: Bool[Tensor, "sequence token"]
    given: Float[Tensor, "sequence token"] | None = None
    fitted: Bool[Tensor, "sequence token"] | None = None

    def weighed(self) -> Bool[Tensor, "sequence token"]:
        """Tokens that may have weight."""
        return self.mask if self.fitted is None else self.mask & self.fitted

    def counts(self) -> Int[Tensor, "sequence token"]:
        """How often each token occurs in all real tokens."""
        known, where = self.ids.unique(return_inverse=True)
        return torch.bincount(where[self.mask], minlength=len(known))[where]

    def expanded(self, times: int) -> Calibration:
        """Each sequence `times` over, rolled by 0, 1, … parts of its length: no token stands first in all copies."""
        if times == 1:
            return self

        def copies(part: Tensor | None) -> Any:
            return None if part is None else torch.cat([_rolled(part, self.mask, k, times) for k in range(times)])

        return Calibration(*(copies(part) for part in self))


def calibration_of(batches: Any) -> Calibration:
    """Sequences from batches as models take them.

    Parameters
    ----------
    batches : Tensor, mapping, or iterable of them
        ``input_ids`` (batch, token); of a mapping also ``attention_mask`` and, if there are any, ``token_weights``.
        Shorter batches are padded.

    Raises
    ------
    NothingToDo
        No sequence, or none with a real token.
    InputError
        Something else, or shapes that do not fit.
    """
    if isinstance(batches, Calibration):
        return batches
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise InputError(f"batches: got {type(batches).__name__}; tensors of token ids or mappings are wanted")
    rows: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for batch in batches:
        ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise InputError("batches: each must be or hold `input_ids`, whole numbers (batch, token)")
        extra = batch if isinstance(batch, Mapping) else {}
        mask = extra.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        given = extra.get("token_weights")
        if mask.shape != ids.shape or (given is not None and given.shape != ids.shape):
            raise InputError(f"batches: mask or weights do not have the shape {tuple(ids.shape)} of the ids")
        rows.append((ids.long().cpu(), mask.cpu(), None if given is None else given.float().cpu()))
    if not sum(int(mask.sum()) for _, mask, _ in rows):
        raise NothingToDo("batches: there is no token to calibrate on")
    if len({given is None for *_, given in rows}) > 1:
        raise InputError("batches: some have token_weights and some have not")
    width = max(ids.shape[1] for ids, *_ in rows)

    def joined(parts: Sequence[Any]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    ids, mask = joined([row[0] for row in rows]), joined([row[1] for row in rows])
    some = mask.any(1)  # a row of nothing but padding has no importance to scale
    given = None if rows[0][2] is None else joined([row[2] for row in rows])[some]
    return Calibration(ids[some], mask[some], given)


def calibration_from_texts(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int,
    sequences: int,
    generator: torch.Generator,
    weights: Scores | None = None,
    numbers: Sequence[int] | None = None,
    skip_special: bool = False,
) -> Calibration:
    """Documents one after the other, cut into sequences of equal length, of which a random sample is taken.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    texts : sequence of str
    length : int
        Tokens of a sequence. Text shorter than that makes one shorter sequence.
    sequences : int
        How many at most.
    generator : torch.Generator
        Of the sample.
    weights : Scores, optional
        Importance of each token, of unit "token", with ids ``document:position``, both from 0: positions in what the
        tokenizer makes of each document.
    numbers : sequence of int, optional
        The number of each document in the ids; by default the order of `texts`.
    skip_special : bool
        Special tokens, as of a chat template, get no weight. The model sees them.

    Raises
    ------
    InputError
        Scores of another unit, or a token without a score.
    NothingToDo
        No tokens.
    """
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    if not len(ids):
        raise NothingToDo("calibration: the text has no tokens")
    given = None
    if weights is not None:
        if weights.unit != "token":
            raise InputError(f"token weights: got scores of {weights.unit}s; scores of tokens are wanted")
        numbers = range(len(rows)) if numbers is None else numbers
        names = [f"{number}:{place}" for number, row in zip(numbers, rows, strict=True) for place in range(len(row))]
        given = torch.from_numpy(weights.aligned(names)).float()
    fitted = torch.ones(len(ids), dtype=torch.bool)
    if skip_special:
        fitted = ~torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long))
        if not fitted.any():
            raise NothingToDo("calibration: all tokens are special ones")
    length = min(length, len(ids))
    count = len(ids) // length
    chosen = torch.randperm(count, generator=generator)[:sequences].sort().values

    def cut(part: Tensor) -> Tensor:
        return part[: count * length].view(count, length)[chosen]

    kept = cut(fitted)
    some = kept.any(1)  # a sequence without weight has no part in any Hessian
    if not some.any():
        raise NothingToDo("calibration: all tokens of the sample are special ones")
    sample = cut(ids)[some]
    real = torch.ones_like(sample, dtype=torch.bool)
    return Calibration(sample, real, None if given is None else cut(given)[some], kept[some] if skip_special else None)


def check_length(calibration: Calibration, config: Any) -> None:
    """Refuse sequences that the model was not made for, and ids that it does not know.

    Raises
    ------
    InputError, DataError
        Longer than its positions; an id outside the vocabulary.
    """
    longest, most = getattr(config, "max_position_embeddings", None), int(calibration.mask.sum(1).max())
    if longest and most > longest:
        raise InputError(f"calibration: a sequence has {most} tokens, and the model has {longest} positions")
    if int(calibration.ids.max()) >= config.vocab_size or int(calibration.ids.min()) < 0:
        raise DataError(f"calibration: a token id lies outside the vocabulary of {config.vocab_size}")


def _rolled(part: Tensor, mask: Tensor, k: int, times: int) -> Tensor:
    rolled = part.clone()
    for row, real in enumerate(mask):
        places = real.nonzero()[:, 0]
        rolled[row, places] = part[row, places.roll(k * len(places) // times)]
    return rolled
