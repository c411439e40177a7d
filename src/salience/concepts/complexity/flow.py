"""Where features flow, how redundant they are, and what noise does to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from salience.concepts.complexity.decoding import features_of, v_information, varies
from salience.concepts.complexity.layers import PENULTIMATE, layer_activations, pooled_to_grid
from salience.concepts.complexity.residuals import residual_sums
from salience.concepts.extractors import ConceptExtractor
from salience.errors import InputError, nearest
from salience.features.attribution import device_of, images_and_labels
from salience.model.at import training_mode
from salience.model.batches import map_batches

MEASURES = ("cka", "information")


@dataclass
class ResidualFlow:
    """How much of each of k features the two paths of each of L residual blocks carry.

    Attributes
    ----------
    blocks : tuple of str
    skip, branch : array (L, k)
        Linear CKA or `I_V` of the path around the block, and of the path through it; NaN for dead features.
    """

    blocks: tuple[str, ...]
    skip: Float[np.ndarray, "L k"]
    branch: Float[np.ndarray, "L k"]


def feature_cka(A: Any, z: Any) -> Float[np.ndarray, " k"]:
    """Linear CKA of a representation and each single feature.

        CKA(A, z_i) = |A^T z_i|^2 / (|A^T A|_F |z_i|^2),    columns of A and z centred

    Parameters
    ----------
    A : (n, d)
    z : (n, k)

    Returns
    -------
    array (k,)
        In 0..1; NaN where the feature or all of A does not vary. A rotation or a scale of A does not change it.
    """
    A, z = features_of("A", A), features_of("z", z)
    if len(A) != len(z):
        raise InputError(f"A and z: have {len(A)} and {len(z)} rows; they must be of the same images")
    live = varies(z)
    A, z = A - A.mean(0), z - z.mean(0)
    gram = A.T @ A if A.shape[1] <= len(A) else A @ A.T
    size = np.linalg.norm(gram) * (z**2).sum(0)
    return np.where(live & (size > 0), ((A.T @ z) ** 2).sum(0) / np.where(size > 0, size, 1), np.nan)


def residual_paths(
    model: nn.Module, x: Any, *, blocks: Sequence[str] | None = None, grid: int = 4, batch_size: int = 64
) -> dict[str, tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
    """What goes around and what goes through each residual block, maps averaged to `grid` x `grid` and flattened.

    Residual sums are found by watching a pass (`residual_sums`), whatever the family: ResNets of `transformers` or
    others, with or without a projection on the skip path, and transformers, which have two sums a layer.

    Parameters
    ----------
    model : torch.nn.Module
    x : Tensor, Dataset or DataLoader
    blocks : sequence of str, optional
        Some of them, by the module that makes the sum.

    Returns
    -------
    dict of str to (skip, branch)

    Raises
    ------
    InputError
        The network has no residual sum, or none of that name.
    """
    device = device_of(model)

    def both(batch: Any) -> dict[str, Tensor]:
        sums = residual_sums(model, images_and_labels(batch, device)[0])
        if not sums:
            raise InputError(f"model: {type(model).__name__} has no residual blocks, where a path around is added to "
                             "one through layers with weights")  # fmt: skip
        found = {one.name: one for one in sums}
        for name in blocks or ():
            if name not in found:
                raise InputError(f"blocks: there is no residual block {name!r}; {nearest(name, found)}")
        return {
            f"{path} {name}": pooled_to_grid(getattr(found[name], path), grid, name).float()
            for name in blocks or found for path in ("skip", "branch")
        }  # fmt: skip

    with training_mode(model, False), torch.no_grad():
        parts = map_batches(both, x, batch_size=batch_size)
    names = [key.removeprefix("skip ") for key in parts if key.startswith("skip ")]
    return {name: (parts[f"skip {name}"], parts[f"branch {name}"]) for name in names}


def residual_flow(
    model: nn.Module,
    x: Any,
    z: Any,
    *,
    measure: str = "cka",
    blocks: Sequence[str] | None = None,
    held_out: Bool[np.ndarray, " n"] | None = None,
    grid: int = 4,
    batch_size: int = 64,
) -> ResidualFlow:
    """How much of each feature travels around, and how much through, each residual block.

    Parameters
    ----------
    model : torch.nn.Module
    x : Tensor, Dataset or DataLoader of n images
    z : (n, k)
        Features of these images.
    measure : {"cka", "information"}
        Linear CKA of the path's activations and the feature, or `I_V` out of sample (the paper's replication).
    blocks : sequence of str, optional
        By default all that are found.
    held_out : boolean array (n,), optional
        For "information": the rows to measure on, the others fit the decoder. By default every third.

    Returns
    -------
    ResidualFlow

    Raises
    ------
    InputError
        Options out of range, or as in `residual_paths` and `v_information`.

    Notes
    -----
    Source: section 4.2 of arXiv 2407.06076. How maps are reduced before CKA is not told there; ours is as for `K`.
    """
    if measure not in MEASURES:
        raise InputError(f"measure: got {measure!r}; it must be one of {', '.join(map(repr, MEASURES))}")
    z = features_of("z", z)
    test = np.arange(len(z)) % 3 == 2 if held_out is None else np.asarray(held_out)
    if test.shape != (len(z),) or test.dtype != bool or not 0 < test.sum() < len(z):
        raise InputError(f"held_out: must say yes or no for each of the {len(z)} rows, and both at least once")
    paths = residual_paths(model, x, blocks=blocks, grid=grid, batch_size=batch_size)
    carried = [
        [feature_cka(path, z) if measure == "cka" else _information(path, z, test) for path in pair]
        for pair in paths.values()
    ]
    both = np.array(carried)
    return ResidualFlow(tuple(paths), both[:, 0], both[:, 1])


def _information(path: Float[Tensor, "n d"], z: Float[np.ndarray, "n k"], test: Bool[np.ndarray, " n"]) -> np.ndarray:
    live = varies(z[test]) & varies(z[~test])
    scaled = z[:, live] / z[test][:, live].std(0)
    rows = torch.from_numpy(test)
    found = np.full(z.shape[1], np.nan)
    found[live] = v_information(path[~rows], scaled[~test], path[rows], scaled[test])
    return found


def redundancy(A: Any, z: Any, n_masks: int = 20, random_state: int = 0) -> Float[np.ndarray, " k"]:
    """How much of a feature's CKA with the layer is left when half of the neurons are cut.

        E_m[ CKA(A m, z) / CKA(A, z) ],    m a random binary mask over neurons

    Parameters
    ----------
    A : (n, p)
        Penultimate activations.
    z : (n, k)
    n_masks : int
        A neuron stays with probability 1/2 (ours; the share is not told).

    Returns
    -------
    array (k,)
        About 1 and above where every part of the layer tells the feature; NaN for dead ones.

    Raises
    ------
    InputError
        Fewer than one mask, or a layer of one neuron.
    """
    A = features_of("A", A)
    if n_masks < 1 or A.shape[1] < 2:
        raise InputError(f"n_masks and A: got {n_masks} masks and {A.shape[1]} neurons; at least 1 and 2 are needed")
    whole, rng = feature_cka(A, z), np.random.default_rng(random_state)
    total = np.zeros_like(whole)
    for _ in range(n_masks):
        mask = rng.random(A.shape[1]) < 0.5
        mask[rng.integers(A.shape[1])] |= not mask.any()
        total += feature_cka(A[:, mask], z)
    return total / n_masks / np.where(whole > 0, whole, np.nan)


def noise_sensitivity(
    model: nn.Module,
    x: Any,
    extractor: ConceptExtractor,
    sigmas: Sequence[float] = (0.01, 0.1, 0.5),
    *,
    draws: int = 100,
    layer: str = PENULTIMATE,
    batch_size: int = 64,
    random_state: int = 0,
) -> dict[float, Float[np.ndarray, " k"]]:
    """How much each feature shakes when the image does.

        E_x[ Var_noise z_i(x + e) ],    e ~ N(0, sigma^2) at every pixel

    Divide by the feature's variance over images to compare features.

    Parameters
    ----------
    model : torch.nn.Module
    x : Tensor, Dataset or DataLoader
        Images as the model takes them; `sigma` is in their units.
    extractor : ConceptExtractor
        Fitted at the layer; of `layer`'s activations.
    sigmas : sequence of float
    draws : int
        For each image.

    Returns
    -------
    dict of float to array (k,)
        By sigma.

    Raises
    ------
    InputError
        A sigma that is negative, or fewer than two draws.
    """
    if draws < 2 or not sigmas or min(sigmas) < 0:
        raise InputError(f"draws and sigmas: got {draws} and {list(sigmas)}; at least 2 draws, sigmas of at least 0")
    device = device_of(model)
    generator = torch.Generator().manual_seed(random_state)

    def codes(pixels: Tensor) -> Float[Tensor, "b k"]:
        seen = layer_activations(model, pixels, [layer], grid=1, batch_size=max(1, len(pixels)))
        return extractor.encode(seen.layers[layer]).double()

    def spread(batch: Any) -> dict[str, Tensor]:
        pixels = images_and_labels(batch, device)[0]
        still, found = codes(pixels), {}
        for sigma in sigmas:
            first, second = torch.zeros_like(still), torch.zeros_like(still)
            for _ in range(draws):  # sums of differences to the still image, which rounding does not harm
                noise = torch.randn(pixels.shape, generator=generator).to(pixels)
                change = codes(pixels + sigma * noise) - still
                first, second = first + change, second + change.square()
            found[str(float(sigma))] = (second - first.square() / draws) / (draws - 1)
        return found

    with training_mode(model, False), torch.no_grad():
        found: Mapping[str, Tensor] = map_batches(spread, x, batch_size=batch_size)
    return {float(sigma): rows.mean(0).numpy() for sigma, rows in found.items()}
