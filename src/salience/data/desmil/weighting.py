"""One weight per sample of a batch, learned so that the samples' vectors become independent."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.data.desmil.dependence import (
    Method,
    as_float,
    check_blocks,
    grams_of,
    pairwise_dependence,
    sum_of_pairs,
)
from salience.errors import InputError

AVERAGED = 10  # calls over which the memory is a plain mean


class StableWeights(nn.Module):
    """Weights under which the K vectors of a sample depend on each other as little as possible.

        w = softmax(omega),   min_omega  L_dec(softmax([omega, omega_mem])) / lam + sum_s w_s^2

    with L_dec of `interest_dependence`, by `steps` steps of gradient descent with momentum 0.9 from ``omega = 1``, the
    rate cut to a tenth at half of them. The memory stands for earlier batches: rows of vectors and of omega, moving
    averages of what stood in the same row of each batch, ``mem <- memory mem + (1 - memory) now`` (a plain mean over
    the first 10 calls). The second term keeps weights even. Where they still get too uneven, omega is shrunk until
    the effective sample size ``1 / sum w^2`` is `min_ess` of the batch.

    Parameters
    ----------
    steps : int
    lr : float
        Of the descent. Gradients shrink with the number of samples: 1 is for batches of about 128.
    lam : float
        The higher, the more even.
    method, features, joint
        As of `interest_dependence`. Random features are drawn afresh at every step.
    memory : float
        In [0, 1); 0 turns it off.
    min_ess : float
        In [0, 1]; 0 turns the guard off.
    generator : torch.Generator, optional
        On the CPU; the global one by default.

    Attributes
    ----------
    last : dict
        Of the last call: "ess", the effective sample size over the batch size; "shrunk", what omega was multiplied
        with. `interest_dependence` tells what the weights achieve.

    Raises
    ------
    InputError
        A parameter out of range; at calls, vectors that are no finite (n, K, d), or of other shape than the memory's.

    Notes
    -----
    Sources: arXiv 2207.07910 (weights per sample from HSIC between interests), and the published code of Zhang et al.,
    CVPR 2021 (the descent and the memory). Reconstructed: that pairs are of interests; the guard.
    """

    def __init__(
        self,
        steps: int = 20,
        lr: float = 1.0,
        lam: float = 70.0,
        features: int = 5,
        memory: float = 0.9,
        min_ess: float = 0.3,
        *,
        method: Method = "rff",
        joint: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, whole in (("steps", steps), ("features", features)):
            if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
                raise InputError(f"{name}: got {whole!r}; a whole number of at least 1 is needed")
        for name, value in (("lr", lr), ("lam", lam)):
            if not 0 < value < math.inf:
                raise InputError(f"{name}: got {value!r}; it must be a positive finite number")
        if not 0 <= memory < 1 or not 0 <= min_ess <= 1:
            raise InputError(f"memory, min_ess: got {memory!r}, {min_ess!r}; [0, 1) and [0, 1] are allowed")
        if method not in get_args(Method):
            raise InputError(f"method: got {method!r}; it must be 'rff', 'hsic' or 'linear'")
        self.steps, self.lr, self.lam, self.features, self.memory = steps, lr, lam, features, memory
        self.min_ess, self.method, self.joint, self.generator = min_ess, method, joint, generator
        self.calls = 0
        self.mem_z: Tensor | None = None
        self.mem_omega: Tensor | None = None
        self.last: dict[str, float] = {}

    def forward(self, z: Float[Tensor, "n K d"]) -> Float[Tensor, " n"]:
        """Weights of a batch, with sum 1 and no gradient; equal ones for fewer than 3 samples, or K = 1."""
        check_blocks(z)
        with torch.autocast(z.device.type, enabled=False), torch.enable_grad():
            z = as_float("z", z.detach())
            if len(z) < 3 or z.shape[1] == 1:
                return z.new_full((len(z),), 1 / len(z)) if len(z) else z.new_zeros(0)
            omega = self._learn(z)
            self._remember(z, omega)
            omega, shrunk = _tempered(omega, self.min_ess)
            w = torch.softmax(omega, 0)
            self.last = {"ess": float(1 / w.square().sum() / len(w)), "shrunk": shrunk}
        return w

    def _learn(self, z: Float[Tensor, "n K d"]) -> Float[Tensor, " n"]:
        omega = torch.ones(len(z), dtype=z.dtype, device=z.device, requires_grad=True)
        rows, behind = z, z.new_zeros(0)
        if self.mem_z is not None and self.mem_omega is not None:
            if self.mem_z.shape[1:] != z.shape[1:]:
                raise InputError(
                    f"z: vectors {tuple(z.shape[1:])}, but those of earlier batches are {tuple(self.mem_z.shape[1:])}"
                )
            rows, behind = torch.cat([z, self.mem_z.to(z)]), self.mem_omega.to(z)
        grams = grams_of(rows, self.method, self.features, self.joint, self.generator)
        optimizer = torch.optim.SGD([omega], self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, math.ceil(self.steps / 2)), 0.1)
        products = sum_of_pairs(grams)
        for step in range(self.steps):
            if step and self.method == "rff":
                grams = grams_of(rows, self.method, self.features, self.joint, self.generator)
                products = sum_of_pairs(grams)
            optimizer.zero_grad()
            dependence = pairwise_dependence(grams, torch.softmax(torch.cat([omega, behind]), 0), products)
            (dependence / self.lam + torch.softmax(omega, 0).square().sum()).backward()
            optimizer.step()
            schedule.step()
        return omega.detach()

    def _remember(self, z: Float[Tensor, "n K d"], omega: Float[Tensor, " n"]) -> None:
        """The rows of a smaller batch change only theirs; what a larger one has beyond the memory is not kept."""
        if not self.memory:
            return
        if self.mem_z is None or self.mem_omega is None:
            self.mem_z, self.mem_omega = z.clone(), omega.clone()
        keep = self.calls / (self.calls + 1) if self.calls < AVERAGED else self.memory
        n = min(len(z), len(self.mem_z))
        for mem, now in ((self.mem_z, z), (self.mem_omega, omega)):
            mem[:n] = keep * mem[:n] + (1 - keep) * now[:n].to(mem)
        self.calls += 1

    def get_extra_state(self) -> dict[str, Any]:
        """Memory and number of calls, for checkpoints: their shapes are known after the first batch only."""
        return {"calls": self.calls, "z": self.mem_z, "omega": self.mem_omega}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """As of `get_extra_state`."""
        self.calls, self.mem_z, self.mem_omega = state["calls"], state["z"], state["omega"]


def _tempered(omega: Float[Tensor, " n"], min_ess: float) -> tuple[Float[Tensor, " n"], float]:
    """Omega, or the largest multiple of it whose softmax has an effective sample size of `min_ess` of n."""

    def enough(factor: float) -> bool:
        return float(1 / torch.softmax(factor * omega, 0).square().sum()) >= min_ess * len(omega)

    if enough(1.0):
        return omega, 1.0
    low, high = 0.0, 1.0  # at 0 all are equal; the effective sample size falls with the factor
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low * omega, low
