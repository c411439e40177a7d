"""What each of two processes does in the distributed tests of loss reweighting: ``python reweighting_ranks.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.utils.data import Dataset

from salience.data import LossReweighter, TrainerReweighting, loss_weights
from salience.errors import InputError
from salience.scores import Scores

torch.set_num_threads(1)

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0.1, 3.0, -1.0, 0.0, 5.0, 2.0, 0.3, -4.0])
TOKENS = torch.tensor([4, 1, 2, 0, 7, 3, 3, 1])  # one without targets
PARTS = [slice(0, 5), slice(5, 8)]  # batches of different sizes
SCORES = Scores(range(8), range(8), "sample")
WAYS = {
    "linupper": {"r": 0.4},
    "tokens": {"r": 0.4, "length_weight": "token"},
    "scores": {"r": 1.0, "scores": SCORES},
    "burning": {"burn_in": 5},
}


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def gradients(model: nn.Module, way: str, part: slice) -> dict[str, torch.Tensor]:
    """Gradients of the reweighted squared error of some rows, and the weights of these rows."""
    losses = (model(X[part]).squeeze(1) - Y[part]).square()
    losses = losses.masked_fill(TOKENS[part] == 0, torch.nan)
    loss_of = LossReweighter(**{"burn_in": 0, **WAYS[way]})
    ids = torch.arange(8)[part] if "scores" in WAYS[way] else None
    loss_of(losses, TOKENS[part], ids=ids).backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {**found, "weights": loss_of.last_weights}


class Sequences(Dataset):
    """20 rows of tokens; those after a row's end are no targets."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(1, 20, (8,), generator=generator)
        labels = tokens.masked_fill(torch.arange(8) >= 3 + row % 6, -100)
        return {"input_ids": tokens, "labels": labels, "row": torch.tensor(row)}


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def train(folder: Path, batch: int, accumulate: int = 3, **options) -> tuple[nn.Module, transformers.Trainer]:
    """Two epochs under a `Trainer`: per epoch, one step of `accumulate` micro-batches and one of what is left."""
    reweighting = TrainerReweighting(LossReweighter(r=0.5, burn_in=1, **options), id_column="row")
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, num_train_epochs=2,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy="sequential", ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        per_device_eval_batch_size=batch, eval_strategy="epoch", prediction_loss_only=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        language_model(), arguments, train_dataset=Sequences(), eval_dataset=Sequences(),
        compute_loss_func=reweighting, callbacks=[reweighting],
    )  # fmt: skip
    trainer.train()
    return trainer.model, trainer


def main(folder: Path) -> None:
    # The trainer opens the process group, which everything else then uses.
    model, trainer = train(folder / "trainer", batch=2)
    rank = dist.get_rank()
    results = {f"trainer:{name}": p.detach() for name, p in model.named_parameters()}
    told = {"eval_loss": [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]}
    for way in WAYS:
        wrapped = nn.parallel.DistributedDataParallel(linear())
        results |= {f"{way}:{name}": value for name, value in gradients(wrapped, way, PARTS[rank]).items()}
    pair = torch.tensor([[1.0, 2.0], [3.0, 5.0]])[rank]
    results["pair"] = loss_weights(pair)
    try:
        loss_weights(torch.tensor([1.0, torch.nan if rank else 2.0]))
    except InputError as error:
        told["error"] = str(error)
    torch.save(results, folder / f"rank{rank}.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
