"""CRAFT: concepts of a class from crops of its images, their parts, how much each matters, and where it is.

    crops X  ->  A = mean_positions h_l(X)  ->  A ~ U V (non-negative)      the concepts, rows of V
    image x  ->  U(x), position by position  ->  total Sobol indices        how much
    crops with U_i in the upper tenth  ->  the same at an earlier layer     what a concept is made of
    dU_i/dx through the least-squares problem  ->  any attribution          where

Source: Fel, Picard, Béthune, Boissin, Vigouroux, Colin, Cadène and Serre, CVPR 2023 (arXiv 2211.10154), and the
authors' code. Recursion and concept attribution maps, which the published torch code lacks, follow the paper's text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, Subset, TensorDataset

from salience.concepts.concept_model import Codes, ConceptModel, ConceptScores, Images, pooled
from salience.concepts.craft.crops import Crops, make_crops, pixels_of
from salience.concepts.extractors import NMFConcepts
from salience.concepts.importance import sobol_importance
from salience.errors import InputError, NothingToDo
from salience.features.attribution import device_of, images_and_labels, spatial_layers, target_classes
from salience.features.normgrad.saliency import GradCAM, Gradient
from salience.model.at import capture, logits_of, replace, run, training_mode
from salience.model.at import layer as layer_called
from salience.model.batches import map_batches

MAPS = ("gradcam", "gradient", "code")


class Craft(BaseEstimator):
    """Concepts of one class, by factorising what a network makes of crops.

        min_{U >= 0, V >= 0} 1/2 |A - U V|^2,    A = mean_positions h_l(crops)

    Parameters
    ----------
    layer : str, optional
        Where to look: a layer whose output is never negative, as behind a ReLU. By default the last such layer that
        still has positions.
    n_concepts : int
        k.
    patch_size, stride : int, optional
        Of crops, in pixels; see `make_crops`.
    crops : {"grid", "random"}
    crops_per_image : int
        Of random crops.
    max_iter, tol
        Of the factorisation; see `nmf`.
    batch_size : int
        Crops or images at once; halved when memory runs out.
    memory : int
        Bytes of activations to hold; more go to a temporary file on disk.
    random_state : int
        Of random crops and of the factorisation's beginning.

    Attributes
    ----------
    components_ : Tensor (k, p)
        The dictionary: a concept a row.
    crops_ : Crops
        What the concepts were found in.
    crop_codes_ : Tensor (m, k)
        How much of each concept each crop holds.
    concepts_ : ConceptModel
        The network seen through them.
    kept_ : integer array
        Which of the given images were used: those that the model predicts as the class.
    layer_ : str
    relative_error_ : float
        ``|A - U V| / |A|``: what concepts leave out.

    Notes
    -----
    Source: Fel et al., CVPR 2023 (arXiv 2211.10154), section 3. Defaults are those of the authors' code.
    """

    def __init__(
        self,
        *,
        layer: str | None = None,
        n_concepts: int = 20,
        patch_size: int | None = None,
        stride: int | None = None,
        crops: str = "grid",
        crops_per_image: int = 10,
        max_iter: int = 200,
        tol: float = 1e-4,
        batch_size: int = 64,
        memory: int = 2**30,
        random_state: int = 0,
    ) -> None:
        self.layer, self.n_concepts, self.patch_size, self.stride = layer, n_concepts, patch_size, stride
        self.crops, self.crops_per_image, self.max_iter, self.tol = crops, crops_per_image, max_iter, tol
        self.batch_size, self.memory, self.random_state = batch_size, memory, random_state

    def fit(self, model: nn.Module, images: Any, class_id: int | None = None) -> Craft:
        """Find the concepts.

        Parameters
        ----------
        model : torch.nn.Module
            A classifier; left as it was.
        images : Tensor (n, channel, height, width) or Dataset
            A data set's items are images or (image, label). Some hundreds give steady concepts.
        class_id : int, optional
            Use only the images that the model predicts as this class, whatever their label. By default all are.

        Raises
        ------
        InputError
            An option out of range, no such layer, or more concepts than crops or channels.
        DataError
            The layer gives negative values.
        NothingToDo
            No images, or none that is predicted as the class.
        """
        if not len(images):
            raise NothingToDo("images: there are none")
        kept = np.arange(len(images))
        if class_id is not None:
            kept = np.flatnonzero(predicted_classes(model, images, self.batch_size)[0].numpy() == class_id)
            if not len(kept):
                raise NothingToDo(f"images: the model predicts none of {len(images)} as class {class_id}")
        own: Any = images if len(kept) == len(images) else Subset(as_dataset(images), kept.tolist())
        crops = make_crops(own, patch_size=self.patch_size, stride=self.stride, kind=self.crops,
                           per_image=self.crops_per_image, random_state=self.random_state)  # fmt: skip
        layer = self.layer
        if layer is None:
            example = torch.stack([pixels_of(own, i) for i in range(min(2, len(own)))])
            layer = nonnegative_layers(model, example)[-1]
        self.kept_ = kept
        return self._factorize(model, layer, crops)

    def _factorize(self, model: nn.Module, layer: str, crops: Crops) -> Craft:
        extractor = NMFConcepts(n_concepts=self.n_concepts, max_iter=self.max_iter, tol=self.tol,
                                random_state=self.random_state)  # fmt: skip
        concepts = ConceptModel(model, layer, extractor)
        device = device_of(model)

        def encode(batch: Tensor) -> Tensor:
            with torch.no_grad():
                return pooled(concepts.activations(batch.to(device)))

        width = encode(crops[0][None]).shape[1]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "activations.npy" if 4 * width * len(crops) > self.memory else None
            activations = map_batches(encode, crops, batch_size=self.batch_size, out=out)
            extractor.fit(activations, device)
            del activations  # a memory map must let go of its file before the folder goes
        self.concepts_, self.layer_, self.crops_ = concepts, layer, crops
        self.components_, self.crop_codes_ = extractor.components_, extractor.codes_
        self.relative_error_ = extractor.relative_error_
        return self

    def transform(self, images: Any) -> Codes:
        """Codes of whole images, position by position: (n, height, width, k), (n, token, k) or (n, k)."""
        check_is_fitted(self)
        device = device_of(self.concepts_.model)
        with torch.no_grad():
            return map_batches(lambda batch: self.concepts_.encode(images_and_labels(batch, device)[0]), images,
                               batch_size=self.batch_size)  # fmt: skip

    def estimate_importance(
        self,
        images: Images,
        class_id: int,
        n_design: int = 32,
        estimator: str = "jansen",
        sampler: str = "halton",
        random_state: int | None = None,
    ) -> Float[np.ndarray, "n k"]:
        """Total Sobol index of each concept for each image; its mean over images is the concept's importance.

        Parameters as in `sobol_importance`.
        """
        check_is_fitted(self)
        return sobol_importance(
            self.concepts_, self.transform(images), images, class_id, n_design=n_design, estimator=estimator,
            sampler=sampler, random_state=random_state,
        )  # fmt: skip

    def attribution_maps(
        self, images: Images, concepts: Sequence[int] | None = None, method: str = "gradcam"
    ) -> Float[Tensor, "n m height width"]:
        """Where concepts are in images.

        Parameters
        ----------
        images : Tensor (n, channel, height, width)
        concepts : sequence of int, optional
            m of them; all by default.
        method : {"gradcam", "gradient", "code"}
            Grad-CAM at the layer or the largest gradient of a pixel, both of the concept's score `U_i(x)` by implicit
            differentiation; or the codes of the positions themselves, enlarged. Other attributions: `ConceptScores`.

        Raises
        ------
        InputError
            No such method or concept, or a layer without positions (for "gradient" none are needed).
        """
        check_is_fitted(self)
        chosen = list(range(len(self.components_))) if concepts is None else list(concepts)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self.components_):
            raise InputError(f"concepts: got {chosen}; there are 0..{len(self.components_) - 1}")
        if method not in MAPS:
            raise InputError(f"method: got {method!r}; it must be one of {', '.join(map(repr, MAPS))}")
        device = device_of(self.concepts_.model)
        if method == "code":
            codes = self.transform(images)
            if codes.ndim != 4:
                raise InputError(f"layer: {self.layer_!r} has no map of the image; choose method 'gradient'")
            maps = codes[..., chosen].movedim(-1, 1)
            return interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
        scores = ConceptScores(self.concepts_)
        attribution = Gradient(scores) if method == "gradient" else GradCAM(scores, f"concepts.model.{self.layer_}")
        return torch.cat([attribution.attribute(images.to(device), i, internal_batch_size=self.batch_size).cpu()
                          for i in chosen], 1)  # fmt: skip

    def refine(self, concept: int, layer: str | None = None, n_concepts: int = 5, quantile: float = 0.9) -> Craft:
        """What a concept is made of: factorise its crops anew, at an earlier layer.

            crops with U_i >= lambda,    lambda the 90th percentile of U_i

        Near the output classes collapse and with them concepts that an earlier layer still tells apart.

        Parameters
        ----------
        concept : int
        layer : str, optional
            By default the last non-negative layer of the next finer resolution.
        n_concepts : int
        quantile : float
            Of the concept's codes over the crops, above which a crop is taken.

        Returns
        -------
        Craft
            Of sub-concepts, fitted on these crops; `components_`, `crop_codes_` and all methods are as here.

        Raises
        ------
        InputError
            No such concept, an option out of range, no earlier layer, or too few crops for so many sub-concepts.
        """
        check_is_fitted(self)
        if not 0 <= concept < len(self.components_):
            raise InputError(f"concept: got {concept}; there are 0..{len(self.components_) - 1}")
        if not 0 <= quantile < 1:
            raise InputError(f"quantile: got {quantile}; it must be at least 0 and below 1")
        codes = self.crop_codes_[:, concept].double().numpy()
        chosen = np.flatnonzero((codes >= np.quantile(codes, quantile)) & (codes > 0))
        model = self.concepts_.model
        if layer is None:
            layer = earlier_layer(model, self.crops_[0][None], self.layer_)
        layer_called(model, layer)
        sub = Craft(**{**self.get_params(), "layer": layer, "n_concepts": n_concepts})
        sub.kept_ = self.kept_
        return sub._factorize(model, layer, self.crops_.take(chosen))


def predicted_classes(model: nn.Module, images: Any, batch_size: int) -> tuple[Tensor, Tensor]:
    """The predicted class of every image, and its probability."""
    device = device_of(model)

    def some(batch: Any) -> tuple[Tensor, Tensor]:
        logits = logits_of(model(images_and_labels(batch, device)[0]))
        logits = logits.mean((2, 3)) if logits.ndim == 4 else logits
        classes = target_classes(logits, None)
        return classes, logits.double().softmax(1).amax(1)

    with training_mode(model, False), torch.no_grad():
        return map_batches(some, images, batch_size=batch_size)


def as_dataset(images: Any) -> Dataset:
    """A tensor as a data set of its rows, anything else as it is."""
    return TensorDataset(images) if isinstance(images, Tensor) else images


def nonnegative_layers(model: nn.Module, images: Images) -> list[str]:
    """Layers that are never negative on `images`, from shallow to deep: the last one of each resolution.

    Only layers with positions that run once in a pass and whose output the prediction reads.

    Raises
    ------
    InputError
        The model has none, such as a transformer with GELU.
    """
    found = _nonnegative(model, images.to(device_of(model)))
    if not found:
        raise InputError(
            f"model: {type(model).__name__} has no layer whose output is a map and never negative; concepts by "
            "non-negative factorisation need one that ends in a ReLU"
        )
    return list(found.values())


def _nonnegative(model: nn.Module, images: Images, before: str = "") -> dict[tuple[int, int], str]:
    """The last such layer by resolution, of those that finish before the layer called `before`."""
    sizes = spatial_layers(model, images)
    names = list(sizes)
    names = names[: names.index(before)] if before in names else names
    found: dict[tuple[int, int], str] = {}
    with training_mode(model, False), torch.no_grad():
        with capture(model, names) as seen:
            logits = logits_of(run(model, (images,)))
        for name in reversed(names):
            usable = sizes[name] not in found and bool((seen[name] >= 0).all()) and bool((seen[name] > 0).any())
            if usable and _carries(model, name, images, logits):
                found[sizes[name]] = name
    return dict(reversed(found.items()))


def _carries(model: nn.Module, layer: str, images: Images, logits: Tensor) -> bool:
    """Whether the layer runs once, and the logits are others when it gives zeros."""
    runs = 0

    def zeros(output: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return torch.zeros_like(output)

    with replace(model, layer, zeros):
        changed = logits_of(run(model, (images,)))
    return runs == 1 and not torch.equal(changed, logits)


def earlier_layer(model: nn.Module, images: Images, layer: str) -> str:
    """The last never negative layer of a finer resolution than `layer`'s; of any where `layer` has no positions."""
    images = images.to(device_of(model))
    own = spatial_layers(model, images).get(layer)
    found = _nonnegative(model, images, layer)
    finer = [name for size, name in found.items() if own is None or size[0] * size[1] > own[0] * own[1]]
    if not finer:
        raise InputError(f"layer: there is no never negative layer of a finer resolution before {layer!r}; name one")
    return finer[-1]
