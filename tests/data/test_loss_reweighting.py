"""Loss reweighting: weights worked by hand, the published functions, processes, loops, and bad input."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reweighting_ranks as ranks
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import salience
from salience.data import (
    LossReweighter,
    TrainerReweighting,
    loss_weights,
    per_sequence_loss,
    weight_diagnostics,
)
from salience.errors import InputError
from salience.scores import Scores

LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0])  # h = -1, -0.5, 0, 1
STRATEGIES = ["linupper", "quadratic", "extremes", "linear", "uniform"]


def rows(n: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 3


def published(losses: np.ndarray, strategy: str, r: float, delta: float) -> np.ndarray:
    """The three functions of the authors' trainer, in numpy; "uniform" has none."""
    low, high = losses.min(), losses.max()
    h = 2 * delta * losses / max(high - low, 1e-6) - delta * (high + low) / max(high - low, 1e-6)
    f = {
        "linupper": np.minimum(h + delta, delta),
        "quadratic": 1 - h**2 / delta**2,
        "extremes": np.abs(h),
        "linear": 0.5 * h + 0.5 * delta,
        "uniform": 0 * h,
    }[strategy]
    g = np.exp((f - f.max()) / r)
    return g / g.sum()


@pytest.mark.parametrize(
    ("strategy", "priorities"),
    [
        ("linupper", [0, 0.5, 1, 1]),
        ("quadratic", [0, 0.75, 1, 0]),
        ("extremes", [1, 0.5, 0, 1]),
        ("linear", [0, 0.25, 0.5, 1]),
        ("uniform", [0, 0, 0, 0]),
    ],
)
def test_weights_worked_by_hand(strategy: str, priorities: list[float]) -> None:
    powers = [math.exp(f / 0.5) for f in priorities]
    expected = torch.tensor([power / sum(powers) for power in powers])
    torch.testing.assert_close(loss_weights(LOSSES, strategy, r=0.5), expected)


@pytest.mark.parametrize("delta", [1.0, 0.3])
@pytest.mark.parametrize("r", [0.4, 1.0, 100.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_as_the_published_functions(strategy: str, r: float, delta: float) -> None:
    losses = rows()
    expected = published(losses.double().numpy(), strategy, r, delta)
    np.testing.assert_allclose(loss_weights(losses, strategy, r, delta).numpy(), expected, atol=1e-6)


def test_the_ratio_of_weights_is_bounded_and_r_leads_to_uniform() -> None:
    for strategy in STRATEGIES:
        weights = loss_weights(rows(), strategy, r=0.4)
        assert float(weights.max() / weights.min()) <= math.exp(1 / 0.4) * (1 + 1e-5)
        torch.testing.assert_close(loss_weights(rows(), strategy, r=1e6), torch.full((50,), 0.02))


def test_a_prior_is_what_the_weights_are_drawn_towards() -> None:
    prior = torch.tensor([1.0, 2.0, 0.0, 4.0])
    torch.testing.assert_close(loss_weights(LOSSES, "uniform", prior=prior), prior / 7)
    # without the third sample the others' losses still span 1 to 5
    f = torch.tensor([0.0, 0.5, 1.0])
    expected = torch.tensor([1.0, 2.0, 4.0]) * (f / 0.4).exp()
    found = loss_weights(LOSSES, prior=prior)
    torch.testing.assert_close(found[[0, 1, 3]], expected / expected.sum())
    assert found[2] == 0


def test_samples_without_targets_have_no_say() -> None:
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0])
    valid = torch.tensor([False, True, True, True, True])
    found = loss_weights(losses, valid=valid)
    torch.testing.assert_close(found[1:], loss_weights(LOSSES))
    assert found[0] == 0 and loss_weights(torch.tensor([torch.nan, 1.0]), valid=torch.tensor([False, True]))[1] == 1
    assert not loss_weights(LOSSES, valid=torch.zeros(4, dtype=torch.bool)).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_losses_get_equal_weights(strategy: str) -> None:
    for value in (1e5, 123.456, 0.0):  # where the formula divides rounding noise by 1e-6
        losses = torch.full((7,), value)
        torch.testing.assert_close(loss_weights(losses, strategy), torch.full((7,), 1 / 7))
    assert loss_weights(torch.tensor([3.0]), strategy) == 1


def test_half_precision_and_large_losses() -> None:
    found = loss_weights(LOSSES.bfloat16(), r=0.01)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
    torch.testing.assert_close(found, loss_weights(LOSSES, r=0.01))
    torch.testing.assert_close(loss_weights(LOSSES * 1e30), loss_weights(LOSSES))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"strategy": "linuper"}, "strategy: got 'linuper'; nearest names: 'linupper'"),
        ({"r": 0.0}, "r: got 0.0"),
        ({"r": -1.0}, "r: got -1.0"),
        ({"r": math.nan}, "r: got nan"),
        ({"delta": 0}, "delta: got 0"),
        ({"losses": torch.tensor([1.0, math.nan, math.inf])}, "2 of 3 are NaN or infinite, the first at position 1"),
        ({"losses": torch.tensor([])}, "there are none"),
        ({"losses": torch.ones(2, 2)}, "shape \\(2, 2\\)"),
        ({"losses": torch.tensor(1.0)}, "reduction='none'"),
        ({"losses": torch.ones(2, dtype=torch.int64)}, "int64"),
        ({"prior": torch.tensor([1.0, 1.0, -1.0, 1.0])}, "prior: every entry"),
        ({"prior": torch.ones(3)}, "prior: shape \\(3,\\) for 4 samples"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, "valid: shape"),
    ],
)
def test_bad_input_to_weights(arguments: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        loss_weights(**{"losses": LOSSES, **arguments})


def test_diagnostics() -> None:
    told = weight_diagnostics(torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([4.0, 2.0, 2.0, 0.0]))
    assert told == pytest.approx((2.0, 1 / 0.375, 1.0))
    assert math.isnan(weight_diagnostics(torch.full((7,), 1 / 7), rows(7)).correlation)
    with pytest.raises(InputError, match="positive sum"):
        weight_diagnostics(torch.zeros(3))
    with pytest.raises(InputError, match="losses: shape"):
        weight_diagnostics(torch.ones(3) / 3, LOSSES)


# Sequences


def test_sequence_losses_are_means_over_shifted_targets() -> None:
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 3:] = -100
    labels[2] = -100
    losses, tokens = per_sequence_loss(logits, labels)
    assert tokens.tolist() == [2, 5, 0] and losses[2] == 0
    torch.testing.assert_close(losses[0], cross_entropy(logits[0, :2], labels[0, 1:3]))
    torch.testing.assert_close(losses[1], cross_entropy(logits[1, :5], labels[1, 1:]))
    unshifted, counts = per_sequence_loss(logits, labels, shift=False)
    assert counts.tolist() == [3, 6, 0]
    torch.testing.assert_close(unshifted[1], cross_entropy(logits[1], labels[1]))


def test_the_loss_of_a_transformers_model_is_the_token_mean() -> None:
    model = ranks.language_model()
    batch = torch.stack([ranks.Sequences()[row]["labels"] for row in range(6)])
    output = model(input_ids=batch.clamp(min=0), labels=batch)
    losses, tokens = per_sequence_loss(output.logits, batch)
    torch.testing.assert_close((losses * tokens).sum() / tokens.sum(), output.loss)
    uniform = LossReweighter("uniform", burn_in=0, length_weight="token")
    torch.testing.assert_close(uniform(losses, tokens), output.loss)


def test_packed_documents_get_losses_of_their_own() -> None:
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [7, 7, 7, 7, 7, 7]])
    losses, tokens = per_sequence_loss(logits, labels, segments=segments)
    assert tokens.tolist() == [2, 2, 5]  # the first token of a document is predicted from nothing
    torch.testing.assert_close(losses[0], cross_entropy(logits[0, :2], labels[0, 1:3]))
    torch.testing.assert_close(losses[1], cross_entropy(logits[0, 3:5], labels[0, 4:6]))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), "labels: shape \\(2, 5\\)"),
        (torch.zeros(2, 6), "labels: got torch.float32"),
        (torch.full((2, 6), 5), "labels: 5 is no token of a vocabulary of 5"),
        (torch.full((2, 6), -1), "labels: -1 is no token"),
    ],
)
def test_bad_labels(labels: torch.Tensor, told: str) -> None:
    with pytest.raises(InputError, match=told):
        per_sequence_loss(torch.zeros(2, 6, 5), labels)


# The loss


def test_gradients_are_weighted_and_weights_are_constants() -> None:
    losses = LOSSES.clone().requires_grad_()
    loss = LossReweighter(burn_in=0)(losses)
    loss.backward()
    weights = loss_weights(LOSSES)
    torch.testing.assert_close(losses.grad, weights)
    torch.testing.assert_close(loss.detach(), (weights * LOSSES).sum())


def test_lengths_share_the_weight_as_in_the_published_trainer() -> None:
    tokens = torch.tensor([4, 1, 2, 3])
    found = LossReweighter(burn_in=0, length_weight="token").coefficients(LOSSES, tokens)
    torch.testing.assert_close(found, loss_weights(LOSSES) * tokens / 10 * 4)
    same = LossReweighter(burn_in=0, length_weight="token").coefficients(LOSSES, torch.full((4,), 9))
    torch.testing.assert_close(same, loss_weights(LOSSES))  # of equal lengths, both forms agree


def test_burn_in_and_schedule() -> None:
    losses = LOSSES.clone().requires_grad_()
    uniform, weighted = torch.full((4,), 0.25), loss_weights(LOSSES)
    loss_of = LossReweighter(burn_in=2)
    found = [(loss_of(losses), loss_of.last_weights)[1] for _ in range(3)]
    for one, expected in zip(found, [uniform, uniform, weighted]):
        torch.testing.assert_close(one, expected)
    assert int(loss_of.steps) == 3 and loss_of.diagnostics()["burning"] == 0
    share = LossReweighter(burn_in=0.1)
    torch.testing.assert_close(share.coefficients(LOSSES, step=1, total_steps=20), uniform)
    torch.testing.assert_close(share.coefficients(LOSSES, step=2, total_steps=20), weighted)
    scheduled = LossReweighter(burn_in=0, r_schedule=lambda step, total: 100.0 if step < 3 else 0.7)
    torch.testing.assert_close(scheduled.coefficients(LOSSES, step=2), loss_weights(LOSSES, r=100.0))
    torch.testing.assert_close(scheduled.coefficients(LOSSES, step=3), loss_weights(LOSSES, r=0.7))


def test_evaluation_is_the_plain_mean_and_no_step() -> None:
    losses = LOSSES.clone().requires_grad_()
    loss_of = LossReweighter(burn_in=0).eval()
    assert float(loss_of(losses).detach()) == 2.75
    loss_of.train()
    with torch.no_grad():
        assert float(loss_of(losses)) == 2.75
        assert float(loss_of(losses, torch.tensor([1, 1, 0, 1]))) == pytest.approx(8 / 3)
    assert int(loss_of.steps) == 0


def test_a_checkpoint_goes_on_where_it_was() -> None:
    loss_of = LossReweighter(burn_in=2)
    loss_of(LOSSES.clone().requires_grad_())
    other = LossReweighter(burn_in=2)
    other.load_state_dict(loss_of.state_dict())
    assert int(other.steps) == 1


def test_a_batch_without_targets_teaches_nothing() -> None:
    losses = torch.tensor([torch.nan, 0.0], requires_grad=True)
    loss_of = LossReweighter(burn_in=0)
    loss = loss_of(losses, torch.tensor([0, 0]))
    loss.backward()
    assert float(loss.detach()) == 0 and losses.grad.tolist() == [0, 0]
    assert loss_of.diagnostics()["effective_samples"] == 0


def test_scores_of_any_method_are_a_prior(tmp_path: Path) -> None:
    Scores([0.0, 1.0, 2.0, 3.0], ["a", "b", "c", "d"], "sample", {"method": "gais"}).save(tmp_path / "s.parquet")
    scores = Scores.load(tmp_path / "s.parquet")
    fixed = LossReweighter("uniform", burn_in=0, scores=scores, temperature=2.0)
    found = fixed.coefficients(LOSSES, ids=["d", "c", "b", "a"])
    torch.testing.assert_close(found, torch.softmax(torch.tensor([3.0, 2, 1, 0]) / 2, 0))
    both = LossReweighter(burn_in=0, scores=scores).coefficients(LOSSES, ids=["a", "b", "c", "d"])
    expected = loss_weights(LOSSES) * torch.tensor([0.0, 1, 2, 3]).exp()
    torch.testing.assert_close(both, expected / expected.sum())
    with pytest.raises(InputError, match="needs the ids"):
        fixed(LOSSES.clone().requires_grad_())
    with pytest.raises(InputError, match="ids: 'e' has no score"):
        fixed.coefficients(LOSSES, ids=["a", "b", "c", "e"])
    with pytest.raises(InputError, match="scores: of tokens"):
        LossReweighter(scores=Scores([1.0], ["a"], "token"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"burn_in": 1.0}, "burn_in: got 1.0"),
        ({"burn_in": -1}, "burn_in: got -1"),
        ({"burn_in": True}, "burn_in: got True"),
        ({"length_weight": "tokens"}, "length_weight: got 'tokens'"),
        ({"r_schedule": 0.4}, "r_schedule: got 0.4"),
        ({"strategy": "upper"}, "strategy: got 'upper'"),
        ({"r": 0}, "r: got 0"),
    ],
)
def test_bad_parameters(arguments: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        LossReweighter(**arguments)


def test_bad_calls() -> None:
    with pytest.raises(InputError, match=r"total_steps: burn_in=.* is a share"):
        LossReweighter().coefficients(LOSSES)
    with pytest.raises(InputError, match="tokens: length_weight"):
        LossReweighter(burn_in=0, length_weight="token").coefficients(LOSSES)
    with pytest.raises(InputError, match=r"r_schedule: gave .* at step 4"):
        LossReweighter(burn_in=0, r_schedule=lambda step, total: 0.0).coefficients(LOSSES, step=4)
    with pytest.raises(InputError, match="no training step"):
        LossReweighter().diagnostics()
    with pytest.raises(InputError, match="micro_batches"):
        LossReweighter(burn_in=0).backward(lambda batch: batch, [])


def test_micro_batches_weighed_as_one_batch() -> None:
    whole, parted = ranks.linear(), ranks.linear()

    def losses_of(model: nn.Module):
        return lambda part: ((model(ranks.X[part]).squeeze(1) - ranks.Y[part]).square(), ranks.TOKENS[part])

    loss = LossReweighter(burn_in=0)(*losses_of(whole)(slice(0, 8)))
    loss.backward()
    found = LossReweighter(burn_in=0).backward(losses_of(parted), [slice(0, 2), slice(2, 3), slice(3, 8)])
    torch.testing.assert_close(found, loss.detach())
    for one, other in zip(whole.parameters(), parted.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


# Under a Trainer, in one process and in two


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """Results of both ranks: tensors, and what they told."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(salience.__file__).parents[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
              "PYTHONPATH": source}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)
    return (
        [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)],
        [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)],
    )


@pytest.mark.parametrize("way", ranks.WAYS)
def test_two_processes_take_the_gradient_of_their_one_batch(two, way: str) -> None:
    expected = ranks.gradients(ranks.linear(), way, slice(0, 8))
    for name in ("weight", "bias"):
        for result in two[0]:
            torch.testing.assert_close(result[f"{way}:{name}"], expected[name], rtol=1e-6, atol=1e-6)
    together = torch.cat([result[f"{way}:weights"] for result in two[0]])
    torch.testing.assert_close(together, expected["weights"])


def test_losses_are_normalised_over_all_processes(two) -> None:
    torch.testing.assert_close(torch.cat([result["pair"] for result in two[0]]), loss_weights(LOSSES))
    alone = torch.cat([loss_weights(LOSSES[:2]), loss_weights(LOSSES[2:])]) / 2
    assert not torch.allclose(alone, loss_weights(LOSSES), atol=0.05)  # what each by itself would give
    for told in two[1]:  # both processes stop, none waits for the other
        assert "1 of 4 are NaN or infinite, the first at position 3" in told["error"]


def by_hand(batch: int, accumulate: int) -> tuple[nn.Module, list[float]]:
    """What the trainer is to do: two epochs of plain gradient descent on the mean over micro-batches."""
    model, data, step, evaluated = ranks.language_model(), ranks.Sequences(), 0, []
    model.train()
    for _ in range(2):
        batches = [range(start, start + batch) for start in range(0, 20, batch)]
        for first in range(0, len(batches), accumulate):
            group = batches[first : first + accumulate]
            model.zero_grad()
            for members in group:
                labels = torch.stack([data[row]["labels"] for row in members])
                inputs = torch.stack([data[row]["input_ids"] for row in members])
                losses, _ = per_sequence_loss(model(input_ids=inputs).logits, labels)
                weights = loss_weights(losses.detach(), "linupper" if step else "uniform", r=0.5)
                ((weights * losses).sum() / len(group)).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.5 * parameter.grad
            step += 1
        with torch.no_grad():
            everything = [data[row] for row in range(20)]
            logits = model(input_ids=torch.stack([row["input_ids"] for row in everything])).logits
            evaluated.append(float(per_sequence_loss(logits, torch.stack([r["labels"] for r in everything]))[0].mean()))
    return model, evaluated


def test_a_trainer_does_what_a_loop_by_hand_does_in_one_process_and_in_two(two, tmp_path: Path) -> None:
    expected, evaluated = by_hand(batch=4, accumulate=3)
    found, trainer = ranks.train(tmp_path, batch=4)
    told = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert told == pytest.approx(evaluated, abs=1e-5)
    for result in two[1]:
        assert result["eval_loss"] == pytest.approx(evaluated, abs=1e-5)
    start = dict(ranks.language_model().named_parameters())
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=1e-5, atol=1e-6)
        for result in two[0]:
            torch.testing.assert_close(result[f"trainer:{name}"], value.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected.transformer.wte.weight, start["transformer.wte.weight"], atol=1e-2)


def test_scores_reach_a_trainer_by_a_column_of_ids(tmp_path: Path) -> None:
    only_four = Scores([0.0 if row == 4 else -200.0 for row in range(20)], range(20), "sample")
    found, _ = ranks.train(tmp_path, batch=20, accumulate=1, scores=only_four)
    model, row = ranks.language_model(), ranks.Sequences()[4]
    for _ in range(2):
        model.zero_grad()
        per_sequence_loss(model(input_ids=row["input_ids"][None]).logits, row["labels"][None]).losses.sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    for name, value in model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value, rtol=1e-4, atol=1e-5)
    assert not found._forward_pre_hooks


def test_rows_are_classified_too_and_misuse_is_told() -> None:
    loss_of = TrainerReweighting(LossReweighter(burn_in=0))
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, -100, 1])
    with pytest.raises(InputError, match="callbacks"):
        loss_of((logits,), labels)

    class Arguments:
        n_gpu, average_tokens_across_devices, world_size = 1, True, 1

    loss_of.on_init_end(Arguments(), None, None)
    losses = cross_entropy(logits, labels, reduction="none")
    weights = loss_weights(losses, valid=labels >= 0)
    logits.requires_grad_()
    torch.testing.assert_close(loss_of((logits,), labels).detach(), (weights * losses).sum())
    Arguments.n_gpu = 2
    with pytest.raises(InputError, match="DataParallel"):
        loss_of.on_init_end(Arguments(), None, None)
    Arguments.n_gpu = 1
    translator = nn.Linear(1, 1)
    translator.config = type("Config", (), {"is_encoder_decoder": True})()
    with pytest.raises(InputError, match="encoder-decoder"):
        loss_of.on_init_end(Arguments(), None, None, model=translator)
