"""Representations without labels: momentum contrast."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from salience.data.rcal.views import strong_view
from salience.errors import DataError, InputError
from salience.model.at import training_mode

View = Callable[[Tensor, torch.Generator], Tensor]


def contrastive_loss(
    query: Float[Tensor, "batch dim"], key: Float[Tensor, "batch dim"], queue: Float[Tensor, "kept dim"],
    temperature: float = 0.2, ignore: Bool[Tensor, "batch kept"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Tell each image's own key from those in the queue.

        L_con = -mean log exp(q.k+ / tau) / (exp(q.k+ / tau) + sum over the queue of exp(q.k' / tau))

    Parameters
    ----------
    query, key : (batch, dim) Tensor
        Of length 1; no gradient flows through the keys.
    queue : (kept, dim) Tensor
        Keys of other images.
    temperature : float
        tau: 0.07 in MoCo v1, 0.2 in v2.
    ignore : (batch, kept) bool Tensor, optional
        Keys in the queue that are older ones of the very image.
    """
    own = (query * key.detach()).sum(1, keepdim=True)
    others = query @ queue.T
    if ignore is not None:
        others = others.masked_fill(ignore, -torch.inf)
    logits = torch.cat([own, others], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def moco_pretrain(
    encoder: nn.Module, x: Float[Tensor, "n ..."], *, epochs: int, dim: int = 128, queue: int = 4096,
    momentum: float = 0.999, temperature: float = 0.2, lr: float = 0.03, weight_decay: float = 1e-4,
    batch_size: int = 256, view: View = strong_view, generator: torch.Generator,
) -> nn.Module:  # fmt: skip
    """Train an encoder so that two views of an image are alike and other images are not; no label is used.

    Query and key encoder f, f' with a two-layer projection head each, the key side a moving average:

        theta' <- momentum theta' + (1 - momentum) theta

    Parameters
    ----------
    encoder : torch.nn.Module
        Inputs (n, ...) to representations (n, m). It is left as it is.
    x : (n, ...) Tensor
        Inputs without labels.
    epochs : int
    dim : int
        Width of the projections, which are thrown away.
    queue : int
        Keys of past batches to tell from; not more than there are images. MoCo has 65,536 for ImageNet.
    momentum, temperature, lr, weight_decay : float
        SGD with momentum 0.9 and a cosine schedule. A run of a few hundred steps needs a smaller momentum, about 0.99.
    view : callable
        ``view(batch, generator) -> batch``, drawn twice.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    torch.nn.Module
        The trained copy, in evaluation mode.

    Raises
    ------
    InputError
        A parameter out of range, or an encoder that gives no (n, m) matrix.
    DataError
        The loss is no longer finite.

    Notes
    -----
    Where the queue holds an older key of the very image, it is left out [ours: rare in large data, common in small].
    Batch normalisation can give a batch away; MoCo shuffles batches over devices against that, which one device cannot.

    Source: arXiv 2211.10955, section on contrastive representations; He, Fan, Wu, Xie, Girshick, "Momentum Contrast
    for Unsupervised Visual Representation Learning", CVPR 2020, and MoCo v2 (arXiv 2003.04297).
    """
    if min(epochs, dim, queue) < 1 or batch_size < 2:
        raise InputError(
            f"epochs, dim, queue, batch_size: got {epochs}, {dim}, {queue}, {batch_size}; at least 1, 1, 1, 2 is needed"
        )
    if not 0 <= momentum < 1 or not temperature > 0:
        raise InputError(f"momentum, temperature: got {momentum!r}, {temperature!r}; in [0, 1) and above 0 is needed")
    if len(x) <= batch_size:
        raise InputError(f"x: {len(x)} rows are no more than a batch of {batch_size}; lower batch_size")
    encoder = copy.deepcopy(encoder)
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]), training_mode(encoder, True):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        width = representation_width(encoder, x, device)
        query = nn.Sequential(encoder, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim)).to(device)
        key = copy.deepcopy(query).requires_grad_(False)
        optimizer = torch.optim.SGD(query.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

        def keys_of(rows: Tensor) -> Tensor:
            with torch.no_grad():
                return normalize(key(view(x[rows], generator).to(device)))

        ids = torch.randperm(len(x), generator=generator)[: min(queue, len(x))]
        kept = torch.cat([keys_of(rows) for rows in ids.split(batch_size)])
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator)[: len(x) - len(x) % batch_size].split(batch_size):
                _average(key, query, momentum)
                fresh = keys_of(rows)
                found = normalize(query(view(x[rows], generator).to(device)))
                loss = contrastive_loss(found, fresh, kept, temperature, (rows[:, None] == ids).to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                kept = torch.cat([kept, fresh])[-min(queue, len(x)) :]
                ids = torch.cat([ids, rows])[-min(queue, len(x)) :]
            schedule.step()
            if not bool(loss.isfinite()):
                raise DataError(
                    f"x: the contrastive loss is {float(loss.detach())}; lower lr, or look for values not finite"
                )
    optimizer.zero_grad()
    return encoder.eval()


def representation_width(encoder: nn.Module, x: Tensor, device: torch.device) -> int:
    """m of an encoder's representations (n, m), or an error if it gives something else."""
    with training_mode(encoder, False), torch.no_grad():
        found = encoder(x[:2].to(device))
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"encoder: gives {what}; representations (n, m) are needed")
    return int(found.shape[1])


@torch.no_grad()
def _average(key: nn.Module, query: nn.Module, momentum: float) -> None:
    for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)
