"""The estimator: choose by what the kept entries of a delta are divided, and prune a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.func import functional_call

from salience.errors import DataError, InputError, nearest
from salience.model.at import logits_of, run, training_mode
from salience.weights.darex.deltas import HEADS, check_rates, importance_delta, keep_mask, mask_seed, prunable
from salience.weights.darex.diagnosis import DeltaStats, delta_stats
from salience.weights.darex.observing import input_axes, input_statistics, outputs_before, outputs_of
from salience.weights.darex.pairing import in_names_of, is_own_part
from salience.weights.darex.rescaling import analytic_q, search

_METHODS = ("darex", "dare", "magnitude", "wanda")
Rescale = float | Mapping[str, float] | Literal["auto", "global", "layer", "gradient"]


class DeltaPruner(BaseEstimator):
    """Keep a small share of what fine-tuning changed, and choose the divisor of the kept entries on data.

    Parameters
    ----------
    rate : float in [0, 1)
        p, the share of entries to drop.
    method : {"darex", "dare", "magnitude", "wanda"}
        DAREx-q; DARE, whose divisor is ``1 - p``; or the most important entries, which are not rescaled.
    rescale : "auto", "global", "layer", "gradient", float, or mapping of str to float
        For darex. "global": one q for all layers, by search. "layer": q of each linear layer in closed form, with
        eta by search. "gradient": q of each layer by gradient descent on the outputs (decoders, the authors' first
        version). "auto": "global" for decoders, for encoders whichever of "layer" and "global" the search prefers (the
        paper recommends "layer"). Or the q itself, or that of each tensor.
    selection : {"auto", "validation", "output"}
        By what a search chooses: the `score` given to `fit`, or the change of the outputs on `batches`, which needs no
        labels. "auto" takes the score where there is one.
    structured : bool
        Drop whole input columns instead of entries.
    exclude : sequence of str
        Parts of dotted names, or patterns, whose tensors stay as fine-tuned: the head.
    masks : int
        Random masks over which the change of the outputs is averaged; of three and more the one farthest from the
        mean is left out. The pruned model has another mask than these.
    step : float, optional
        Of the coarse search; by default ``min(0.05, 5 (1 - rate))`` for q and 0.1 for eta.
    random_state : int

    Attributes
    ----------
    q_ : float, or dict of str to float
        The divisor of all tensors, or of each. 1 for the importance-based methods.
    eta_ : float or None
        Of the closed form.
    search_ : list of (float, float)
        Every candidate and its score, larger is better.
    names_ : list of str
        The tensors that are pruned.
    branch_ : str
        How q was chosen, in words.
    delta_stats_ : DeltaStats
        Of the delta before pruning.

    References
    ----------
    Deng et al., arXiv 2410.09344, sections 4.1, 4.3, 4.4 and appendix.

    Examples
    --------
    >>> base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> pruner = DeltaPruner(rate=0.5, method="dare").fit(base, tuned)
    >>> pruned = pruner.apply()
    """

    def __init__(
        self,
        *,
        rate: float = 0.99,
        method: str = "darex",
        rescale: Rescale = "auto",
        selection: str = "auto",
        structured: bool = False,
        exclude: Sequence[str] = HEADS,
        masks: int = 4,
        step: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.rate = rate
        self.method = method
        self.rescale = rescale
        self.selection = selection
        self.structured = structured
        self.exclude = exclude
        self.masks = masks
        self.step = step
        self.random_state = random_state

    def fit(
        self,
        base: nn.Module,
        tuned: nn.Module,
        *,
        score: Callable[[nn.Module], float] | None = None,
        batches: Iterable[Any] | None = None,
    ) -> DeltaPruner:
        """Take the delta and choose the divisor.

        Parameters
        ----------
        base, tuned : torch.nn.Module
            Before and after fine-tuning; neither is changed. Embeddings of `tuned` may have more rows.
        score : callable, optional
            ``score(model)`` on validation data, larger is better. It must not train the model.
        batches : iterable, optional
            Inputs of the model (tensor, tuple or mapping), for the outputs, the closed form and WANDA.

        Raises
        ------
        InputError
            An option out of range, or what the choice needs is not given.
        DataError
            The models do not belong together, or a weight is not finite.
        """
        self._check()
        self.tuned_ = tuned
        self.names_, self.weights_ = _deltas(base, tuned, self.exclude)
        self.delta_stats_: DeltaStats = delta_stats(
            {name: b for name, (b, _) in self.weights_.items()},
            {name: b + d for name, (b, d) in self.weights_.items()},
        )
        inputs = [] if batches is None else list(batches)
        self.columns_ = input_axes(tuned)
        self.eta_: float | None = None
        self.search_: list[tuple[float, float]] = []
        with training_mode(tuned, False):
            self._choose(score, inputs)
            self.norms_ = input_statistics(tuned, _needed(inputs), norm=True) if self.method == "wanda" else {}
        return self

    def transform(self) -> dict[str, Tensor]:
        """The pruned deltas by tensor, as sparse COO tensors in float32."""
        self._fitted()
        return {name: delta.to_sparse() for name, delta in self._pruned(self._masks(self._final_seed), self.q_).items()}

    def apply(self, model: nn.Module | None = None) -> nn.Module:
        """The pruned model: base plus pruned delta, the head as fine-tuned.

        Parameters
        ----------
        model : torch.nn.Module, optional
            A copy of the fine-tuned model to change in place; a new copy by default.
        """
        self._fitted()
        model = copy.deepcopy(self.tuned_) if model is None else model
        self._write(model, self._pruned(self._masks(self._final_seed), self.q_))
        return model

    @property
    def _final_seed(self) -> int:
        return mask_seed(self.random_state, 0)

    def _mask_seed(self, number: int) -> int:
        return mask_seed(self.random_state, 1, number)

    def _check(self) -> None:
        check_rates(self.rate, None)
        if self.method not in _METHODS:
            raise InputError(f"method: got {self.method!r}; {nearest(str(self.method), _METHODS)}")
        if self.selection not in ("auto", "validation", "output"):
            raise InputError(f"selection: got {self.selection!r}; it must be 'auto', 'validation' or 'output'")
        if isinstance(self.rescale, str) and self.rescale not in ("auto", "global", "layer", "gradient"):
            raise InputError(f"rescale: got {self.rescale!r}; it must be auto, global, layer, gradient, or numbers")
        if self.masks < 1:
            raise InputError(f"masks: got {self.masks}; at least 1")

    def _fitted(self) -> None:
        if not hasattr(self, "q_"):
            raise NotFittedError("DeltaPruner: call fit first")

    def _choose(self, score: Callable[[nn.Module], float] | None, inputs: list[Any]) -> None:
        p, low = self.rate, 1 - self.rate
        self.q_: float | dict[str, float]
        if self.method in ("magnitude", "wanda"):
            self.q_, self.branch_ = 1.0, f"{self.method}: the most important entries, not rescaled"
            return
        if self.method == "dare":
            self.q_, self.branch_ = low, f"dare: q = 1 - p = {low:g}"
            return
        if not isinstance(self.rescale, str):
            given = self.rescale.values() if isinstance(self.rescale, Mapping) else [self.rescale]
            for q in given:
                check_rates(p, float(q))
            self.q_ = self._spread(self.rescale) if isinstance(self.rescale, Mapping) else float(self.rescale)
            self.branch_ = "darex: q as given"
            return
        if self.delta_stats_.unchanged == 1 or p == 0:
            self.q_, self.branch_ = 1.0, "nothing to rescale: the delta is zero, or none of it is dropped"
            return
        decoder = is_decoder(self.tuned_)
        if self.rescale == "gradient":
            self.q_ = self._by_gradient(_needed(inputs))
            self.branch_ = "darex: q per layer by gradient on the outputs"
            return
        judge, chosen_by = self._judge(score, inputs, decoder)
        best = -np.inf
        if self.rescale != "layer":
            found = search(judge, low, 1.0, self.step or min(0.05, 5 * low))
            self.q_, self.search_, best = found.best, found.trials, found.score
            self.branch_ = f"darex: one q for all layers by {chosen_by}: {found.best:g}"
        if self.rescale == "layer" or (self.rescale == "auto" and not decoder and inputs):
            products = self._products(inputs)
            found = search(lambda eta: judge(self._analytic(products, eta)), 0.1, 1.5, self.step or 0.1)
            if found.score > best:
                self.eta_, self.search_ = found.best, found.trials
                self.q_ = self._analytic(products, found.best)
                self.branch_ = f"darex: q per layer in closed form, eta by {chosen_by}: {found.best:g}"

    def _judge(
        self, score: Callable[[nn.Module], float] | None, inputs: list[Any], decoder: bool
    ) -> tuple[Callable[[Any], float], str]:
        """What a candidate q is judged by, larger is better, and its name."""
        selection = ("validation" if score is not None else "output") if self.selection == "auto" else self.selection
        work = copy.deepcopy(self.tuned_).eval()
        count = 1 if decoder or selection == "validation" else self.masks
        masks = [self._masks(self._mask_seed(number)) for number in range(count)]
        if selection == "validation":
            if score is None:
                raise InputError("score: selection by validation needs one; or choose selection='output' with batches")

            def by_score(q: Any) -> float:
                self._write(work, self._pruned(masks[0], q))
                value = float(score(work))
                if not np.isfinite(value):
                    raise DataError(f"score: gave {value} for q = {q}")
                return value

            return by_score, "validation"
        _needed(inputs)
        with torch.no_grad():
            outputs = [outputs_before(outputs_of(self.tuned_, batch, decoder), batch, decoder) for batch in inputs]

        def by_output(q: Any) -> float:
            changes = []
            for mask in masks:
                self._write(work, self._pruned(mask, q))
                with torch.no_grad():
                    parts = [
                        before.change(outputs_of(work, batch, decoder))
                        for batch, before in zip(inputs, outputs, strict=True)
                    ]
                changes.append(float(torch.stack(parts).mean()))
            if len(changes) > 2:
                changes.remove(max(changes, key=lambda change: abs(change - np.mean(changes))))
            return -float(np.mean(changes))

        return by_output, "the change of the outputs"

    def _masks(self, seed: int) -> dict[str, Tensor]:
        """Which entries of each delta are kept, for the methods that draw them."""
        if self.method in ("magnitude", "wanda"):
            return {}
        return {
            name: keep_mask(
                seed, name, delta.shape, 1 - self.rate, self.columns_.get(name) if self.structured else None
            ).to(delta.device)
            for name, (_, delta) in self.weights_.items()
        }

    def _pruned(self, masks: Mapping[str, Tensor], q: float | Mapping[str, float]) -> dict[str, Tensor]:
        """Pruned deltas of all tensors, in the shape of the base's."""
        pruned = {}
        for name, (_, delta) in self.weights_.items():
            if name in masks:
                pruned[name] = delta.where(masks[name], 0) / (q[name] if isinstance(q, Mapping) else q)
            elif self.method == "wanda" and name in self.norms_:
                flat = delta if self.columns_[name] == 1 else delta.T
                kept = importance_delta(flat, self.rate, act_norm=self.norms_[name])
                pruned[name] = kept if self.columns_[name] == 1 else kept.T
            else:
                pruned[name] = importance_delta(delta, self.rate)
        return pruned

    @torch.no_grad()
    def _write(self, model: nn.Module, pruned: Mapping[str, Tensor]) -> None:
        for name, delta in pruned.items():
            parameter, (base, _) = model.get_parameter(name), self.weights_[name]
            (parameter[: len(base)] if base.ndim else parameter).copy_(base + delta)

    def _products(self, inputs: list[Any]) -> dict[str, Tensor]:
        """c = D x for each linear layer, (out, in), with the delta of its bias as one more column."""
        means = input_statistics(self.tuned_, _needed(inputs), norm=False)
        products = {}
        for name, mean in means.items():
            if name not in self.weights_:
                continue
            delta = self.weights_[name][1]
            c = (delta if self.columns_[name] == 1 else delta.T) * mean.to(delta)
            bias = name.removesuffix("weight") + "bias"
            products[name] = torch.cat([c, self.weights_[bias][1][:, None]], 1) if bias in self.weights_ else c
        if not products:
            raise InputError("rescale: the closed form needs linear layers among the pruned; take rescale='global'")
        return products

    def _analytic(self, products: Mapping[str, Tensor], eta: float) -> dict[str, float]:
        return self._spread({name: float(analytic_q(c, self.rate, eta).mean()) for name, c in products.items()})

    def _spread(self, known: Mapping[str, float]) -> dict[str, float]:
        """A q for every tensor: biases that of their weight, others the mean."""
        mean = float(np.mean(list(known.values())))
        return {
            name: float(known.get(name, known.get(name.removesuffix("bias") + "weight", mean))) for name in self.names_
        }

    def _by_gradient(self, inputs: list[Any]) -> dict[str, float]:
        low = 1 - self.rate
        masked = self._pruned(self._masks(self._mask_seed(0)), 1.0)
        layers = [name for name in self.columns_ if name in masked]
        if not layers:
            raise InputError("rescale: 'gradient' needs linear layers among the pruned; take rescale='global'")
        device = next(iter(masked.values())).device
        coefficients = torch.full((len(layers),), 1e-4, device=device, requires_grad=True)
        optimizer = torch.optim.AdamW([coefficients], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        held = dict(self.tuned_.named_parameters())

        def loss(batch: Any) -> Tensor:
            q = coefficients.abs() + low
            by_name = dict(zip(layers, q, strict=True))
            weights = {}
            for name, (base, _) in self.weights_.items():
                divisor = by_name.get(name, by_name.get(name.removesuffix("bias") + "weight", q.mean()))
                new = (base + masked[name] / divisor).to(held[name].dtype)
                weights[name] = torch.cat([new, held[name][len(base) :]]) if new.shape != held[name].shape else new
            after = logits_of(_call(self.tuned_, weights, batch)).float()
            with torch.no_grad():
                before = outputs_before(logits_of(run(self.tuned_, batch)).float(), batch, top=True)
            return before.change(after)

        best, waited, chosen = float("inf"), 0, coefficients.detach().clone()
        with torch.enable_grad():
            for number in range(200):
                if number % 10 == 0:  # looked at every 10 steps; 5 looks without gain end it
                    with torch.no_grad():
                        value = float(torch.stack([loss(batch) for batch in inputs]).mean())
                    self.search_.append((float(number), -value))
                    if value < best:
                        best, waited, chosen = value, 0, coefficients.detach().clone()
                    else:
                        waited += 1
                    if waited >= 5:
                        break
                optimizer.zero_grad()
                value_now = loss(inputs[number % len(inputs)])
                (coefficients.grad,) = torch.autograd.grad(value_now, [coefficients])
                optimizer.step()
                schedule.step()
        return self._spread(dict(zip(layers, (chosen.abs() + low).tolist(), strict=True)))


def _needed(inputs: list[Any]) -> list[Any]:
    if not inputs:
        raise InputError("batches: are needed for this choice; give inputs of the model, labels are not used")
    return inputs


def is_decoder(model: nn.Module) -> bool:
    """Whether a model is a causal language model of `transformers`."""
    config = getattr(model, "config", None)
    generates: Any = getattr(model, "can_generate", None)
    return config is not None and not getattr(config, "is_encoder_decoder", False) and bool(generates and generates())


def _deltas(
    base: nn.Module, tuned: nn.Module, exclude: Sequence[str]
) -> tuple[list[str], dict[str, tuple[Tensor, Tensor]]]:
    """Base weights and deltas in float32 by the first name of each parameter; rows that only `tuned` has left out."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in tuned.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    named = dict(tuned.named_parameters())
    decoder = is_decoder(tuned)
    kept = {
        name for name in prunable([n for names in aliases.values() for n in names], decoder=decoder, exclude=exclude)
    }
    names = [name for name, parameter in named.items() if all(other in kept for other in aliases[id(parameter)])]
    if not names:
        raise InputError("exclude: leaves no tensor to prune")
    own, weights = dict(base.named_parameters()), {}
    before = {name: own[other] for name, other in in_names_of(own, named).items()}
    names = [name for name in names if name in before or not is_own_part(name, before)]  # new heads stay as they are
    for name in names:
        if name not in before:
            raise DataError(f"base: has no {name!r}; exclude it if fine-tuning added it; {nearest(name, before)}")
        old, new = before[name].detach(), named[name].detach()
        grown = old.ndim and new.ndim == old.ndim and new.shape[1:] == old.shape[1:] and len(new) > len(old)
        if old.shape != new.shape and not (grown and old.ndim == 2):
            raise DataError(f"base: {name!r} has shape {tuple(old.shape)}, tuned {tuple(new.shape)}")
        if not new.is_floating_point():
            raise InputError(f"tuned: {name!r} has dtype {new.dtype}; dequantise the weights first")
        shared = new[: len(old)] if old.ndim else new
        delta = shared.float() - old.to(new.device).float()
        if not torch.isfinite(delta).all():
            raise DataError(f"tuned: {name!r} minus base is not finite")
        weights[name] = (old.to(new.device).float(), delta)
    return names, weights


def _call(model: nn.Module, weights: Mapping[str, Tensor], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return functional_call(model, dict(weights), (), dict(batch))
    return functional_call(model, dict(weights), batch if isinstance(batch, tuple) else (batch,))
