"""Importance-aware sparse tuning in the `Trainer` of transformers, across checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from salience.errors import DataError, InputError
from salience.weights.ist.ablation import LossFn
from salience.weights.ist.tuning import ImportanceSparseTuning

_NAME = "ist"


class ISTCallback(TrainerCallback):
    """Put `ImportanceSparseTuning` under a `transformers.Trainer`.

        Trainer(get_peft_model(model, config), args, ..., callbacks=[ISTCallback()])

    Layers are drawn once per optimiser step, also with gradient accumulation. Each checkpoint gets
    ``ist.safetensors`` and ``ist.json``; a run that is resumed from it goes on with the same scores and draws.
    Evaluation, saving and merging of the adapter are as without it.

    Parameters
    ----------
    dataset : map-style dataset, optional
        Where scoring batches come from, shuffled. The trainer's training set by default.
    data_collator : callable, optional
        Makes a batch of rows. The trainer's by default.
    batch_size : int
        Rows of a scoring batch; fewer if the data set has fewer.
    loss_fn : callable, optional
        ``loss_fn(model, batch)``. The loss that the model itself returns by default.
    seed : int
        Decides draws of layers and scoring batches.
    **options
        Of `ImportanceSparseTuning`, but for `optimizer` and `generator`, which come from the trainer and `seed`.

    Attributes
    ----------
    tuning : ImportanceSparseTuning or None
        From the beginning of training on.

    Raises
    ------
    InputError
        As of `ImportanceSparseTuning`; or, when training begins, a data set without a length, or a distributed run
        that does not look for unused parameters.
    """

    def __init__(
        self,
        dataset: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        *,
        batch_size: int = 16,
        loss_fn: LossFn | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size: got {batch_size}; it must be at least 1")
        self.dataset, self.data_collator, self.batch_size = dataset, data_collator, batch_size
        self.loss_fn, self.seed, self.options = loss_fn, seed, options
        self.tuning: ImportanceSparseTuning | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo what an interrupted run of another trainer left, before the optimiser is made."""
        self._release()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the layers, and take up a checkpoint's scores if the run goes on from one."""
        self._release()  # an interrupted run left only the drawn layers trainable
        loader, optimizer, model = kwargs["train_dataloader"], kwargs["optimizer"], kwargs["model"]
        self.dataset = loader.dataset if self.dataset is None else self.dataset
        self.data_collator = loader.collate_fn if self.data_collator is None else self.data_collator
        if not hasattr(self.dataset, "__len__") or not len(self.dataset):
            raise InputError(
                f"dataset: {type(self.dataset).__name__} has no rows that can be drawn; give one with a length"
            )
        _check_distributed(args)
        if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant") and args.gradient_checkpointing:
            model.enable_input_require_grads()  # else such a checkpoint below the lowest drawn layer gives no gradient
        self.tuning = ImportanceSparseTuning(
            model, optimizer=getattr(optimizer, "optimizer", optimizer),
            generator=torch.Generator().manual_seed(self.seed), **self.options,
        )  # fmt: skip
        if state.global_step:
            self.tuning.load_state_dict(read_state(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the layers of this optimiser step."""
        if self.tuning is not None:
            self.tuning.before_step(state.global_step, lambda: self.scoring_batch(state.global_step), self.loss_fn)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add scores and random state to the checkpoint."""
        if self.tuning is not None and state.is_world_process_zero:
            write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.tuning.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model with what was trainable before."""
        self._release()

    def _release(self) -> None:
        if self.tuning is not None:
            self.tuning.release()

    def scoring_batch(self, step: int) -> Any:
        """The batch for the update before `step`: the next rows of a shuffled pass over the data set.

        It follows from seed and step alone, so that a resumed run has the same.
        """
        if self.tuning is None or self.data_collator is None:
            raise InputError("scoring_batch: training has not begun")
        rows, size = len(self.dataset), min(self.batch_size, len(self.dataset))
        number = step // self.tuning.interval - 1
        epoch, place = divmod(number, rows // size)
        generator = torch.Generator().manual_seed(self.seed + 1 + 1_000_003 * epoch)
        chosen = torch.randperm(rows, generator=generator)[place * size : (place + 1) * size]
        batch = self.data_collator([self.dataset[i] for i in chosen.tolist()])
        device = next(self.tuning.model.parameters()).device
        return _moved(batch, device)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write an `ImportanceSparseTuning.state_dict` as safetensors and JSON."""
    tensors = {key: state[key] for key in ("scores", "counts", "generator")}
    starts = {f"start:{name}": value.contiguous() for name, value in state["start"].items()}
    save_file({**tensors, **starts}, folder / f"{_NAME}.safetensors")
    plain = {key: state[key] for key in ("layers", "history")}
    (folder / f"{_NAME}.json").write_text(json.dumps(plain), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises
    ------
    DataError
        There is nothing, or the files are damaged or hold something else.
    """
    try:
        plain = json.loads((folder / f"{_NAME}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{_NAME}.safetensors")
        state = {key: plain[key] for key in ("layers", "history")}
        state |= {key: tensors.pop(key) for key in ("scores", "counts", "generator")}
    except Exception as error:
        raise DataError(
            f"{folder}: no readable importance of layers ({_NAME}.json, {_NAME}.safetensors): {error}. Resume with the "
            "output_dir in which the checkpoint was written, by a run that had this callback"
        ) from error
    return {**state, "start": {name.removeprefix("start:"): value for name, value in tensors.items()}}


def _check_distributed(args: Any) -> None:
    """Idle layers get no gradient, for which ranks would wait unless told to expect that."""
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        return
    found = args.ddp_find_unused_parameters
    if found is False or (found is None and args.gradient_checkpointing):
        raise InputError("ddp_find_unused_parameters: it must be True, as idle layers have no gradients")


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, tuple | list) else batch
