"""A loss of one's own under the `Trainer` of transformers, scaled as the trainer expects it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from salience.errors import InputError


class TrainerLoss(TrainerCallback):
    """Base of losses that are both loss function and callback of a `transformers.Trainer`.

        Trainer(model, args, ..., compute_loss_func=loss, callbacks=[loss])

    The callback tells the loss the step, and undoes what the trainer does to losses of its own: it multiplies by the
    number of processes (``average_tokens_across_devices``), and leaves the division by the number of accumulated
    micro-batches to the loss function. Losses that a model adds itself (of its router, say) are not in it.

    A subclass gives `loss`, the mean over a (micro-)batch of all processes, as gradients are averaged over them.

    Raises
    ------
    InputError
        Used as a loss function only; `torch.nn.DataParallel` (launch one process per device instead).

    Attributes
    ----------
    step, total_steps : int
        Optimiser steps done and in all.
    """

    def __init__(self) -> None:
        self._args: Any = None
        self.step, self.total_steps, self._accumulated = 0, 0, 1

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Mean loss of a batch; without gradients (evaluation), the plain one."""
        raise NotImplementedError

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a (micro-)batch, as `Trainer` calls it."""
        if self._args is None:
            raise InputError("callbacks: give the trainer this object in callbacks=[…], too, not only as the loss")
        loss = self.loss(outputs, labels)
        if torch.is_grad_enabled():
            loss = loss / self._accumulated
        if self._args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss / self._args.world_size  # by which the trainer is going to multiply
        return loss

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of how the trainer scales losses."""
        if args.n_gpu > 1:
            raise InputError(
                f"n_gpu: torch.nn.DataParallel over {args.n_gpu} devices is not supported; launch one process per "
                "device (torchrun)"
            )
        self._args = args

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the number of steps."""
        self.total_steps = state.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the step and of its number of micro-batches: the last one of an epoch may have fewer."""
        self.step, self._accumulated = state.global_step, args.gradient_accumulation_steps
        try:
            batches = len(kwargs["train_dataloader"])
        except TypeError:  # a stream does not say when it ends
            return
        done = round((state.epoch or 0) % 1 * batches) % batches
        self._accumulated = min(self._accumulated, batches - done)
