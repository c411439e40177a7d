"""Maps that look at no network: what any explanation of one has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xxhash
from captum.attr import Attribution
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import conv2d, pad

from salience.errors import InputError

Images = Float[Tensor, "batch channel height width"]
Maps = Float[Tensor, "batch 1 height width"]


class RandomSmoothMap(Attribution):
    """White noise blurred to blobs: as smooth as a saliency map, and about nothing.

    Parameters
    ----------
    model : callable
        Not run.
    blob : float
        Standard deviation of the blur, as a share of the longer side.
    random_state : int
        A map follows from it and from the image's values, whatever the batch.

    Raises
    ------
    InputError
        `blob` is not above 0.
    """

    def __init__(self, model: Any, *, blob: float = 0.1, random_state: int = 0) -> None:
        if not 0 < blob < float("inf"):
            raise InputError(f"blob: got {blob!r}; it must be above 0")
        super().__init__(model)
        self.blob, self.random_state = blob, random_state

    def attribute(self, inputs: Images, target: Any = None, additional_forward_args: Any = None) -> Maps:
        """Maps of the images' size; `target` plays no part."""
        size = tuple(inputs.shape[2:])
        maps = np.empty((len(inputs), 1, *size), dtype=np.float32)
        for i, image in enumerate(inputs.detach().cpu().float().contiguous().numpy()):
            own = xxhash.xxh3_64_intdigest(image.tobytes())
            noise = np.random.default_rng([self.random_state, own]).standard_normal(size)
            maps[i, 0] = gaussian_filter(noise, self.blob * max(size), mode="wrap")
        return torch.from_numpy(maps).to(inputs.device)


class CentreMap(Attribution):
    """The middle of the image, since that is where photographers put things: minus the squared distance from it."""

    def attribute(self, inputs: Images, target: Any = None, additional_forward_args: Any = None) -> Maps:
        """Maps of the images' size; `target` plays no part."""
        rows, columns = (torch.linspace(-1, 1, side, device=inputs.device) for side in inputs.shape[2:])
        one = -(rows[:, None] ** 2 + columns[None] ** 2)
        return one.expand(len(inputs), 1, *one.shape).contiguous()


class EdgeMap(Attribution):
    """Where the image changes: length of Sobel's gradient of its mean channel. What fools the eye in saliency maps."""

    def attribute(self, inputs: Images, target: Any = None, additional_forward_args: Any = None) -> Maps:
        """Maps of the images' size; `target` plays no part."""
        across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=inputs.device)
        grey = pad(inputs.detach().float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        slopes = conv2d(grey, torch.stack([across, across.T])[:, None])
        return slopes.norm(dim=1, keepdim=True)
