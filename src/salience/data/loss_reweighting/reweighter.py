"""The loss that stands in the place of ``losses.mean()``, in any training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from salience.data.loss_reweighting.gathering import gather_rows
from salience.data.loss_reweighting.weighting import (
    Strategy,
    WeightDiagnostics,
    check_parameters,
    sample_table,
    weight_diagnostics,
    weights_of_table,
)
from salience.errors import InputError, nearest
from salience.scores import Scores


class LossReweighter(nn.Module):
    """Weighted mean of per-sample losses, the weights computed afresh from the losses of every batch.

        L = W sum_{i here} w_i l_i

    with w from `loss_weights` over the batches of all W processes, so that the averaged gradient of distributed
    training is that of ``sum_i w_i l_i``. For the first steps (`burn_in`) the weights are uniform: early losses are
    noise. In evaluation mode, and where gradients are off, it is the plain mean.

    Parameters
    ----------
    strategy, r, delta
        As of `loss_weights`. 0.4 is what the paper's larger runs use; a small model that fits its data needs more (1).
    burn_in : float or int
        Steps with uniform weights: a share of all steps in [0, 1), or a whole number of them.
    r_schedule : callable, optional
        ``(step, total_steps) -> r``, in the place of a constant r:
        ``lambda step, total: 100.0 if step < 2000 else 0.4`` is that of the paper's largest models.
    length_weight : {"sample", "token"}
        "token" multiplies each weight by the sample's share of the tokens, ``M n_i / sum n``, as the authors' trainer
        does: uniform weights then give the mean over tokens. The share is over all processes, theirs is within each.
    scores : Scores, optional
        Of samples, from any method. ``scores.weights(temperature)`` become the prior p of the weights; with strategy
        "uniform" they are the weights. Calls then need the samples' `ids`.
    temperature : float
        Of `scores`.
    group : ProcessGroup, optional
        As of `loss_weights`.

    Attributes
    ----------
    steps : int64 Tensor, shape ()
        Training calls so far; a buffer, so that a checkpoint holds it.
    last_weights : (batch,) float32 Tensor
        Of this process's samples in the last training call; over all processes they sum to 1.

    Raises
    ------
    InputError
        A parameter out of range; at calls, see `coefficients`.

    Notes
    -----
    With gradient accumulation, every micro-batch is weighed by itself unless `backward` is used. The paper says
    nothing on that, nor on priors; both are ours.
    """

    steps: Tensor

    def __init__(
        self,
        strategy: Strategy = "linupper",
        r: float = 0.4,
        delta: float = 1.0,
        *,
        burn_in: float = 0.05,
        r_schedule: Callable[[int, int | None], float] | None = None,
        length_weight: Literal["sample", "token"] = "sample",
        scores: Scores | None = None,
        temperature: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_parameters(strategy, r, delta)
        whole = isinstance(burn_in, int) and not isinstance(burn_in, bool)
        if not (whole and burn_in >= 0) and not (isinstance(burn_in, float) and 0 <= burn_in < 1):
            raise InputError(f"burn_in: got {burn_in!r}; a share in [0, 1) or a whole number of steps is needed")
        if length_weight not in ("sample", "token"):
            raise InputError(f"length_weight: got {length_weight!r}; it must be 'sample' or 'token'")
        if r_schedule is not None and not callable(r_schedule):
            raise InputError(f"r_schedule: got {r_schedule!r}; a function (step, total_steps) -> r is needed")
        self.strategy, self.r, self.delta, self.group = strategy, r, delta, group
        self.burn_in, self.r_schedule, self.length_weight = burn_in, r_schedule, length_weight
        self._prior: dict[str, float] | None = None
        if scores is not None:
            if scores.unit != "sample":
                raise InputError(f"scores: of {scores.unit}s; scores of samples are needed")
            self._prior = dict(zip(scores.ids, scores.weights(temperature).tolist(), strict=True))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.last_weights: Tensor | None = None
        self._last: dict[str, Any] = {}

    def forward(
        self,
        losses: Float[Tensor, " batch"],
        tokens: Int[Tensor, " batch"] | None = None,
        *,
        ids: Sequence[str | int] | Shaped[Tensor, " batch"] | None = None,
        step: int | None = None,
        total_steps: int | None = None,
    ) -> Float[Tensor, ""]:
        """The loss to call `backward` on; arguments as of `coefficients`."""
        if not (self.training and torch.is_grad_enabled()):
            return self._plain_mean(losses, tokens)
        coefficients = self.coefficients(losses, tokens, ids=ids, step=step, total_steps=total_steps)
        return _weighted_sum(coefficients, losses)

    def coefficients(
        self,
        losses: Float[Tensor, " batch"],
        tokens: Int[Tensor, " batch"] | None = None,
        *,
        ids: Sequence[str | int] | Shaped[Tensor, " batch"] | None = None,
        step: int | None = None,
        total_steps: int | None = None,
    ) -> Float[Tensor, " batch"]:
        """What each loss of this process is multiplied with before they are summed; counts as one step.

        Parameters
        ----------
        losses : (batch,) Tensor
            One per sample, as of `per_sequence_loss` or any loss with ``reduction="none"``.
        tokens : (batch,) int Tensor, optional
            Targets of each sample. One with 0 is left out, whatever its loss.
        ids : (batch,) sequence, optional
            Of the samples, where there are `scores`.
        step, total_steps : int, optional
            Optimiser steps done so far, by default the number of calls, and in all, which a `burn_in` that is a share
            needs.

        Raises
        ------
        InputError
            A loss that is NaN or infinite, shapes that differ, ids or tokens that are missing, ids without a score, a
            schedule that gives no positive r.
        """
        if self.length_weight == "token" and tokens is None:
            raise InputError("tokens: length_weight='token' needs the number of targets of each sample")
        prior = self._prior_of(losses, ids)
        done = int(self.steps) if step is None else step
        burning = self._burning(done, total_steps)
        r = float(self.r if self.r_schedule is None else self.r_schedule(done, total_steps))
        if not 0 < r < math.inf:
            raise InputError(f"r_schedule: gave {r!r} at step {done}; it must be a positive finite number")
        valid = None if tokens is None else tokens > 0
        everyone = gather_rows(sample_table(losses, valid, prior, tokens), self.group)
        weights = weights_of_table(everyone.rows, "uniform" if burning else self.strategy, r, self.delta)
        self.steps += 1
        self.last_weights = weights[everyone.own]
        counted = everyone.rows[:, 1] > 0
        self._last = {"weights": weights[counted], "losses": everyone.rows[counted, 0], "r": r, "step": done,
                      "burning": burning}  # fmt: skip
        factors = weights * everyone.world
        if self.length_weight == "token":
            share = everyone.rows[:, 3] * counted
            factors = factors * share * (counted.sum() / share.sum().clamp(min=1))
        return factors[everyone.own]

    def backward(
        self,
        per_sample: Callable[[Any], Any],
        micro_batches: Sequence[Any],
        *,
        step: int | None = None,
        total_steps: int | None = None,
    ) -> Float[Tensor, ""]:
        """Accumulate the gradient of micro-batches, weighed as the one batch that they make up.

        A first pass without gradients finds all losses, a second one takes the gradients. The model must give the same
        losses twice: with dropout, the weights are those of another draw.

        Parameters
        ----------
        per_sample : callable
            Takes a micro-batch and returns its losses (batch,), or (losses, tokens).
        micro_batches : sequence
        step, total_steps : int, optional
            As of `coefficients`.

        Returns
        -------
        scalar Tensor
            The loss, detached; gradients stand in the parameters.
        """
        if self._prior is not None:
            raise InputError("scores: backward has no ids to look scores up by; use coefficients")
        with torch.no_grad():
            found = [_pair(per_sample(batch)) for batch in micro_batches]
        if not found:
            raise InputError("micro_batches: there are none")
        counts = [part for _, part in found if part is not None]
        tokens = torch.cat(counts) if counts else None
        coefficients = self.coefficients(
            torch.cat([losses for losses, _ in found]), tokens, step=step, total_steps=total_steps
        )
        total = coefficients.new_zeros(())
        parts = coefficients.split([len(losses) for losses, _ in found])
        for batch, part in zip(micro_batches, parts, strict=True):
            loss = _weighted_sum(part, _pair(per_sample(batch))[0])
            loss.backward()
            total += loss.detach()
        return total

    def diagnostics(self) -> dict[str, float]:
        """`WeightDiagnostics` of the last training call over all processes, with its r, step and burn-in.

        Raises
        ------
        InputError
            There was none yet.
        """
        if not self._last:
            raise InputError("diagnostics: there was no training step yet")
        weights, losses = self._last["weights"], self._last["losses"]
        told = weight_diagnostics(weights, losses) if len(weights) else WeightDiagnostics(0.0, 0.0, math.nan)
        rest = {name: float(self._last[name]) for name in ("r", "step", "burning")}
        return {**told._asdict(), **rest}

    def extra_repr(self) -> str:
        """The parameters, for `print`."""
        return f"{self.strategy!r}, r={self.r}, delta={self.delta}, burn_in={self.burn_in}"

    def _burning(self, done: int, total_steps: int | None) -> bool:
        if isinstance(self.burn_in, int):
            return done < self.burn_in
        if self.burn_in and total_steps is None:
            raise InputError(
                f"total_steps: burn_in={self.burn_in} is a share of them; give them with each call, or burn_in as a "
                "whole number of steps"
            )
        return bool(self.burn_in) and done < self.burn_in * (total_steps or 0)

    def _prior_of(self, losses: Tensor, ids: Sequence[str | int] | Tensor | None) -> Tensor | None:
        if self._prior is None:
            return None
        if ids is None:
            raise InputError("ids: there are scores, so each call needs the ids of its samples")
        names = [str(name) for name in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        missing = [name for name in names if name not in self._prior]
        if missing:
            known = [name for name, _ in zip(self._prior, range(10_000))]
            raise InputError(f"ids: {missing[0]!r} has no score ({nearest(missing[0], known)})")
        return losses.new_tensor([self._prior[name] for name in names], dtype=torch.float32)

    def _plain_mean(self, losses: Tensor, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            return losses.mean()
        counts = tokens.to(losses) if self.length_weight == "token" else (tokens > 0).to(losses)
        return _weighted_sum(counts / counts.sum().clamp(min=1), losses)


def _weighted_sum(coefficients: Tensor, losses: Tensor) -> Tensor:
    """Sum of the products; what has no weight may be NaN."""
    return (coefficients * losses.where(coefficients > 0, 0.0)).sum()


def _pair(result: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(result, Tensor):
        return result, None
    losses, tokens = result
    return losses, tokens
