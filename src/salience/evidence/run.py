"""What a reproduction script is given: its seed, its scale, and where to read and write."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from salience.errors import InputError

if TYPE_CHECKING:
    import torch

Scale = Literal["smoke", "desk", "full"]


@dataclass(frozen=True)
class Run:
    """One run of a reproduction.

    Parameters
    ----------
    seed : int
        Seed that every random draw of the script derives from.
    scale : {"smoke", "desk", "full"}
        Seconds for plumbing and controls, about 3 minutes at most, or as long as the paper's setting takes.
    data : Path, optional
        Folder with the user's data; None means the script's own stand-in.
    scratch : Path
        Folder for the script's temporary files; it is removed after the run.
    progress : callable, optional
        Takes each message of `step`.
    master : bool
        Whether bars with ``once=True`` are judged at this seed; elsewhere a script may skip the replicates.
    """

    seed: int
    scale: Scale = "desk"
    data: Path | None = None
    scratch: Path = field(kw_only=True)
    progress: Callable[[str], None] | None = None
    master: bool = True

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; give 0 or a positive integer")
        if self.scale not in get_args(Scale):
            raise InputError(f"scale is {self.scale!r}; allowed: {', '.join(map(repr, get_args(Scale)))}")

    @property
    def smoke(self) -> bool:
        """Whether this run only tries the plumbing and the controls: take the smallest sizes that run."""
        return self.scale == "smoke"

    def rng(self, use: str = "") -> np.random.Generator:
        """A fresh numpy generator; draws for another `use` (data, control, ...) are independent of it."""
        return np.random.default_rng(self._sequence(use))

    def generator(self, use: str = "") -> torch.Generator:
        """A fresh torch generator on the CPU; draws for another `use` are independent of it."""
        import torch

        return torch.Generator().manual_seed(int(self._sequence(use).generate_state(1)[0]))

    def replicate_seeds(self, count: int) -> list[int]:
        """`count` seeds for replicates of the whole experiment; more replicates keep the first ones."""
        if count < 1:
            raise InputError(f"count of replicates is {count}; give at least 1")
        return [int(seed) for seed in self._sequence("replicates").generate_state(count)]

    def step(self, message: str) -> None:
        """Tell what the script does now."""
        if self.progress is not None:
            self.progress(message)

    def _sequence(self, use: str) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, zlib.crc32(use.encode())])
