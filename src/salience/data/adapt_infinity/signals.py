"""The pool of scores, and all that a round of selection needs to know of its samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from salience.data.adapt_infinity.answers import answer_losses, answers, mean_over, split_batch
from salience.data.adapt_infinity.gradients import gradient_features, on_device
from salience.data.adapt_infinity.selector import Signals
from salience.errors import InputError
from salience.model.at import capture, training_mode
from salience.model.batches import map_batches

KINDS = ("nll", "el2n", "entropy", "image_grounding")
Blank = Callable[[Any], Any]
_LARGEST = 300.0  # logarithm of the grounding, so that sums of squares stay finite


def sample_scores(
    model: nn.Module, data: Any, *, kinds: Collection[str] = ("nll", "el2n", "entropy"), blank: Blank | None = None,
    batch_size: int = 32,
) -> dict[str, Float[Tensor, " n"]]:  # fmt: skip
    r"""Scores of every sample under the current model, from forward passes alone.

        nll              mean over answer tokens of -log p(y_t): the logarithm of the perplexity
        el2n             mean over answer tokens of ||onehot(y_t) - p_t||_2
        entropy          mean over all positions of -sum_v p_t(v) log p_t(v)
        image_grounding  PPL(answer | text) / PPL(answer | text, image); about 1: the image is not used

    Supported: classifiers, causal language models and image-text models, as `gradient_features`.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile.
    data : Dataset, sequence of samples, or DataLoader
        As in `gradient_features`.
    kinds : collection of str
        Which of the four. (The fifth of the paper's, the length of the gradient, comes with `gradient_features`.)
    blank : callable, optional
        Takes a batch and returns it without its images and with everything else the same; by default ``pixel_values``
        become 0. A sample that this does not change has no image, and its grounding is NaN.
    batch_size : int

    Returns
    -------
    dict of str to (n,) float64 Tensor
        NaN for a sample without an answer.

    Raises
    ------
    InputError
        An unknown score, or images that cannot be found.

    Notes
    -----
    Source: arXiv 2410.10636, the pool of scoring functions. Both perplexities are ``exp(nll)``, as in the paper; the
    authors' code exponentiates before it takes the mean over tokens in one of them. As there, the image is blanked
    rather than left out.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"kinds must be among {', '.join(KINDS)}, not {unknown or 'none'}")
    device = _device(model)

    def one_batch(batch: Any) -> dict[str, Tensor]:
        batch = on_device(batch, device)
        found = _forward_scores(model, batch)
        if "image_grounding" in kinds:
            without = (blank or _no_pixels)(batch)
            ratio = (answer_losses(model, without).double() - found["nll"]).clamp(max=_LARGEST).exp()
            found["image_grounding"] = ratio.masked_fill(~_changed(batch, without), float("nan"))
        return {kind: found[kind].double().cpu() for kind in kinds}

    with training_mode(model, False), torch.no_grad():
        return map_batches(one_batch, data, batch_size=batch_size)


def measure_samples(
    model: nn.Module, data: Any, *, blank: Blank | None = None, layer: str | None = None, batch_size: int = 32,
    **gradients: Any,
) -> Signals:  # fmt: skip
    """Vectors, scores and embeddings of samples under the current model, as `AdaptSelector.step` takes them.

    Parameters
    ----------
    model, data, batch_size
        As in `sample_scores`.
    blank : callable, optional
        See `sample_scores`; image grounding is scored if it is given, or the first sample has ``pixel_values``.
    layer : str, optional
        Whose activations are the embeddings, the mean over tokens; the final layer's hidden states in the paper.
        Without it redundancy is judged by the gradient vectors.
    **gradients
        Options of `gradient_features`, such as `params`, `projection`, `vectorize`.

    Returns
    -------
    Signals
        Scores "nll", "el2n", "entropy", "grad_norm", and "image_grounding" where there are images.
    """
    features = gradient_features(model, data, **{"batch_size": batch_size, **gradients})
    kinds = ["nll", "el2n", "entropy"]
    if blank is not None or _has_pixels(data):
        kinds.append("image_grounding")
    scores = sample_scores(model, data, kinds=kinds, blank=blank, batch_size=batch_size)
    scores["grad_norm"] = features.norms
    embeddings = None if layer is None else embed(model, data, layer, batch_size=batch_size).numpy()
    return Signals(features.vectors.numpy(), {name: value.numpy() for name, value in scores.items()}, embeddings)


def embed(model: nn.Module, data: Any, layer: str, *, batch_size: int = 32) -> Float[Tensor, "n d"]:
    """Activations of a layer for every sample, float32; the mean over tokens (without padding) where it has several."""
    device = _device(model)

    def one_batch(batch: Any) -> Tensor:
        batch = on_device(batch, device)
        with capture(model, layer) as captured:
            found = answers(model, batch)
        hidden = captured[layer].float()
        if hidden.ndim == 3:
            inputs, _ = split_batch(batch)
            mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            real = torch.ones(hidden.shape[:2], device=device) if mask is None else mask
            weights = real[..., None].to(hidden) if real.shape == hidden.shape[:2] else torch.ones_like(hidden[..., :1])
            hidden = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return hidden.reshape(len(found.labels), -1).cpu()

    with training_mode(model, False), torch.no_grad():
        return map_batches(one_batch, data, batch_size=batch_size)


def _forward_scores(model: nn.Module, batch: Any) -> dict[str, Float[Tensor, " b"]]:
    found = answers(model, batch)
    log_p = found.logits.log_softmax(dim=-1)
    p, target = log_p.exp(), found.labels.clamp(min=0)[..., None]
    right = p.gather(2, target)[..., 0]
    # ||onehot - p||^2 = sum p^2 - p_y^2 + (1 - p_y)^2
    error = ((p**2).sum(dim=-1) - right**2 + (1 - right) ** 2).clamp(min=0).sqrt()
    return {
        "nll": mean_over(-log_p.gather(2, target)[..., 0], found.answer).double(),
        "el2n": mean_over(error, found.answer),
        "entropy": mean_over(-torch.where(p > 0, p * log_p, 0.0).sum(dim=-1), found.real),
    }


def _device(model: nn.Module) -> torch.device:
    return next((value.device for value in model.parameters()), torch.device("cpu"))


def _no_pixels(batch: Any) -> Any:
    if not isinstance(batch, Mapping) or "pixel_values" not in batch:
        raise InputError("image_grounding needs `blank`, which takes the images out of a batch: there are no "
                         "'pixel_values' to blank")  # fmt: skip
    return {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}


def _has_pixels(data: Any) -> bool:
    first = data.dataset[0] if hasattr(data, "dataset") else data[0]
    return isinstance(first, Mapping) and "pixel_values" in first


def _changed(batch: Any, other: Any) -> Bool[Tensor, " b"]:
    """Samples whose inputs differ between two batches."""
    one, two = (split_batch(part)[0] for part in (batch, other))
    names = list(one) if isinstance(one, dict) else range(len(one))
    found = [(one[name] != two[name]).reshape(len(one[name]), -1).any(dim=1) for name in names
             if isinstance(one[name], Tensor) and one[name].shape == two[name].shape]  # fmt: skip
    return torch.stack(found).any(dim=0)
