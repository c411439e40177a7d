"""One table of all processes' samples, whatever the number that each of them holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class Gathered(NamedTuple):
    """The rows of all processes in the order of their ranks, and which of them are this process's own."""

    rows: Float[Tensor, "everyone columns"]
    own: slice
    world: int


def gather_rows(rows: Float[Tensor, "batch columns"], group: dist.ProcessGroup | None = None) -> Gathered:
    """Bring together the rows of all processes of a group; without distributed training, those of this one.

    Batches may differ in size (the last one of an epoch): they are padded to the longest, and cut again.

    Parameters
    ----------
    rows : (batch, columns) Tensor
        The same columns in every process; no gradient flows through.
    group : ProcessGroup, optional
        All processes by default.
    """
    rows = rows.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return Gathered(rows, slice(0, len(rows)), 1)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    counted = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counted, torch.tensor([len(rows)], device=rows.device), group=group)
    sizes = torch.cat(counted).tolist()
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everyone, padded, group=group)
    start = sum(sizes[:rank])
    parts = [part[:size] for part, size in zip(everyone, sizes, strict=True)]
    return Gathered(torch.cat(parts), slice(start, start + len(rows)), world)
