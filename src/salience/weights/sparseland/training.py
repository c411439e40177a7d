"""Train under masks that stand still, move or shrink, in somebody's own loop: hooks on the optimiser do it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salience.errors import InputError
from salience.weights.sparseland.accounting import SparsityReport, sparsity_report
from salience.weights.sparseland.densities import Mode, count_kept, prunable
from salience.weights.sparseland.masking import Masks, _largest, starting_masks, warn_of_collapse, weights_of

Method = Literal["static", "set", "rigl", "snfs", "gmp", "granet"]
DROP = {"static": 0.0, "set": 0.5, "rigl": 0.3, "snfs": 0.5, "gmp": 0.0, "granet": 0.5}
_GROWING = ("set", "rigl", "snfs", "granet")
_SHRINKING = ("gmp", "granet")


class SparseTrainer:
    """Keep a network sparse while an optimiser trains it.

    Hooks on the optimiser mask gradients before each step, and weights and momentum after it, so that the loop
    around stays as it is (mixed precision and distributed training included: at a step, gradients are unscaled and
    averaged). Every `update_every` steps until ``stop * total_steps`` the masks change:

        drop  the k_l smallest |w| of layer l,  k_l = (alpha / 2) (1 + cos(pi t / T_end)) nnz_l
        grow  as many others:  set: at random,  rigl: largest |gradient|,  snfs: largest |momentum|, shared over the
              layers by their mean |momentum|
        gmp   instead: keep the largest |w|, at sparsity  s_f + (s_i - s_f) (1 - t / T_end)^3;  masks never grow
        granet  as gmp, then dropping and growing as rigl at the density that was reached

    Parameters
    ----------
    model : torch.nn.Module
        Its weights are masked at once.
    optimizer : torch.optim.Optimizer
        Over the model's parameters; with hooks, as all of `torch.optim` have.
    density : float
        Share of the prunable weights at the end, in (0, 1].
    total_steps : int
        Steps that the loop will take.
    method : {"rigl", "set", "snfs", "gmp", "granet", "static"}
    allocation : {"erk", "er", "uniform", "uniform+"} or Scores
        As of `allocate`, for the masks at the start.
    masks : dict of str to bool Tensor, optional
        Masks to start from, such as SNIP's or a ticket's, in the place of random ones.
    update_every : int
        Steps between changes. A longer wait lets grown weights prove themselves ("ITOP").
    drop_fraction : float, optional
        alpha; by default 0.3 for rigl, 0.5 for the others.
    stop : float
        Share of the steps after which masks stand still.
    start_density : float
        Of gmp and granet.
    scope : {"global", "layer"}
        Of gmp and granet: compare magnitudes over all layers or within each.
    regrow : bool
        Whether a weight may grow in the step that dropped it.
    exclude : sequence of str
        As of `prunable`.
    generator : torch.Generator
        On the CPU; draws masks and what "set" grows.

    Attributes
    ----------
    masks : dict of str to bool Tensor
        Now.
    steps : int
        Taken so far.

    Raises
    ------
    InputError
        An option out of range, masks that do not fit, or an optimiser without one of the weights.

    References
    ----------
    SET: Mocanu et al. 2018; RigL: Evci et al. 2020; SNFS: Dettmers, Zettlemoyer 2019; ITOP: Liu et al. 2021; GMP:
    Zhu, Gupta 2017; GraNet: Liu et al. 2021. GraNet and SNFS follow the briefest form of their authors' code.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        density: float,
        total_steps: int,
        generator: torch.Generator,
        method: Method = "rigl",
        allocation: Mode | Any = "erk",
        masks: Mapping[str, Tensor] | None = None,
        update_every: int = 100,
        drop_fraction: float | None = None,
        stop: float = 0.75,
        start_density: float = 1.0,
        scope: Literal["global", "layer"] = "global",
        regrow: bool = True,
        exclude: Sequence[str] = (),
    ) -> None:
        if method not in DROP:
            raise InputError(f"method: got {method!r}; it must be one of {', '.join(DROP)}")
        alpha = DROP[method] if drop_fraction is None else drop_fraction
        first = start_density if method in _SHRINKING else density
        if not 0 < density <= first <= 1:
            raise InputError(f"density and start_density: got {density!r} and {first!r}; 0 < density <= start <= 1")
        if total_steps < 1 or update_every < 1 or not 0 <= stop <= 1 or not 0 <= alpha <= 1:
            raise InputError(
                f"total_steps, update_every, stop, drop_fraction: got {total_steps}, {update_every}, {stop}, {alpha}; "
                "the first two at least 1, the others in [0, 1]"
            )
        if scope not in ("global", "layer"):
            raise InputError(f"scope: got {scope!r}; it must be global or layer")
        self.model, self.method, self.density, self.alpha = model, method, density, alpha
        self.start_density, self.update_every, self.scope, self.regrow = first, update_every, scope, regrow
        self.end = int(stop * total_steps)
        if method in _SHRINKING and not self.end:
            raise InputError(f"stop: {stop} of {total_steps} steps leaves none in which {method} could prune")
        self.generator, self.steps = generator, 0
        weights = prunable(model, exclude)
        if masks is None:
            if first == 1:
                masks = {name: torch.ones(w.weight.shape, dtype=torch.bool) for name, w in weights.items()}
            else:
                masks = starting_masks(weights, first, allocation, generator)
        self._weights = weights_of(model, masks)
        self.masks: Masks = {name: mask.clone().to(self._weights[name].device) for name, mask in masks.items()}
        self.ever = {name: mask.clone() for name, mask in self.masks.items()}
        self._passes = dict.fromkeys(masks, 0.0)  # density of each layer summed over the steps
        self._dense_backwards = dict.fromkeys(masks, 0.0)  # absent share of each layer summed over dense backwards
        self._gradients: dict[str, Tensor] = {}
        self._trained: set[str] = set()  # weights that have a gradient at this step
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        lacking = [name for name, weight in self._weights.items() if id(weight) not in given]
        if lacking:
            raise InputError(f"optimizer: it lacks the weight {lacking[0]!r}")
        self.optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._mask_weights()

    def detach(self) -> None:
        """Take the hooks off; the masks stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def report(self, example: Any) -> SparsityReport:
        """Density, operations and storage of the network now, and what training has cost so far.

        Parameters
        ----------
        example : tensor, tuple or mapping
            One row of inputs, on which operations are counted.
        """
        entries = sum(entry.weight.numel() for entry in prunable(self.model).values())
        never = sum(int((~ever).sum()) for ever in self.ever.values())
        explored = 1 - never / entries  # of all weights that could be masked, as the density is
        return sparsity_report(
            self.model, self.masks, example, explored=explored, passes=self._passes, steps=self.steps,
            dense_backwards=self._dense_backwards,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain numbers: masks, steps, random state, accounts."""
        return {
            "masks": dict(self.masks), "ever": dict(self.ever), "passes": dict(self._passes), "steps": self.steps,
            "dense_backwards": dict(self._dense_backwards), "generator": self.generator.get_state(),
            "method": self.method,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the weights are masked anew.

        Make the trainer before the model's weights are loaded, or with ``masks=state["masks"]``: new random masks
        would zero weights that the old ones keep.

        Raises
        ------
        InputError
            It is of another method, or its masks do not fit the model.
        """
        if state["method"] != self.method or set(state["masks"]) != set(self.masks):
            raise InputError(
                f"state: it is of method {state['method']!r} with other masks, not of {self.method!r} here"
            )
        weights_of(self.model, state["masks"])
        self.masks = {name: mask.clone().to(self.masks[name].device) for name, mask in state["masks"].items()}
        self.ever = {name: mask.clone().to(self.masks[name].device) for name, mask in state["ever"].items()}
        self._passes, self.steps = dict(state["passes"]), int(state["steps"])
        self._dense_backwards = dict(state["dense_backwards"])
        self.generator.set_state(state["generator"].cpu())
        self._mask_weights()

    @property
    def _due(self) -> bool:
        """Whether the masks change at the end of the current step."""
        at = self.steps + 1
        if self.method in _SHRINKING and at == self.end:
            return True  # whatever update_every is, the density asked for is reached
        return self.method != "static" and at % self.update_every == 0 and at <= self.end

    def _before(self, *_: Any) -> None:
        self._trained = {name for name, weight in self._weights.items() if weight.grad is not None}
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            if self._due and self.method in ("rigl", "granet"):
                self._gradients[name] = weight.grad.detach().clone()  # dense, which masking would destroy
            if self.method != "snfs":  # which needs the momentum of absent weights
                weight.grad.mul_(self.masks[name])
        if self.method == "snfs" or (self._due and self.method in ("rigl", "granet")):
            for name, mask in self.masks.items():
                self._dense_backwards[name] += 1 - float(mask.sum()) / mask.numel()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for name, mask in self.masks.items():
            self._passes[name] += float(mask.sum()) / mask.numel()
        due = self._due
        self.steps += 1
        self._mask_weights()
        if due:
            if self.method in _SHRINKING:
                self._shrink()
            if self.method in _GROWING:
                self._move()
            for name, mask in self.masks.items():
                self.ever[name] |= mask
            self._mask_weights()
        self._gradients.clear()

    @torch.no_grad()
    def _mask_weights(self) -> None:
        """Zero what is absent: weights, and whatever the optimiser remembers of them."""
        for name, weight in self._weights.items():
            mask = self.masks[name]
            weight.masked_fill_(~mask, 0)
            if self.method == "snfs":
                continue
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(~mask, 0)

    def _shrink(self) -> None:
        remaining = 1 - min(self.steps / max(self.end, 1), 1.0)
        sparsity = (1 - self.density) + ((1 - self.start_density) - (1 - self.density)) * remaining**3
        # Absent weights cannot return: below every magnitude.
        sizes = {name: torch.where(self.masks[name], w.abs(), -1.0) for name, w in self._weights.items()}
        if self.scope == "global":
            flat = torch.cat([size.flatten() for size in sizes.values()])
            count = min(count_kept(1 - sparsity, flat.numel()), sum(int(mask.sum()) for mask in self.masks.values()))
            parts = _largest(flat, count).split([size.numel() for size in sizes.values()])
            self.masks = {name: part.view(sizes[name].shape) for name, part in zip(sizes, parts)}
        else:
            for name, size in sizes.items():
                count = min(count_kept(1 - sparsity, size.numel()), int(self.masks[name].sum()))
                self.masks[name] = _largest(size.flatten(), count).view(size.shape)
        warn_of_collapse(self.masks)

    def _move(self) -> None:
        """Drop the smallest and grow as many, the total unchanged to the unit."""
        share = self.alpha / 2 * (1 + math.cos(math.pi * self.steps / max(self.end, 1)))
        dropped: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            if name not in self._trained:
                continue  # frozen: nothing tells which of its weights matter, and none grown would be trained
            mask = self.masks[name]
            active = int(mask.sum())
            # k weights go only if k others can come.
            count = min(int(share * active), mask.numel() - active if not self.regrow else mask.numel())
            kept = _largest(torch.where(mask, weight.abs(), -1.0).flatten(), active - count).view(mask.shape)
            dropped[name] = mask & ~kept
            self.masks[name] = kept
        moved = {name: self.masks[name] for name in dropped}
        room = {name: ~mask if self.regrow else ~mask & ~dropped[name] for name, mask in moved.items()}
        counts = {name: int(gone.sum()) for name, gone in dropped.items()}
        if self.method == "snfs":
            counts = self._redistribute(sum(counts.values()), room)
        for name, count in counts.items():
            if not count:
                continue
            wanted = torch.where(room[name], self._growth(name), -math.inf)
            grown = _largest(wanted.flatten(), count).view(wanted.shape)
            self.masks[name] = self.masks[name] | grown
            self._weights[name].masked_fill_(grown, 0)  # also one that was dropped just now begins anew
            for value in self.optimizer.state.get(self._weights[name], {}).values():
                if isinstance(value, Tensor) and value.shape == grown.shape and self.method != "snfs":
                    value.masked_fill_(grown, 0)

    def _growth(self, name: str) -> Tensor:
        weight = self._weights[name]
        if self.method == "set":
            return torch.rand(weight.shape, generator=self.generator).to(weight.device)
        if self.method == "snfs":
            return self._momentum(name).abs()
        return self._gradients[name].abs()

    def _momentum(self, name: str) -> Tensor:
        state = self.optimizer.state.get(self._weights[name], {})
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), Tensor):
                return state[key]
        raise InputError("optimizer: snfs grows by momentum, which this one has not; use SGD with momentum, or Adam")

    def _redistribute(self, total: int, room: Mapping[str, Tensor]) -> dict[str, int]:
        """How many each layer grows: by mean |momentum| of its active weights; what has no room goes on."""
        strength = {
            name: float(self._momentum(name)[mask].abs().double().mean()) if mask.any() else 0.0
            for name, mask in self.masks.items()
            if name in room
        }
        counts = dict.fromkeys(strength, 0)
        free = {name: int(places.sum()) for name, places in room.items()}
        left = min(total, sum(free.values()))
        while left:
            open_layers = [name for name in strength if counts[name] < free[name]]
            weight = sum(strength[name] for name in open_layers)
            before = left
            for name in open_layers:
                part = strength[name] / weight if weight else 1 / len(open_layers)
                more = min(int(part * before), free[name] - counts[name], left)
                counts[name] += more
                left -= more
            if left == before:  # shares below one: the strongest layers take the rest, one by one
                for name in sorted(open_layers, key=lambda layer: -strength[layer])[:left]:
                    counts[name] += 1
                    left -= 1
        return counts
