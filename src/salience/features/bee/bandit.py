"""Thompson sampling over arms whose success depends on a context by a logistic regression."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import expit

from salience.errors import InputError


class LogisticThompson:
    r"""Contextual bandit: each arm holds a diagonal Gaussian over the weights of a logistic regression.

    Choice: draw :math:`w_k \sim N(m_k, 1/q_k)` for each arm and take the largest :math:`w_k \cdot \phi`. Update
    of the arm with :math:`y = \pm 1` by the Laplace approximation::

        w* = argmin_w  1/2 sum_i q_i (w_i - m_i)^2 + log(1 + exp(-y w . phi))
        m <- w*,   q_i <- q_i + phi_i^2 p (1 - p),   p = sigmoid(w* . phi)

    Parameters
    ----------
    arms : int
    dim : int
        Length of a context.
    random_state : int or numpy Generator
        Of the draws.

    Attributes
    ----------
    mean, precision : array (arms, dim)
        Begin at 0 and 1.
    pulls : array (arms,)
        Updates of each arm.

    Notes
    -----
    Source: Chapelle and Li, "An Empirical Evaluation of Thompson Sampling", NIPS 2011, algorithm 3, which BEE
    names as its model. The minimum is found exactly: it lies on the line ``m + t phi / q``, which leaves one
    unknown. The reference code of BEE takes optimiser steps, applies the logistic term to each coordinate by
    itself, and uses the variance as a standard deviation; this follows the published algorithm.
    """

    def __init__(self, arms: int, dim: int, *, random_state: int | np.random.Generator = 0) -> None:
        if arms < 1 or dim < 1:
            raise InputError(f"arms and dim: got {arms!r} and {dim!r}; both must be at least 1")
        self.mean: Float[np.ndarray, "arms dim"] = np.zeros((arms, dim))
        self.precision: Float[np.ndarray, "arms dim"] = np.ones((arms, dim))
        self.pulls = np.zeros(arms, dtype=np.int64)
        self._rng = np.random.default_rng(random_state)

    def choose(self, phi: Float[np.ndarray, " dim"]) -> int:
        """The arm of the largest drawn ``w_k . phi``."""
        phi = self._context(phi)
        drawn = self.mean + self._rng.standard_normal(self.mean.shape) / np.sqrt(self.precision)
        return int(np.argmax(drawn @ phi))

    def update(self, arm: int, phi: Float[np.ndarray, " dim"], y: int) -> None:
        """Tell whether pulling `arm` in context `phi` was a success (1) or not (-1)."""
        phi = self._context(phi)
        if y not in (1, -1):
            raise InputError(f"y: got {y!r}; it must be 1 or -1")
        m, q = self.mean[arm], self.precision[arm]
        at, reach = float(m @ phi), float((phi**2 / q).sum())
        # The derivative along the line is 0 where z = at + y reach sigmoid(-y z); z is w . phi.
        z = at if reach == 0 else brentq(lambda z: z - at - y * reach * expit(-y * z), at - reach, at + reach)
        p = expit(z)
        self.mean[arm] = m + y * expit(-y * z) * phi / q
        self.precision[arm] = q + phi**2 * p * (1 - p)
        self.pulls[arm] += 1

    def copy(self, random_state: int | np.random.Generator) -> LogisticThompson:
        """A bandit of its own that has learned the same and draws from another stream."""
        other = LogisticThompson(*self.mean.shape, random_state=random_state)
        other.mean, other.precision, other.pulls = self.mean.copy(), self.precision.copy(), self.pulls.copy()
        return other

    def _context(self, phi: np.ndarray) -> np.ndarray:
        phi = np.asarray(phi, dtype=np.float64)
        if phi.shape != self.mean.shape[1:] or not all(map(math.isfinite, phi)):
            raise InputError(f"phi: has shape {phi.shape}; {self.mean.shape[1]} finite numbers are needed")
        return phi
