"""Loss reweighting under the `Trainer` of transformers, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from salience.data.loss_reweighting.reweighter import LossReweighter
from salience.data.loss_reweighting.sequences import IGNORED, per_sequence_loss
from salience.errors import InputError
from salience.model.at import logits_of
from salience.model.trainer_loss import TrainerLoss


class TrainerReweighting(TrainerLoss):
    """Put a `LossReweighter` under a `transformers.Trainer`, as its loss function and one of its callbacks.

        reweighting = TrainerReweighting(LossReweighter("linupper", r=0.4))
        Trainer(model, args, ..., compute_loss_func=reweighting, callbacks=[reweighting])

    Steps, gradient accumulation and the trainer's own scaling are minded (see `TrainerLoss`). Evaluation reports the
    plain mean. Losses that a model adds itself (of its router, say) are not in it.

    Parameters
    ----------
    reweighter : LossReweighter, optional
        With its defaults, otherwise.
    per_sample : callable, optional
        ``(outputs, labels) -> (losses, tokens)``, both (batch,). By default cross-entropy: of each sequence, shifted,
        for logits of three dimensions, else of each row.
    id_column : str, optional
        Column of the data with the samples' ids (whole numbers), where the reweighter has scores. The model is never
        shown it. Set ``remove_unused_columns=False``, or the trainer drops it.

    Raises
    ------
    InputError
        Used as a loss function only; `torch.nn.DataParallel` (launch one process per device instead); an
        encoder-decoder without `per_sample`.
    """

    def __init__(
        self,
        reweighter: LossReweighter | None = None,
        *,
        per_sample: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]] | None = None,
        id_column: str | None = None,
    ) -> None:
        super().__init__()
        self.reweighter = LossReweighter() if reweighter is None else reweighter
        self.per_sample = per_sample
        self.id_column = id_column
        self._ids: Tensor | None = None
        self._hook: Any = None

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The reweighted loss of a (micro-)batch; without gradients, the plain mean."""
        losses, tokens = (_cross_entropies if self.per_sample is None else self.per_sample)(outputs, labels)
        return self.reweighter(losses, tokens, ids=self._ids, step=self.step, total_steps=self.total_steps)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the loss does not fit."""
        super().on_init_end(args, state, control, **kwargs)
        config = getattr(kwargs.get("model"), "config", None)
        if getattr(config, "is_encoder_decoder", False) and self.per_sample is None:
            raise InputError(
                "per_sample: the labels of an encoder-decoder are not shifted; give "
                "lambda outputs, labels: per_sequence_loss(outputs.logits, labels, shift=False)"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to read the ids off what the model is given."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.id_column is not None and self._hook is None:
            self._hook = kwargs["model"].register_forward_pre_hook(self._take_ids, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _take_ids(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._ids = kwargs.pop(self.id_column, None)  # type: ignore[arg-type]
        if self._ids is None and torch.is_grad_enabled():
            raise InputError(
                f"id_column: the batches have no {self.id_column!r}; set remove_unused_columns=False, and let the "
                "data collator keep it"
            )
        return args, kwargs


def _cross_entropies(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits_of(outputs)
    if logits.ndim == 3:
        return per_sequence_loss(logits, labels)
    losses = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return losses, (labels != IGNORED).long()
