"""Sparse training in the `Trainer` of transformers, across checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from salience.errors import DataError
from salience.weights.sparseland.training import SparseTrainer

_NAME = "sparsity"


class SparsityCallback(TrainerCallback):
    """Put a `SparseTrainer` under a `transformers.Trainer`.

        Trainer(model, args, ..., callbacks=[SparsityCallback(density=0.1, seed=0, method="rigl")])

    Each checkpoint gets ``sparsity.safetensors`` (masks, random state) and ``sparsity.json`` (steps, accounts); a
    run that is resumed from it goes on with them.

    Parameters
    ----------
    density : float
        As of `SparseTrainer`.
    seed : int
        Of its generator.
    **options
        Of `SparseTrainer`, but for `total_steps` and `generator`, which come from the trainer and `seed`.

    Attributes
    ----------
    sparse : SparseTrainer or None
        From the beginning of training on.
    """

    def __init__(self, density: float, seed: int = 0, **options: Any) -> None:
        self.options = {"density": density, **options}
        self.seed = seed
        self.sparse: SparseTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the hooks on, and take up a checkpoint's masks if the run goes on from one."""
        optimizer = kwargs["optimizer"]
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and not (folder / f"{_NAME}.json").is_file():
            raise DataError(
                f"{folder} holds no {_NAME}.json: new masks would zero trained weights. Resume with the output_dir in "
                "which the checkpoint was written, by a run that had this callback"
            )
        saved = read_state(folder) if state.global_step else None
        options = self.options if saved is None else {**self.options, "masks": saved["masks"]}
        self.sparse = SparseTrainer(
            kwargs["model"], getattr(optimizer, "optimizer", optimizer), total_steps=state.max_steps,
            generator=torch.Generator().manual_seed(self.seed), **options,
        )  # fmt: skip
        if saved is not None:
            self.sparse.load_state_dict(saved)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add masks and accounts to the checkpoint."""
        if self.sparse is not None and state.is_world_process_zero:
            write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.sparse.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self.sparse is not None:
            self.sparse.detach()


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a `SparseTrainer.state_dict` as safetensors and JSON."""
    tensors = {f"{part}:{name}": mask.cpu() for part in ("masks", "ever") for name, mask in state[part].items()}
    save_file({**tensors, "generator": state["generator"]}, folder / f"{_NAME}.safetensors")
    plain = {key: state[key] for key in ("passes", "steps", "dense_backwards", "method")}
    (folder / f"{_NAME}.json").write_text(json.dumps(plain), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises
    ------
    DataError
        The files are damaged or hold something else.
    """
    try:
        plain = json.loads((folder / f"{_NAME}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{_NAME}.safetensors")
        state = {key: plain[key] for key in ("passes", "steps", "dense_backwards", "method")}
        state["generator"] = tensors.pop("generator")
    except Exception as error:
        raise DataError(f"{folder}: no readable state of sparse training: {error}") from error
    for part in ("masks", "ever"):
        prefix = f"{part}:"
        state[part] = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return state
