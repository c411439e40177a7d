"""Bias loss and SkipblockNet: weights worked by hand, the published code's figures, identities, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from salience.data import (
    BiasLoss,
    LossReweighter,
    SkipBlock,
    SkipblockNet,
    TrainerBiasLoss,
    diversity_report,
    diversity_scores,
    feature_variance,
)
from salience.errors import InputError
from salience.model import capture, layer_flops
from tiny import build, example

OFFICIAL = json.loads((Path(__file__).parent / "bias_loss_official.json").read_text())
# Variances 0, 1, 4 (half the difference, squared, times two over one).
FEATURES = torch.tensor([[5.0, 5.0], [0.0, math.sqrt(2)], [-math.sqrt(2), math.sqrt(2)]])
LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.5]])
TARGET = torch.tensor([0, 1, 2])
EACH = cross_entropy(LOGITS, TARGET, reduction="none")


def batch(seed: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((rows, 4, 3, 3)) * rng.uniform(0.5, 2, (rows, 1, 1, 1))
    logits = rng.standard_normal((rows, 5))
    return torch.from_numpy(features).float(), torch.from_numpy(logits).float(), torch.arange(rows) % 5


def test_variance_is_over_all_entries_of_a_sample() -> None:
    torch.testing.assert_close(feature_variance(FEATURES), torch.tensor([0.0, 1.0, 4.0]))
    features = batch(0)[0]
    found = feature_variance(features)
    expected = [np.var(sample.numpy().ravel(), ddof=1) for sample in features]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    torch.testing.assert_close(feature_variance(features.flatten(2)), found)  # (batch, tokens, width)
    half = feature_variance((features * 200).half())
    assert half.dtype == torch.float32 and bool(half.isfinite().all())  # the squares are beyond half precision
    assert feature_variance(features.double()).dtype == torch.float64


def test_weights_worked_by_hand() -> None:
    loss_of = BiasLoss(alpha=0.3, beta=0.3)
    loss = loss_of(FEATURES, LOGITS, TARGET)
    weights = torch.tensor([0.7, math.exp(0.3 / 4) - 0.3, math.exp(0.3) - 0.3])
    torch.testing.assert_close(loss_of.last_weights, weights)
    torch.testing.assert_close(loss, (weights * EACH).mean())
    torch.testing.assert_close(BiasLoss(reduction="sum")(FEATURES, LOGITS, TARGET), (weights * EACH).sum())
    torch.testing.assert_close(BiasLoss(reduction="none")(FEATURES, LOGITS, TARGET), weights * EACH)


def test_global_mode_remembers_the_smallest_variance_of_training() -> None:
    loss_of = BiasLoss(mode="global")
    loss_of(FEATURES, LOGITS, TARGET)
    assert float(loss_of.least) == 0
    later = FEATURES * 2 + torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])  # variances 2, 4, 16
    loss_of(later, LOGITS, TARGET)
    expected = torch.tensor([2.0, 4.0, 16.0]) / 14  # least 0, over the batch's own range: beyond 1
    torch.testing.assert_close(loss_of.last_weights, (0.3 * expected).exp() - 0.3)
    other = BiasLoss(mode="global")
    other.load_state_dict(loss_of.state_dict())
    assert float(other.least) == 0
    loss_of.eval()(FEATURES - 5, LOGITS, TARGET)
    fresh = BiasLoss(mode="global").eval()
    fresh(FEATURES, LOGITS, TARGET)
    assert math.isinf(float(fresh.least)), "evaluation moved the running minimum"


@pytest.mark.parametrize("mode", ["local", "global"])
def test_the_same_as_the_published_loss_over_a_run(mode: str) -> None:
    loss_of = BiasLoss(mode=mode)
    assert [float(loss_of(*batch(seed))) for seed in range(4)] == pytest.approx(OFFICIAL[mode], abs=1e-6)


@pytest.mark.parametrize("mode", ["local", "global"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])},
     {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]), "label_smoothing": 0.2}],
)  # fmt: skip
def test_without_alpha_and_beta_it_is_cross_entropy(options: dict, mode: str) -> None:
    features, logits, target = batch(0)
    logits = logits.double()  # in single precision the last digit alone is 1.2e-7
    options = {name: value.double() if name == "weight" else value for name, value in options.items()}
    target[2] = -100
    features.requires_grad_()
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = BiasLoss(0.0, 0.0, mode, **options)(features, ours, target)
    expected = cross_entropy(plain, target, **options)
    assert float((loss - expected).detach().abs()) <= 1e-7
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-7)
    assert features.grad is None, "gradient flowed through the weights"


def test_evaluation_is_plain_cross_entropy() -> None:
    features, logits, target = batch(0)
    torch.testing.assert_close(BiasLoss().eval()(features, logits, target), cross_entropy(logits, target))


def test_ignored_samples_are_in_no_range_and_no_mean() -> None:
    features = torch.cat([FEATURES, torch.tensor([[0.0, 100.0]])])
    logits, target = torch.cat([LOGITS, LOGITS[:1]]), torch.tensor([0, 1, 2, -100])
    loss_of = BiasLoss()
    torch.testing.assert_close(loss_of(features, logits, target), BiasLoss()(FEATURES, LOGITS, TARGET))
    assert loss_of.last_weights[3] == 0
    assert float(BiasLoss()(features, logits, torch.full((4,), -100))) == 0


def test_targets_may_be_probabilities() -> None:
    soft = torch.softmax(LOGITS.flip(1), 1)
    loss_of = BiasLoss()
    loss = loss_of(FEATURES, LOGITS, soft)
    torch.testing.assert_close(loss, (loss_of.last_weights * cross_entropy(LOGITS, soft, reduction="none")).mean())


@pytest.mark.parametrize("mode", ["local", "global"])
def test_equal_variances_weigh_alike(mode: str) -> None:
    loss_of = BiasLoss(mode=mode)
    same = FEATURES[1:2].expand(3, 2) + torch.tensor([[0.0], [3.0], [9.0]])
    loss_of(same, LOGITS, TARGET)
    torch.testing.assert_close(loss_of.last_weights, torch.full((3,), 0.7))
    loss = loss_of(FEATURES[:1], LOGITS[:1], TARGET[:1])
    torch.testing.assert_close(loss, 0.7 * EACH[0])


def test_global_mode_says_so_when_it_overflows() -> None:
    loss_of = BiasLoss(mode="global")
    loss_of(FEATURES, LOGITS, TARGET)
    nearly = torch.tensor([[0.0, 1e3], [0.0, 1.0001e3], [0.0, 1.00005e3]])
    with pytest.raises(InputError, match="range of the batch"):
        loss_of(nearly, LOGITS, TARGET)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"alpha": -0.1}, "alpha: got -0.1"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"beta": 1.0}, "beta: got 1.0"),
        ({"mode": "batch"}, "mode: got 'batch'"),
        ({"reduction": "avg"}, "reduction: got 'avg'"),
        ({"label_smoothing": 2.0}, "label_smoothing: got 2.0"),
    ],
)
def test_bad_parameters(arguments: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        BiasLoss(**arguments)


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (torch.zeros(3), "features: got torch.float32 of shape \\(3,\\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "int64"),
        (torch.zeros(3, 1, 1, 1), "one entry per sample"),
        (torch.zeros(2, 4), "features: of 2 samples, but there are 3"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan], [0.0, math.inf]]), "of sample 1 in the batch .* \\(2 such"),
    ],
)
def test_bad_features(features: torch.Tensor, told: str) -> None:
    with pytest.raises(InputError, match=told):
        BiasLoss()(features, LOGITS, TARGET)


def test_bad_logits_and_no_samples() -> None:
    with pytest.raises(InputError, match="logits and target"):
        BiasLoss()(FEATURES, LOGITS, TARGET[:2])
    with pytest.raises(InputError, match="no samples"):
        feature_variance(torch.zeros(0, 4))


# The network


def filled(net: nn.Module) -> nn.Module:
    """The network with weights drawn tensor by tensor, in the order of its state."""
    with torch.no_grad():
        for at, (name, tensor) in enumerate(net.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            drawn = np.random.default_rng(at).standard_normal(tuple(tensor.shape))
            if name.endswith("running_var"):
                drawn = 1 + np.abs(drawn)
            elif tensor.ndim == 1:
                drawn = 0.3 * drawn + (1 if name.endswith("weight") else 0)
            else:
                drawn = drawn * (2 / np.prod(tensor.shape[1:])) ** 0.5
            tensor.copy_(torch.from_numpy(drawn))
    return net.eval()


def test_the_same_logits_as_the_published_network() -> None:
    images = torch.from_numpy(np.random.default_rng(99).standard_normal((2, 3, 224, 224))).float()
    with torch.no_grad():
        logits, features = filled(SkipblockNet(10))(images, return_features=True)
    assert features.shape == (2, 960, 7, 7)
    np.testing.assert_allclose(logits, OFFICIAL["logits"], atol=1e-5)


def test_parameters_and_multiply_adds_of_the_paper() -> None:
    net = SkipblockNet()
    assert sum(p.numel() for p in net.parameters()) == 5_532_352
    operations = sum(layer_flops(net, torch.zeros(1, 3, 224, 224)).values()) / 2
    assert operations / 1e6 == pytest.approx(236.6, abs=0.05)


@pytest.mark.parametrize(("width", "side", "channels"), [(0.25, 32, 1), (0.5, 48, 3), (1.5, 64, 3)])
def test_other_widths_and_resolutions(width: float, side: int, channels: int) -> None:
    net = SkipblockNet(7, width, channels, generator=torch.Generator().manual_seed(0))
    again = SkipblockNet(7, width, channels, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    logits, features = net(images, return_features=True)
    assert logits.shape == (2, 7) and features.ndim == 4
    assert torch.equal(net.conv[0].weight, again.conv[0].weight)
    BiasLoss()(features, logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_both_skips_read_the_early_features() -> None:
    net = filled(SkipblockNet(5, 0.5))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(net, ["base", "stages.0", "stages.1", "skip1", "skip2"]) as at:
        net(images)
        torch.testing.assert_close(net.skip1(at["base"], at["stages.0"].shape[-2:]), at["skip1"])
        torch.testing.assert_close(net.stages[1](at["stages.0"] + at["skip1"]), at["stages.1"])
        torch.testing.assert_close(net.skip2(at["base"], at["stages.1"].shape[-2:]), at["skip2"])


def test_a_skip_block_adds_itself_where_shapes_agree() -> None:
    block = SkipBlock(8, 16, 8, 3, size=4).eval()
    nn.init.zeros_(block.body[-1].weight)
    images = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(block(images), nn.functional.avg_pool2d(images, 2))
        assert SkipBlock(8, 16, 8, 3, stride=2)(images, size=4).shape == (2, 8, 2, 2)


def test_bad_networks() -> None:
    with pytest.raises(InputError, match="size: give it"):
        SkipBlock(8, 16, 8, 3)(torch.zeros(1, 8, 4, 4))
    for arguments in ((8, 16, 8, 4), (8, 16, 8, 3, 3), (0, 16, 8, 3)):
        with pytest.raises(InputError, match="odd kernel"):
            SkipBlock(*arguments)
    for options in ({"width": 0.0}, {"num_classes": 0}, {"dropout": 1.0}, {"in_channels": 0}):
        with pytest.raises(InputError, match="num_classes, in_channels, width, dropout"):
            SkipblockNet(**options)
    with pytest.raises(InputError, match=r"x: shape \(2, 1, 32, 32\); \(batch, 3"):
        SkipblockNet(4, 0.25)(torch.zeros(2, 1, 32, 32))


# Data sets and trainers


def test_samples_ranked_by_the_variance_of_their_features() -> None:
    model = build("plain")
    images = example("plain", rows=5) * torch.tensor([1.0, 0.1, 3.0, 0.5, 2.0]).view(5, 1, 1, 1)
    scores = diversity_scores(model, images, "relu2", ids=["a", "b", "c", "d", "e"], batch_size=2)
    assert (scores.values.min(), scores.values.max()) == (0, 1) and scores.unit == "sample"
    assert list(scores.top(1).ids) == ["c"] and scores.values[1] < 0.1
    with torch.no_grad(), capture(model, "relu2") as at:
        logits = model(images)
        variance = feature_variance(at["relu2"]).numpy()
    np.testing.assert_allclose(scores.values, (variance - variance.min()) / np.ptp(variance), atol=1e-6)
    targets = logits.argmax(1)
    targets[0] = (targets[0] + 1) % 3
    report = diversity_report(model, images, targets, "relu2")
    told = report.summary()
    assert report.correct.tolist() == [False, True, True, True, True]
    assert told["wrong"] == pytest.approx(float(variance[0])) and told["all"] == pytest.approx(variance.mean())
    assert told["quantile 0.5"] == pytest.approx(float(np.median(variance)))
    weights = LossReweighter("uniform", burn_in=0, scores=scores).coefficients(torch.ones(2), ids=["c", "b"])
    assert weights[0] > weights[1]
    with pytest.raises(InputError, match="targets: shape"):
        diversity_report(model, images, targets[:2], "relu2")
    with pytest.raises(InputError, match="no layer 'relu3'"):
        diversity_scores(model, images, "relu3")


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(row)) * (1 + row % 4)
        return {"pixel_values": pixels, "labels": torch.tensor(row % 3)}


def test_a_trainer_does_what_a_loop_by_hand_does(tmp_path: Path) -> None:
    layer = "resnet.encoder.stages.1"
    bias = TrainerBiasLoss(layer, BiasLoss(alpha=1.0))
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=6, num_train_epochs=2, optim="sgd", learning_rate=0.01,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, train_sampling_strategy="sequential", eval_strategy="epoch", prediction_loss_only=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        build("resnet"), arguments, train_dataset=Pictures(), eval_dataset=Pictures(), compute_loss_func=bias,
        callbacks=[bias],
    )  # fmt: skip
    trainer.train()
    by_hand = build("resnet").train()
    images = torch.stack([Pictures()[row]["pixel_values"] for row in range(12)])
    labels = torch.arange(12) % 3
    for _ in range(2):
        for rows in (slice(0, 6), slice(6, 12)):
            by_hand.zero_grad()
            with capture(by_hand, layer) as at:
                logits = by_hand(images[rows]).logits
            variance = at[layer].detach().flatten(1).var(1)
            weights = ((variance - variance.min()) / (variance.max() - variance.min())).exp() - 0.3
            (weights * cross_entropy(logits, labels[rows], reduction="none")).mean().backward()
            with torch.no_grad():
                for parameter in by_hand.parameters():
                    parameter -= 0.01 * parameter.grad
    for name, value in by_hand.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), value, rtol=1e-4, atol=1e-5)
    told = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    with torch.no_grad():
        plain = float(cross_entropy(by_hand.eval()(images).logits, labels))
    assert told[-1] == pytest.approx(plain, rel=1e-4)
    assert not any(module._forward_hooks for module in trainer.model.modules())
    with pytest.raises(InputError, match="no layer 'nowhere'"):
        transformers.Trainer(
            build("resnet"), arguments, eval_dataset=Pictures(), callbacks=[TrainerBiasLoss("nowhere")]
        )
