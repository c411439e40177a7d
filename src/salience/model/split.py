"""Cut a network in two at a layer: inputs -> activations -> logits."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.model import at


class _Reached(Exception):
    """Ends a forward pass at the layer of interest."""


class Split:
    r"""A network :math:`f = g \circ h` cut behind a layer: `encode` is h, `decode` is g.

    ``decode(encode(x), x)`` equals ``model(x)``. Any layer can be cut that runs once in a pass, skip
    connections around it included: `decode` runs the whole model and replaces the layer's output. Neither
    changes the model; put it in evaluation mode first where dropout or batch normalisation would interfere.

    Parameters
    ----------
    model : torch.nn.Module
        A network that returns logits, alone or in a `ModelOutput`.
    layer : str
        Name as in `model.named_modules()`.

    Raises
    ------
    InputError
        The model has no such layer.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        at.layer(model, layer)
        self.model = model
        self.layer = layer

    def encode(self, inputs: Any) -> Float[Tensor, "batch ..."]:
        """The layer's output for `inputs` (a tensor, a tuple or a mapping); what follows it is not run."""

        def stop(activations: Tensor) -> Tensor:
            raise _Reached

        # Hooks run in the order they were put on: the output is captured, then the pass is ended.
        with at.capture(self.model, self.layer) as captured, at.replace(self.model, self.layer, stop):
            try:
                at.run(self.model, inputs)
            except _Reached:
                return captured[self.layer]
        raise InputError(f"layer: {self.layer!r} does not run when the model does")

    def decode(
        self, activations: Float[Tensor, "batch ..."], inputs: Any, *, copy: bool = True
    ) -> Float[Tensor, "batch ..."]:
        """The logits that follow from `activations`.

        Parameters
        ----------
        activations : Tensor
            Shaped as `encode` gives it.
        inputs : tensor, tuple or mapping
            Any example batch of the same size, or of one row, which is cheaper and does for all rows. What
            a skip connection carries around the layer comes from here.
        copy : bool
            Hand a copy to the layers behind; without one, an operation in place there overwrites `activations`.

        Raises
        ------
        InputError
            Shapes do not fit, or the layer runs several times in a pass, where no cut is possible.
        """
        runs = 0

        def swap(own: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            if activations.shape[1:] != own.shape[1:] or own.shape[0] not in (1, activations.shape[0]):
                raise InputError(
                    f"activations: have shape {tuple(activations.shape)}, but layer {self.layer!r} gives "
                    f"{tuple(own.shape)} for these inputs"
                )
            return activations.clone() if copy else activations

        with at.replace(self.model, self.layer, swap):
            logits = at.logits_of(at.run(self.model, inputs))
        if runs != 1:
            raise InputError(f"layer: {self.layer!r} runs {runs} times in a pass; choose one that runs once")
        if logits.shape[0] != activations.shape[0]:
            raise InputError(
                f"inputs: with one row the model gives {logits.shape[0]} rows of logits for "
                f"{activations.shape[0]} of activations; pass inputs of the same size"
            )
        return logits
