"""BN-only training: what is chosen, what stays frozen bit for bit, what the scales say."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from salience.errors import InputError, NothingToDo
from salience.weights import (
    CifarResNet,
    hold_frozen,
    select_params,
    train_subset,
)
from tiny import build, state_hash

IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resnet(depth: int = 8, width: int = 4) -> CifarResNet:
    return CifarResNet(depth, width, in_channels=1, num_classes=3, generator=generator())


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def frozen_changes(before: dict[str, torch.Tensor], model: nn.Module, selection) -> int:
    """Entries outside the selection whose bits differ from `before`."""
    changed = 0
    for name, now in values(model).items():
        different = now.view(torch.int32) != before[name].view(torch.int32)
        if name in selection.masks:
            different &= ~selection.masks[name]
        elif name in selection.names:
            continue
        changed += int(different.sum())
    return changed


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Which parameters


@pytest.mark.parametrize(("depth", "width"), [(8, 4), (14, 8), (20, 16)])
def test_scales_and_shifts_by_the_formula(depth: int, width: int) -> None:
    # Stem W; a segment has 2 layers in each of D blocks, of W, 2W, 4W channels; shortcuts have 2W and 4W.
    blocks = (depth - 2) // 6
    channels = width + 2 * blocks * 7 * width + 6 * width
    model = resnet(depth, width)
    assert select_params(model, "bn").count == 2 * channels
    control = select_params(model, "per_channel", generator=generator())
    assert control.count == 2 * channels and not control.shortfall
    assert select_params(model, "random", generator=generator()).count == 2 * channels


def test_a_resnet_14_by_hand() -> None:
    model = resnet(14, 8)
    assert select_params(model, "bn").count == 560  # 2 x 280 channels
    # stem 72; 3 x 3 kernels 4 x 576, 1152 + 3 x 2304, 4608 + 3 x 9216; shortcuts 128 and 512; output 99
    convolutions = 72 + 2304 + 8064 + 32256 + 128 + 512
    assert select_params(model, "all").count == convolutions + 560 + 3 * 32 + 3
    assert select_params(model, "others").count == convolutions
    assert select_params(model, "output").names == ("fc.weight", "fc.bias")


def test_groups_divide_the_parameters() -> None:
    model = resnet()
    everything = {name for name, _ in model.named_parameters()}
    parts = [set(select_params(model, which).names) for which in ("bn", "output", "others")]
    assert set().union(*parts) == everything and sum(map(len, parts)) == len(everything)
    assert set(select_params(model, "bn+output").names) == parts[0] | parts[1]
    assert set(select_params(model, "norm+output+others").names) == everything
    frozen_norm = select_params(model, "output+others")
    assert trainable(model) == set(frozen_norm.names) == everything - parts[0]


def test_the_flags_are_those_of_the_selection() -> None:
    model = resnet().eval()
    before = values(model)
    chosen = select_params(model, "bn")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert "blocks.1.shortcut.1" in layers
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert trainable(model) == set(chosen.names) == expected
    assert not model.training and all(torch.equal(now, before[name]) for name, now in values(model).items())


def test_two_weights_in_every_channel() -> None:
    model = resnet()
    chosen = select_params(model, "per_channel", generator=generator())
    weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(chosen.masks) == sorted(weights) == sorted(chosen.names)
    for name, mask in chosen.masks.items():
        assert mask.shape == model.get_parameter(name).shape
        assert (mask.flatten(1).sum(1) == 2).all(), name
    places = torch.cat([mask.flatten(1).float() for mask in chosen.masks.values() if mask[0].numel() == 36])
    assert (places.sum(0) > 0).sum() > 18  # of 36 places: not the same two each time


def test_random_entries_are_spread_and_spare_normalisation() -> None:
    model = resnet(14, 8)
    chosen = select_params(model, "random", generator=generator())
    assert not set(chosen.names) & set(select_params(model, "bn").names)
    per_channel = torch.cat([mask.flatten(1).sum(1) for name, mask in chosen.masks.items() if "conv" in name])
    assert per_channel.unique().numel() > 3  # unlike the matched control


@pytest.mark.parametrize("which", ["per_channel", "random"])
def test_masks_follow_the_seed(which: str) -> None:
    model = resnet()
    one, again, other = (select_params(model, which, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one.masks[name], again.masks[name]) for name in one.masks)
    assert any(not torch.equal(one.masks[name], other.masks[name]) for name in set(one.masks) & set(other.masks))


def test_include_and_exclude() -> None:
    model = resnet()
    with_shortcut = select_params(model, "bn", include=["*.shortcut.*"])
    assert set(with_shortcut.names) == set(select_params(model, "bn").names) | {
        "blocks.1.shortcut.0.weight",
        "blocks.2.shortcut.0.weight",
    }
    scales = select_params(model, "bn", exclude="*.bias")
    assert scales.names and all(name.endswith(".weight") for name in scales.names)
    whole = select_params(model, "per_channel", generator=generator(), include=["conv.weight"])
    control = select_params(model, "per_channel", generator=generator())
    assert "conv.weight" not in whole.masks
    assert whole.count == control.count - 2 * 4 + 36  # the stem: 4 channels of 9 weights


def test_tied_parameters_are_chosen_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[2].weight = model[0].weight
    chosen = select_params(model, "bn")
    assert chosen.names == ("0.weight", "0.bias", "2.bias") and chosen.count == 12
    tied = select_params(build("gpt2"), "output")  # its output layer is the embedding of the tokens
    assert tied.names == ("transformer.wte.weight",)


def test_a_channel_with_one_weight_gives_one() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1))
    chosen = select_params(model, "per_channel", generator=generator())
    assert chosen.shortfall == {"0.weight": 6}
    assert chosen.count == 6 + 2 * 3
    assert select_params(model, "bn").count == 12


@pytest.mark.parametrize(
    ("family", "layers", "has_shift"),
    [("gpt2", 2 * 3 + 1, True), ("llama", 2 * 3 + 1, False), ("vit", 2 * 3 + 1, True), ("t5", 5 + 7, False)],
)
def test_normalisation_of_transformers(family: str, layers: int, has_shift: bool) -> None:
    # t5: two layers of encoder blocks with 2 and decoder blocks with 3 normalisations, and one at each end
    model = build(family)
    chosen = select_params(model, "norm")
    assert trainable(model) == set(chosen.names)
    assert chosen.count == 32 * layers * (2 if has_shift else 1)
    assert sum(name.endswith("bias") for name in chosen.names) == (layers if has_shift else 0)
    with pytest.raises(InputError, match=r"has no batch normalisation; it has .*which='norm'"):
        select_params(model, "bn")


def test_batch_normalisation_of_transformers() -> None:
    model = build("resnet")
    chosen = select_params(model, "bn")
    assert chosen.count == 2 * sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert select_params(model, "output").names == ("classifier.1.weight", "classifier.1.bias")


def test_other_normalisation_layers_count() -> None:
    layers = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 2, 2]), nn.RMSNorm(2)]
    assert select_params(nn.Sequential(*layers), "norm").count == 8 + 8 + 32 + 2
    assert select_params(nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)), "bn").names == (
        "0.weight",
        "0.bias",
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_names_are_those_that_peft_tunes(family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft, whose LNTuning is the peer, is not installed")
    model, ours = build(family), set(select_params(build(family), "norm").names)
    config = peft.LNTuningConfig(task_type="CAUSAL_LM")
    tuned = {name for name, p in peft.get_peft_model(model, config).named_parameters() if p.requires_grad}
    names = {name.removeprefix("base_model.model.").replace("ln_tuning_layers.default.", "") for name in tuned}
    assert names == ours


# Frozen means frozen

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("which", ["bn", "output", "per_channel", "random"])
def test_frozen_entries_keep_their_bits(which: str, optimizer: str) -> None:
    model = resnet()
    chosen = select_params(model, which, generator=generator())
    before = values(model)
    train(model, hold_frozen(OPTIMIZERS[optimizer](model.parameters()), model, chosen))
    assert frozen_changes(before, model, chosen) == 0
    for name in chosen.names:  # and what is chosen does train: each entry that has a gradient
        moved = model.get_parameter(name) != before[name]
        assert moved[chosen.masks[name]].any() if name in chosen.masks else moved.any(), name


def test_masked_gradients_alone_would_not_keep_them() -> None:
    model = resnet()
    chosen = select_params(model, "per_channel", generator=generator())
    before = values(model)
    for name, mask in chosen.masks.items():
        model.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient * mask)
    train(model, OPTIMIZERS["sgd"](model.parameters()))
    assert frozen_changes(before, model, chosen) > 1000


def test_gradients_from_before_the_selection_are_not_applied() -> None:
    model = resnet()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    chosen, before = select_params(model, "bn"), values(model)
    hold_frozen(optimizer, model, chosen).step()
    assert frozen_changes(before, model, chosen) == 0
    assert not torch.equal(model.bn.weight, before["bn.weight"])


def test_a_masked_step_is_the_plain_step_on_the_trainable_entries() -> None:
    plain, masked = resnet(), resnet()
    chosen = select_params(masked, "per_channel", generator=generator())
    start = values(masked)
    train(plain, OPTIMIZERS["sgd"](plain.parameters()), steps=1)
    train(masked, hold_frozen(OPTIMIZERS["sgd"](masked.parameters()), masked, chosen), steps=1)
    for name, mask in chosen.masks.items():
        expected = torch.where(mask, plain.get_parameter(name), start[name])
        assert torch.equal(masked.get_parameter(name), expected), name


def test_momentum_of_frozen_entries_stays_zero() -> None:
    model = resnet()
    chosen = select_params(model, "per_channel", generator=generator())
    optimizer = hold_frozen(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, chosen)
    train(model, optimizer)
    for name, mask in chosen.masks.items():
        buffer = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert (buffer[~mask] == 0).all() and (buffer[mask] != 0).any()


def test_a_selection_serves_a_copy() -> None:
    model = resnet()
    chosen = select_params(model, "per_channel", generator=generator())
    twin = copy.deepcopy(model)
    before = values(twin)
    train(twin, hold_frozen(OPTIMIZERS["sgd"](twin.parameters()), twin, chosen))
    assert frozen_changes(before, twin, chosen) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_training_by_the_recipe() -> None:
    model = resnet().eval()
    chosen, before = select_params(model, "bn"), values(model)
    mean = model.bn.running_mean.clone()
    history = train_subset(
        model, IMAGES, LABELS, chosen, epochs=8, batch_size=16, weight_decay=0.01, generator=generator()
    )
    assert history.steps == 24 and history.loss[-1] < history.loss[0]
    assert frozen_changes(before, model, chosen) == 0
    assert not torch.equal(model.bn.running_mean, mean)  # statistics adapt although all weights are frozen
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_recipe_is_sgd_with_two_drops() -> None:
    ours, theirs = resnet(), resnet()
    chosen = select_params(ours, "bn")
    select_params(theirs, "bn")
    train_subset(ours, IMAGES, LABELS, chosen, epochs=4, batch_size=48, generator=generator())
    weights = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-4)
    draws = generator()
    torch.randint(2**62, (), generator=draws)  # the loop's own seed
    for rate in (0.1, 0.1, 0.01, 0.001):  # of 4 epochs, drops after 2 and after 3
        optimizer.param_groups[0]["lr"] = rate
        order = torch.randperm(48, generator=draws)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(IMAGES[order]), LABELS[order]).backward()
        optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("which", ["bn", "per_channel"])
def test_training_follows_the_seed(which: str) -> None:
    hashes = []
    for seed in (1, 1, 2):
        model = resnet()
        chosen = select_params(model, which, generator=generator())
        train_subset(model, IMAGES, LABELS, chosen, epochs=2, batch_size=16, generator=generator(seed))
        hashes.append(state_hash(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_one_epoch_is_at_the_full_rate() -> None:
    model = resnet()
    chosen = select_params(model, "output")
    before = values(model)
    train_subset(model, IMAGES, LABELS, chosen, epochs=1, batch_size=48, weight_decay=0.0, generator=generator())
    twin = resnet().train()
    nn.functional.cross_entropy(twin(IMAGES), LABELS).backward()
    torch.testing.assert_close(model.fc.bias, before["fc.bias"] - 0.1 * twin.fc.bias.grad)


# Bad input


def without_statistics() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))


@pytest.mark.parametrize(
    ("model", "which", "told"),
    [
        (nn.Linear(2, 2), "bn", "Linear has no batch normalisation$"),
        (nn.Linear(2, 2), "norm", "Linear has no normalisation layer"),
        (nn.LayerNorm(2), "bn", "has no batch normalisation; it has LayerNorm"),
        (nn.LayerNorm(2, elementwise_affine=False), "norm", "only LayerNorm without scale and shift"),
        (nn.Sequential(nn.BatchNorm2d(2, affine=False)), "bn", "layer '0': affine=False"),
        (without_statistics(), "bn", "layer '1': track_running_stats=False"),
        (without_statistics(), "norm", "layer '1': track_running_stats=False"),
        (nn.Conv2d(1, 1, 1), "output", "Conv2d has no nn.Linear"),
        (nn.Linear(2, 2), "per_channel", "has no convolution"),
        (nn.ConvTranspose2d(2, 2, 3), "per_channel", "transposed"),
        (nn.BatchNorm2d(2), "random", "4 entries of normalisation, but only 0 others"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "per_channel", "computed from other"),
        (nn.BatchNorm2d(2), "batchnorm", "which: got 'batchnorm'; give groups"),
        (nn.BatchNorm2d(2), "bn+all", r"which: got 'bn\+all'; give groups"),
    ],
)
def test_what_cannot_be_selected_says_why(model: nn.Module, which: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        select_params(model, which, generator=generator())
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was done by halves


def test_bad_options_are_named() -> None:
    model = resnet()
    with pytest.raises(InputError, match="generator: which='random' draws at random"):
        select_params(model, "random")
    with pytest.raises(InputError, match=r"include: no parameter is called 'bn.weigth'; nearest names: 'bn.weight'"):
        select_params(model, "bn", include=["bn.weigth"])
    with pytest.raises(InputError, match="exclude: no parameter is called"):
        select_params(model, "bn", exclude=["nothing*"])
    with pytest.raises(NothingToDo, match="leave no parameter to train"):
        select_params(model, "bn", exclude=["*"])


def test_a_selection_must_be_that_of_the_model_and_the_optimiser() -> None:
    model = resnet()
    first = select_params(model, "output")
    select_params(model, "bn")
    with pytest.raises(InputError, match="selection: the model now trains others"):
        hold_frozen(OPTIMIZERS["sgd"](model.parameters()), model, first)
    with pytest.raises(InputError, match="selection: the model now trains others"):
        train_subset(model, IMAGES, LABELS, first, epochs=1, generator=generator())
    second = select_params(model, "bn")
    with pytest.raises(InputError, match=r"optimizer: it lacks the selected parameter 'bn.weight'"):
        hold_frozen(OPTIMIZERS["sgd"]([model.fc.weight]), model, second)


def test_evaluation_mode_is_warned_of_once() -> None:
    model = resnet()
    optimizer = hold_frozen(OPTIMIZERS["sgd"](model.parameters()), model, select_params(model, "bn"))
    model.eval()
    model(IMAGES).sum().backward()
    with pytest.warns(UserWarning, match=r"'bn' and 8 more are in evaluation mode.*model.train\(\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_one_value_per_channel_names_the_layer() -> None:
    model = resnet()  # images of 4 x 4 are 1 x 1 in the last segment
    chosen = select_params(model, "bn")
    with pytest.raises(InputError, match=r"layer 'blocks.2.bn1': one value per channel.*\(1, 16, 1, 1\)"):
        train_subset(model, IMAGES[:, :, :4, :4], LABELS, chosen, epochs=1, batch_size=1, generator=generator())
    assert not any(module._forward_pre_hooks for module in model.modules())
