"""Bias loss under the `Trainer` of transformers, which stays as it is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from salience.data.bias_loss.weighted import BiasLoss
from salience.model.at import capture, layer, logits_of
from salience.model.trainer_loss import TrainerLoss


class TrainerBiasLoss(TrainerLoss):
    """Put a `BiasLoss` under a `transformers.Trainer`, as its loss function and one of its callbacks.

        bias = TrainerBiasLoss("resnet.encoder.stages.3")
        Trainer(model, args, ..., compute_loss_func=bias, callbacks=[bias])

    Evaluation reports the plain cross-entropy. Steps, gradient accumulation and the trainer's own scaling are minded
    (see `TrainerLoss`); minimum and maximum of the variances are those of a micro-batch.

    Parameters
    ----------
    features : str
        Layer whose output is weighed, as `model.named_modules()` names it: the last stage before pooling.
    bias_loss : BiasLoss, optional
        With its defaults, otherwise.

    Raises
    ------
    InputError
        As of `TrainerLoss`; a model without that layer.
    """

    def __init__(self, features: str, bias_loss: BiasLoss | None = None) -> None:
        super().__init__()
        self.features = features
        self.bias_loss = BiasLoss() if bias_loss is None else bias_loss
        self._captured: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The bias loss of a (micro-)batch; without gradients, the plain cross-entropy."""
        logits = logits_of(outputs)
        if not torch.is_grad_enabled():
            return cross_entropy(logits, labels, ignore_index=self.bias_loss.ignore_index)
        return self.bias_loss.to(logits.device)(self._captured[self.features], logits, labels)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a layer that is not there, before training starts."""
        super().on_init_end(args, state, control, **kwargs)
        layer(kwargs["model"], self.features)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to record the features."""
        super().on_train_begin(args, state, control, **kwargs)
        self._hooks.close()
        self._captured = self._hooks.enter_context(capture(kwargs["model"], self.features))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hook off the model."""
        self._hooks.close()
