"""Three methods of the study that captum lacks: RISE, meaningful perturbation and CAM."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import Attribution
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from salience.errors import InputError
from salience.features.attribution import Target, as_grid, target_classes
from salience.model.at import capture, logits_of, run, training_mode
from salience.model.batches import map_batches

Images = Float[Tensor, "batch channel height width"]


class _Perturbing(Attribution):
    """What the methods here share: classes, evaluation mode, batches, images alone."""

    predicts = True

    def __init__(self, model: nn.Module, *, multi_label: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
        super().__init__(model)
        self.multi_label = multi_label

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        internal_batch_size: int = 64,
    ) -> Float[Tensor, "batch 1 height width"]:
        """Maps of the images.

        Parameters
        ----------
        inputs : Tensor (batch, channel, height, width)
        target : int, sequence of int or Tensor (batch,), optional
            The class to explain; the predicted one by default.
        additional_forward_args : None
            The model must take images alone.
        internal_batch_size : int
            Images per pass at most; halved when memory runs out.

        Returns
        -------
        Tensor (batch, 1, height, width)

        Raises
        ------
        InputError
            Shapes or classes do not fit.
        """
        if additional_forward_args is not None:
            raise InputError(f"additional_forward_args: {type(self).__name__} explains models that take images alone")
        if inputs.ndim != 4 or len(inputs) == 0:
            raise InputError(f"inputs: have shape {tuple(inputs.shape)}; (batch, channel, height, width) is needed")
        images = inputs.detach()
        with training_mode(self.forward_func, False):
            with torch.no_grad():
                logits = map_batches(self._logits, images, batch_size=internal_batch_size)
            classes = target_classes(logits, target).to(images.device)
            return self._maps(images, classes, internal_batch_size).to(images)[:, None]

    def _logits(self, images: Tensor) -> Tensor:
        return logits_of(run(self.forward_func, images))

    def _probability(self, images: Tensor, classes: Tensor) -> Tensor:
        logits = self._logits(images)
        values = logits.sigmoid() if self.multi_label else logits.softmax(1)
        return values.gather(1, classes[:, None])[:, 0]

    def _maps(self, images: Tensor, classes: Tensor, size: int) -> Tensor:
        raise NotImplementedError


class RISE(_Perturbing):
    """Randomised input sampling: the mean of random masks, weighed by the probability under each.

        S = 1 / (N p) * sum_i f(x * M_i)_target M_i

    M_i is a grid of `cells` x `cells` values, 1 with chance p else 0, enlarged bilinearly and shifted at random.

    Parameters
    ----------
    model : torch.nn.Module
        Returns logits.
    masks : int
        N. The paper takes 4,000 to 8,000 for photographs.
    cells : int
    chance : float
        p, of a cell to stay.
    multi_label : bool
        The probability is a sigmoid of the class's own logit.
    random_state : int
        Of the masks, which are the same for every image.

    Notes
    -----
    Source: Petsiuk, Das and Saenko, BMVC 2018 (arXiv 1806.07421), section 3. A removed pixel becomes 0 in the
    scale of the model's input.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        masks: int = 1000,
        cells: int = 7,
        chance: float = 0.5,
        multi_label: bool = False,
        random_state: int = 0,
    ) -> None:
        super().__init__(model, multi_label=multi_label)
        if masks < 1 or cells < 1 or not 0 < chance < 1:
            raise InputError(f"masks, cells and chance: got {masks}, {cells} and {chance}; >= 1, >= 1, within 0..1")
        self.masks, self.cells, self.chance, self.random_state = masks, cells, chance, random_state

    def _maps(self, images: Tensor, classes: Tensor, size: int) -> Tensor:
        height, width = images.shape[2:]
        total = torch.zeros((len(images), height, width), dtype=torch.float64, device=images.device)
        # All draws come first, small as they are, so that the batch size does not change them.
        generator = torch.Generator().manual_seed(self.random_state)
        grids = (torch.rand((self.masks, 1, self.cells, self.cells), generator=generator) < self.chance).float()
        shifts = torch.rand((self.masks, 2), generator=generator)
        for start in range(0, self.masks, size):
            part = slice(start, start + size)
            drawn = _enlarged(grids[part], shifts[part], height, width).to(images)

            def add(index: Tensor, drawn: Tensor = drawn) -> Tensor:
                image, mask = (index // len(drawn)).to(images.device), (index % len(drawn)).to(images.device)
                with torch.no_grad():
                    weight = self._probability(images[image] * drawn[mask, None], classes[image])
                total.index_add_(0, image, weight.double()[:, None, None] * drawn[mask].double())
                return index

            map_batches(add, torch.arange(len(images) * len(drawn)), batch_size=size)
        return total / (self.masks * self.chance)


class MeaningfulPerturbation(_Perturbing):
    """The smallest smooth region whose blurring makes the class go away.

        m* = argmin_m  f(m x + (1 - m) blur(x))_target + l1 mean(1 - m) + tv sum |grad m|^3 / cells

    and the map is ``1 - m*``, enlarged from a coarse grid.

    Parameters
    ----------
    model : torch.nn.Module
        Returns logits.
    iterations : int
        Steps of Adam.
    cells : int, optional
        Side of the mask; an eighth of the image's side, 8 at least, by default.
    l1, tv, lr : float
        Weights of size and of roughness, and the step.
    multi_label : bool
        The probability is a sigmoid of the class's own logit.

    Notes
    -----
    Source: Fong and Vedaldi, ICCV 2017 (arXiv 1704.03296), equation 5; constants of the popular PyTorch version
    from memory, the sigmoid that keeps the mask within 0..1 and starting at one are ours. No random jitter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        iterations: int = 100,
        cells: int | None = None,
        l1: float = 0.1,
        tv: float = 0.2,
        lr: float = 0.1,
        multi_label: bool = False,
    ) -> None:
        super().__init__(model, multi_label=multi_label)
        if iterations < 1 or (cells is not None and cells < 2):
            raise InputError(f"iterations and cells: got {iterations} and {cells}; at least 1 and 2")
        self.iterations, self.cells, self.l1, self.tv, self.lr = iterations, cells, l1, tv, lr

    def _maps(self, images: Tensor, classes: Tensor, size: int) -> Tensor:
        blurred = _blurred(images)

        def solved(index: Tensor) -> Tensor:
            rows = index.to(images.device)
            return self._solved(images[rows], blurred[rows], classes[rows])

        return map_batches(solved, torch.arange(len(images)), batch_size=size).to(images.device)

    def _solved(self, x: Tensor, blurred: Tensor, classes: Tensor) -> Tensor:
        height, width = x.shape[2:]
        cells = self.cells or max(8, min(height, width) // 8)
        raw = torch.full((len(x), 1, cells, cells), 3.0, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=self.lr, eps=1e-4)  # rounding must not be blown up to a step
        with torch.enable_grad():
            for _ in range(self.iterations):
                mask = raw.sigmoid()
                large = interpolate(mask, (height, width), mode="bilinear", align_corners=False)
                probability = self._probability(large * x + (1 - large) * blurred, classes)
                rough = (mask.diff(dim=2).abs() ** 3).sum((1, 2, 3)) + (mask.diff(dim=3).abs() ** 3).sum((1, 2, 3))
                loss = probability + self.l1 * (1 - mask).mean((1, 2, 3)) + self.tv * rough / cells
                (raw.grad,) = torch.autograd.grad(loss.sum(), raw)  # of each image by itself
                optimizer.step()
        large = interpolate(raw.detach().sigmoid(), (height, width), mode="bilinear", align_corners=False)
        return 1 - large[:, 0]


class CAM(_Perturbing):
    """Class activation map: the activations before global average pooling, weighed by the class's output weights.

        S_u = sum_k w_{target, k} A_{k, u}

    Parameters
    ----------
    model : torch.nn.Module
        Ends in global average pooling and one linear layer; others have no CAM and are refused.
    layer : str
        Whose activations are pooled.

    Notes
    -----
    Source: Zhou et al., CVPR 2016 (arXiv 1512.04150), equation 2.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(model)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(f"model: {type(model).__name__} has no linear output layer, so that CAM is not defined")
        self.layer, self.head = layer, linear[-1]

    def _maps(self, images: Tensor, classes: Tensor, size: int) -> Tensor:
        head = self.forward_func.get_submodule(self.head)
        seen: list[Tensor] = []

        def one(index: Tensor) -> Tensor:
            rows = index.to(images.device)
            seen.clear()
            handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            try:
                with torch.no_grad(), capture(self.forward_func, self.layer) as captured:
                    logits = self._logits(images[rows])
            finally:
                handle.remove()
            grid = as_grid(captured[self.layer], (images.shape[2], images.shape[3]))
            fits = grid is not None and seen and seen[-1].shape == grid.shape[:2] and _is_mean(seen[-1], grid)
            if grid is None or not fits or head.out_features != logits.shape[1]:
                raise InputError(
                    f"layer: the output layer {self.head!r} does not read the average of {self.layer!r}, so that CAM "
                    "is not defined here; name the layer right before the pooling, or use another method"
                )
            maps = torch.einsum("bchw,bc->bhw", grid, head.weight[classes[rows]])
            return interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]

        return map_batches(one, torch.arange(len(images)), batch_size=size).detach().to(images.device)


def _enlarged(grids: Tensor, shifts: Tensor, height: int, width: int) -> Float[Tensor, "masks height width"]:
    """Grids enlarged by a cell more than the image, and cut at a random place within the first cell."""
    cells = grids.shape[2]
    steps = [-(-side // cells) for side in (height, width)]
    large = interpolate(grids, [(cells + 1) * step for step in steps], mode="bilinear", align_corners=False)[:, 0]
    places = (shifts * torch.tensor(steps)).long().tolist()
    return torch.stack([one[y : y + height, x : x + width] for one, (y, x) in zip(large, places, strict=True)])


def _is_mean(pooled: Tensor, grid: Tensor) -> bool:
    return torch.allclose(pooled, grid.mean((2, 3)), atol=1e-4)


def _blurred(images: Images, share: float = 0.1) -> Images:
    """Gaussian blur a tenth of the image's side wide, borders continued."""
    result = images
    for dim in (2, 3):
        sigma = max(1.0, share * images.shape[dim])
        reach = min(int(3 * sigma), images.shape[dim] - 1)
        pixel = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = torch.exp(-(pixel**2) / (2 * sigma**2))
        shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
        kernel = (kernel / kernel.sum()).to(images).reshape(shape)
        padding = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        flat = pad(result.flatten(0, 1)[:, None], padding, mode="reflect")
        result = conv2d(flat, kernel).reshape(images.shape)
    return result
