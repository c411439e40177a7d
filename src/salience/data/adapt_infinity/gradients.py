"""Sample vectors: the gradient of every sample's loss, randomly projected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from salience.data.adapt_infinity.answers import answer_losses
from salience.errors import InputError, nearest
from salience.model.at import training_mode
from salience.model.batches import map_batches

METHODS = ("sgd", "sign", "adam", "mezo")
Losses = Callable[[Callable[..., Any], Any], Tensor]
_BLOCK = 1024  # parameters whose signs are drawn at once
_CACHED = 2**28  # bytes of signs that are kept between calls
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_STEP = 1e-3  # of the two-point estimate


class RandomProjection:
    r"""Project vectors of any length by random signs, so that inner products are kept to about ``1 / sqrt(dim)``.

        P g = S g / sqrt(dim),      S_ij = +1 or -1 with equal chance

    One object is one matrix, whatever comes in which batch and at which step of a stream: vectors that were projected
    by different matrices have nothing in common.

    Parameters
    ----------
    dim : int
        Numbers to project to.
    random_state : int
        Decides the matrix.

    Raises
    ------
    InputError
        `dim` is below 1 or `random_state` below 0.

    Notes
    -----
    Source: TRAK's projector as the authors of Adapt-infinity use it (8192 dimensions, seed 0). Here sums are in
    float32 whatever the gradients are: half precision overflows.
    """

    def __init__(self, dim: int = 8192, random_state: int = 0) -> None:
        for name, value, least in (("dim", dim, 1), ("random_state", random_state, 0)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        self.dim, self.random_state = int(dim), int(random_state)
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, vectors: Float[Tensor, "n p"]) -> Float[Tensor, "n dim"]:
        """The projected rows, float32 on the device of `vectors`."""
        found = torch.zeros(len(vectors), self.dim, device=vectors.device)
        for block, start in enumerate(range(0, vectors.shape[1], _BLOCK)):
            part = vectors[:, start : start + _BLOCK].float()
            found += part @ torch.from_numpy(self._signs(block))[: part.shape[1]].to(part)
        return found / math.sqrt(self.dim)

    def _signs(self, block: int) -> np.ndarray:
        if block in self._kept:
            return self._kept[block]
        bits = np.random.default_rng([self.random_state, block]).bytes(_BLOCK * -(-self.dim // 8))
        rows = np.unpackbits(np.frombuffer(bits, np.uint8).reshape(_BLOCK, -1), axis=1, count=self.dim)
        signs = 2 * rows.astype(np.int8) - 1
        if (len(self._kept) + 1) * signs.size <= _CACHED:
            self._kept[block] = signs
        return signs


class GradientFeatures(NamedTuple):
    """Projected gradients of unit length, and the length of each gradient before projection.

    Both are NaN for a sample whose gradient is not finite, such as one without an answer; a gradient of 0 stays 0.
    """

    vectors: Float[Tensor, "n dim"]
    norms: Float[Tensor, " n"]


def in_layers(*numbers: int) -> Callable[[str], bool]:
    """A choice of parameters: those whose name holds one of the numbers as its first whole number."""

    def chosen(name: str) -> bool:
        found = re.search(r"\d+", name)
        return found is not None and int(found[0]) in numbers

    return chosen


def gradient_features(
    model: nn.Module, data: Any, *, params: Callable[[str], bool] | None = None,
    projection: RandomProjection | None = None, method: str = "sgd", loss_fn: Losses | None = None,
    optimizer: torch.optim.Optimizer | None = None, perturbations: int = 8, batch_size: int = 8,
    vectorize: bool = False,
) -> GradientFeatures:  # fmt: skip
    r"""The vector of every sample: where its loss would move the model, projected.

        v_i = P u_i / ||P u_i||,      u_i = g_i = d l_i / d theta             "sgd"
                                      u_i = sign(g_i)                         "sign"
                                      u_i = m_i / sqrt(v_i + eps)             "adam", m and v one step on
                                      u_i = mean_k (g_i . z_k) z_k            "mezo", g_i . z_k from two losses

    Supported: any `torch.nn.Module` with a loss per sample: classifiers, causal language models and image-text models
    of transformers, with or without adapters.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile; parameters, their gradients and flags are left as they were.
    data : Dataset, sequence of samples, or DataLoader
        Samples as mappings with ``labels`` (-100 for tokens of no answer) or as tuples that end with the label.
    params : callable, optional
        Takes a parameter's name and says whether its gradient belongs to the vector; all that require gradients by
        default. The paper takes the adapters of one late layer: `in_layers`.
    projection : RandomProjection, optional
        Give the same object (or the same seed) at every step; by default to 8192 numbers with seed 0.
    method : {"sgd", "sign", "adam", "mezo"}
        "mezo" needs no backward pass, but two forward passes per perturbation.
    loss_fn : callable, optional
        ``loss_fn(model, batch) -> (b,)``, by default the mean loss of the answer's tokens.
    optimizer : torch.optim.Adam or AdamW, optional
        Whose state "adam" takes.
    perturbations : int
        Directions z_k of "mezo", the same ones for every sample. One, drawn afresh for every sample, as in the authors'
        code, makes vectors nearly orthogonal whatever the gradients are.
    batch_size : int
        Samples whose gradients are held at once.
    vectorize : bool
        Take the gradients of a batch by `torch.func.vmap` in place of one backward pass each: faster for small models,
        impossible for models that branch on their inputs.

    Returns
    -------
    GradientFeatures
        On the CPU.

    Raises
    ------
    InputError
        No parameter is chosen, an unknown method, or an optimizer without the state that "adam" needs.

    Notes
    -----
    Source: arXiv 2410.10636, section on pseudo-skill clusters; details (kinds of gradients, eps inside the root and no
    bias correction for "adam") as in the authors' code. Vectors always have unit length here; there only if they come
    from a single file.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if isinstance(perturbations, bool) or not isinstance(perturbations, int) or perturbations < 1:
        raise InputError(f"perturbations must be a whole number of at least 1, not {perturbations!r}")
    chosen = _chosen(model, params)
    project, losses = projection or RandomProjection(), loss_fn or answer_losses
    moments = _moments(optimizer, chosen) if method == "adam" else None
    directions = _directions(chosen, perturbations, project.random_state) if method == "mezo" else None
    device = next(iter(chosen.values())).device

    def one_batch(batch: Any) -> tuple[Tensor, Tensor]:
        batch = on_device(batch, device)
        if directions is not None:
            rows = _zeroth_order(model, chosen, losses, batch, directions)
        else:
            take = _vectorized if vectorize else _one_by_one
            rows = take(model, chosen, losses, batch)
        norms = rows.double().norm(dim=1)
        if method == "sign":
            rows = rows.sign()
        if moments is not None:
            first, second = moments
            rows = (_BETA1 * first + (1 - _BETA1) * rows) / (_BETA2 * second + (1 - _BETA2) * rows**2 + _EPS).sqrt()
        vectors = project(rows)
        lengths = vectors.norm(dim=1, keepdim=True)
        vectors = torch.where(lengths > 0, vectors / lengths, vectors)
        bad = ~(norms.isfinite() & vectors.isfinite().all(dim=1))
        return vectors.masked_fill(bad[:, None], math.nan).cpu(), norms.masked_fill(bad, math.nan).cpu()

    with training_mode(model, False):
        return GradientFeatures(*map_batches(one_batch, data, batch_size=batch_size))


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch of plain containers on a device; a list of samples becomes a batch."""
    if isinstance(batch, list) and batch and not isinstance(batch[0], Tensor):
        batch = default_collate(batch)
    if hasattr(batch, "items"):
        batch = dict(batch)
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)


def _chosen(model: nn.Module, params: Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not trainable:
        raise InputError(f"model: no parameter of {type(model).__name__} requires gradients")
    chosen = {name: value for name, value in trainable.items() if params is None or params(name)}
    if not chosen:
        raise InputError(f"params chooses none of the {len(trainable)} parameters; {nearest('', trainable)}")
    return chosen


def _flat(parts: Any, rows: int) -> Float[Tensor, "n p"]:
    return torch.cat([part.detach().reshape(rows, -1).float() for part in parts], dim=1)


def _one_by_one(model: nn.Module, chosen: dict[str, nn.Parameter], losses: Losses, batch: Any) -> Float[Tensor, "n p"]:
    """One backward pass per sample: works for any model."""
    found = []
    for row in range(_rows(batch)):
        one = tree_map(lambda value, row=row: value[row : row + 1] if isinstance(value, Tensor) else value, batch)
        with torch.enable_grad():
            value = losses(model, one).sum()
            grads = torch.autograd.grad(value, list(chosen.values()), allow_unused=True, materialize_grads=True)
        found.append(_known(_flat(grads, 1), value.detach()[None]))
    return torch.cat(found)


def _vectorized(model: nn.Module, chosen: dict[str, nn.Parameter], losses: Losses, batch: Any) -> Float[Tensor, "n p"]:
    values = {name: value.detach() for name, value in chosen.items()}

    def loss(values: dict[str, Tensor], sample: Any) -> Tensor:
        return losses(_with(model, values), tree_map(lambda value: value[None], sample)).sum()

    batch = tuple(batch) if isinstance(batch, list) else batch
    grads, value = vmap(grad_and_value(loss), in_dims=(None, 0))(values, batch)
    return _known(_flat(grads.values(), len(value)), value)


def _known(rows: Float[Tensor, "n p"], losses: Float[Tensor, " n"]) -> Float[Tensor, "n p"]:
    """NaN where the loss is no number: its gradient may be 0 all the same."""
    return rows.masked_fill(~losses.isfinite()[:, None], math.nan)


def _zeroth_order(
    model: nn.Module, chosen: dict[str, nn.Parameter], losses: Losses, batch: Any, directions: Float[Tensor, "k p"]
) -> Float[Tensor, "n p"]:
    """``(l(theta + eps z) - l(theta - eps z)) / (2 eps)`` along every direction, for a whole batch at a time."""
    sizes = [value.numel() for value in chosen.values()]
    slopes = []
    with torch.no_grad():
        for direction in directions:
            z = {name: part.view_as(value).to(value)
                 for (name, value), part in zip(chosen.items(), direction.split(sizes))}  # fmt: skip
            up, down = (
                losses(_with(model, {name: value + side * z[name] for name, value in chosen.items()}), batch)
                for side in (_STEP, -_STEP)
            )
            slopes.append((up.double() - down.double()) / (2 * _STEP))
    return torch.stack(slopes, dim=1).float() @ directions / len(directions)


def _with(model: nn.Module, values: dict[str, Tensor]) -> Callable[..., Any]:
    """The model as a function with other values of some parameters."""
    return partial(_call, model, values)


def _call(model: nn.Module, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(model, values, args, kwargs)


def _directions(chosen: dict[str, nn.Parameter], count: int, seed: int) -> Float[Tensor, "k p"]:
    total = sum(value.numel() for value in chosen.values())
    drawn = np.random.default_rng([seed, 1 << 40]).standard_normal((count, total), dtype=np.float32)
    return torch.from_numpy(drawn).to(next(iter(chosen.values())).device)


def _moments(optimizer: torch.optim.Optimizer | None, chosen: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Running means of gradients and of their squares, in the order of the vector."""
    if optimizer is None:
        raise InputError("method 'adam' needs an optimizer whose state it takes")
    found = []
    for name, value in chosen.items():
        state = optimizer.state.get(value, {})
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            raise InputError(f"optimizer: {type(optimizer).__name__} holds no moments of {name!r}; it must be an Adam "
                             "that has made a step")  # fmt: skip
        found.append((state["exp_avg"].detach().reshape(-1).float(), state["exp_avg_sq"].detach().reshape(-1).float()))
    first, second = zip(*found)
    return torch.cat(first), torch.cat(second)


def _rows(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch
    return len(next(value for value in values if isinstance(value, Tensor)))
