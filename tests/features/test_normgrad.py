"""The extract-and-aggregate table: worked figures, explicit twins, parity with captum, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, LayerGradientXActivation
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, unfold
from torch.utils.data import DataLoader, TensorDataset

from salience.errors import InputError, NothingToDo
from salience.features import (
    GradCAM,
    Gradient,
    LayerSaliency,
    LinearApproximation,
    LogitsModel,
    MetaSaliency,
    NormGrad,
    PointingGame,
    attribute_batches,
    class_sensitivity,
    default_layers,
    fuse,
    normalise,
    randomization_check,
    spatial_layers,
    weight_layers,
)
from salience.features.attribution import as_grid
from salience.features.normgrad.checks import correlations
from salience.features.normgrad.contributions import AGGREGATES, EXTRACTS, contribution_map
from tiny import build, example, state_hash


def images(rows: int = 3, side: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def fed(family: str, rows: int = 3) -> torch.Tensor:
    inputs = example(family, rows)
    return inputs if isinstance(inputs, torch.Tensor) else inputs["pixel_values"]


class Counted(nn.Module):
    """Counts forward passes, and backward passes through the output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x):
        self.forwards += 1
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self.seen)
        return logits

    def seen(self, gradient):
        self.backwards += 1


# The two phases -------------------------------------------------------------------------------------------------


def explicit(x, g, extract, conv=None):
    """Every entry of every contribution, (batch, entries, height, width)."""
    if extract == "bias":
        return g
    if extract == "scaling":
        return x * g
    batch, _, height, width = g.shape
    if extract == "conv3x3_depthwise":
        around = unfold(x, 3, padding=1).view(batch, x.shape[1], 9, height, width)
        return (around * g[:, :, None]).reshape(batch, -1, height, width)
    groups = 1 if conv is None else conv.groups
    if extract == "conv1x1":
        v = x
    elif extract == "conv3x3":
        v = unfold(x, 3, padding=1).view(batch, -1, height, width)
    else:
        columns = unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        v = columns.view(batch, -1, height, width)
    parts = zip(g.chunk(groups, 1), v.chunk(groups, 1))
    return torch.cat([torch.einsum("bphw,bqhw->bpqhw", a, b).flatten(1, 2) for a, b in parts], 1)


def aggregated(c, how):
    if how == "norm":
        return (c**2).sum(1).sqrt()
    if how == "filter_norm":
        return (torch.relu(c) ** 2).sum(1).sqrt()
    return {"sum": c.sum(1), "max": c.max(1).values, "abs_max": c.abs().max(1).values}[how]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("extract", EXTRACTS)
def test_nothing_is_lost_by_not_forming_the_outer_product(extract, aggregate):
    generator = torch.Generator().manual_seed(0)
    for conv in (
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(2, 0), groups=2),
    ):
        x = torch.randn(2, 4, 7, 9, generator=generator, dtype=torch.float64)
        g = torch.randn(2, 4, 7, 9, generator=generator, dtype=torch.float64)
        if extract == "real":
            g = torch.randn_like(conv(x.float())).double()
        wanted = aggregated(explicit(x, g, extract, conv if extract == "real" else None), aggregate)
        got = contribution_map(x, g, extract, aggregate, conv)
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_norm_grad_is_the_norm_of_the_outer_product_in_single_precision():
    x, g = images(2), images(2, seed=2)
    wanted = aggregated(explicit(x, g, "conv1x1"), "norm")
    torch.testing.assert_close(contribution_map(x, g, "conv1x1", "norm"), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("extract", ["bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise"])
def test_contributions_sum_to_the_gradient_of_the_virtual_identity(extract):
    """The reason for the method: put the identity layer in, and its weight's gradient is the sum over positions."""
    model, x = build("plain"), images(1)
    weights = {
        "bias": torch.zeros(4, 1, 1),
        "scaling": torch.ones(4, 1, 1),
        "conv1x1": torch.eye(4)[:, :, None, None],
        "conv3x3": torch.zeros(4, 4, 3, 3),
        "conv3x3_depthwise": torch.zeros(4, 1, 3, 3),
    }
    weight = weights[extract].clone()
    if extract.startswith("conv3x3"):
        weight[torch.arange(4), torch.arange(4) if weight.shape[1] == 4 else 0, 1, 1] = 1
    weight.requires_grad_()
    activation = model.conv(x).detach().requires_grad_()
    if extract == "bias":
        identity = activation + weight
    elif extract == "scaling":
        identity = activation * weight
    else:
        identity = nn.functional.conv2d(activation, weight, padding=weight.shape[-1] // 2, groups=4 // weight.shape[1])
    assert torch.equal(identity, activation)
    score = model.head(model.relu2(model.conv2(model.relu(model.norm(identity)))).mean((2, 3)))[0, 1]
    by_weight, g = torch.autograd.grad(score, [weight, identity])
    entries = explicit(activation.detach(), g, extract).sum((2, 3))[0]
    torch.testing.assert_close(entries, by_weight.flatten(), rtol=1e-4, atol=1e-5)


def test_a_real_convolution_contributes_its_own_gradient():
    model, x = build("plain"), images(1)
    with torch.enable_grad():
        gradient = torch.autograd.grad(model(x)[0, 1], model.conv2.weight)[0]
    inside = model.relu(model.norm(model.conv(x)))
    out = model.conv2(inside).detach().requires_grad_()
    g = torch.autograd.grad(model.head(torch.relu(out).mean((2, 3)))[0, 1], out)[0]
    torch.testing.assert_close(
        explicit(inside.detach(), g, "real", model.conv2).sum((2, 3))[0], gradient.flatten(), rtol=1e-4, atol=1e-6
    )
    got = NormGrad(model, "conv2", real_conv=True).attribute(x, 1)[0, 0]
    wanted = unfold(inside, 3, padding=1).norm(dim=1).view(16, 16) * g[0].norm(dim=0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_real_convolutions_pad_as_they_are_told(padding):
    conv = nn.Conv2d(2, 3, 3, **padding)
    x = torch.randn(1, 2, 6, 6)
    v = contribution_map(x, torch.ones_like(conv(x)), "real", "sum", conv)
    with torch.no_grad():  # with all weights 1 and no bias, the output is the sum over the neighbourhood
        conv.weight.fill_(1.0), conv.bias.zero_()
        torch.testing.assert_close(v, 3 * conv(x)[:, 0], rtol=1e-4, atol=1e-5)


def test_figures_by_hand():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            weights = torch.tensor([[[1.0, -2.0], [0.0, 3.0]], [[2.0, 1.0], [-1.0, 0.0]]])
            return (self.layer(x) * weights).sum((1, 2, 3))[:, None].expand(-1, 2) * torch.tensor([1.0, -1.0])

    x = torch.tensor([[[[3.0, 1.0], [2.0, 4.0]], [[4.0, 0.0], [1.0, 2.0]]]])
    maps = {
        "norm": NormGrad(One(), "layer").attribute(x, 0),
        "selective": NormGrad(One(), "layer", selective=True).attribute(x, 0),
        "linear": LinearApproximation(One(), "layer").attribute(x, 0),
        "against": LinearApproximation(One(), "layer").attribute(x, 1),
        "gradient": Gradient(One(), "layer").attribute(x, 0),
        "cam": GradCAM(One(), "layer").attribute(x, 0),
    }
    root = lambda value: value**0.5  # noqa: E731
    wanted = {
        "norm": [[5 * root(5), root(5)], [root(5), 3 * root(20)]],  # |x_u| |g_u|
        "selective": [[root(9 + 64), 0], [0, 12]],
        "linear": [[11, -2], [-1, 12]],
        "against": [[-11, 2], [1, -12]],
        "gradient": [[2, 2], [1, 3]],
        "cam": [[3.5, 0.5], [1.5, 3]],  # mean gradients 0.5 and 0.5
    }
    for name, values in wanted.items():
        torch.testing.assert_close(maps[name][0, 0], torch.tensor(values, dtype=torch.float32), msg=name)


# Parity with captum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, layer", [("plain", "conv2"), ("plain", "norm"), ("resnet", "resnet.encoder.stages.0")]
)
def test_parity_with_captum(family, layer):
    model, x = build(family), fed(family)
    target = torch.tensor([0, 2, 1])
    logits = LogitsModel(model)
    module = model.get_submodule(layer)
    for relu in (False, True):
        peer = LayerGradCam(logits, module).attribute(x, target, relu_attributions=relu).detach()
        ours = GradCAM(model, layer, relu=relu, upsample=False).attribute(x, target)
        torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-5)
    peer = LayerGradientXActivation(logits, module).attribute(x, target).detach().sum(1, keepdim=True)
    ours = LinearApproximation(model, module, upsample=False).attribute(x, target)
    torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-5)


def test_integrated_gradients_over_a_loader_agree_with_a_loop():
    model, x = build("resnet"), fed("resnet", 5)
    logits, target, steps = LogitsModel(model), torch.tensor([0, 1, 2, 1, 0]), 300
    start = torch.full((1, 3, 16, 16), 0.5)  # at 0 itself rectifiers switch all at once
    got = attribute_batches(
        IntegratedGradients(logits), DataLoader(TensorDataset(x, target), batch_size=2), target="label",
        baselines=start, n_steps=steps, method="riemann_middle", internal_batch_size=50,
    )  # fmt: skip
    total = torch.zeros_like(x, dtype=torch.float64)
    for k in range(steps):
        point = (start + (x - start) * (k + 0.5) / steps).requires_grad_()
        score = logits(point).gather(1, target[:, None]).sum()
        total += torch.autograd.grad(score, point)[0].double() / steps
    torch.testing.assert_close(got.double(), total * (x - start), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        change = (logits(x) - logits(start)).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(
        got.sum((1, 2, 3)).float(), change, rtol=0.05, atol=0.02
    )  # completeness, up to the kinks


# Maps of models --------------------------------------------------------------------------------------------------


def test_exactly_one_forward_and_one_backward():
    for build_map in (
        lambda m: NormGrad(m, "model.conv2"),
        lambda m: GradCAM(m, "model.conv2"),
        lambda m: NormGrad(m, [None, "model.conv", "model.norm", "model.conv2"], selective=True),
        lambda m: NormGrad(m, "model.conv2", real_conv=True),
    ):
        for target in (None, 1, torch.tensor([0, 1, 2])):
            model = Counted(build("plain"))
            build_map(model).attribute(images(), target)
            assert (model.forwards, model.backwards) == (1, 1)
    model = Counted(build("plain"))
    attribute_batches(NormGrad(model, "model.conv2"), images(7), batch_size=3)
    assert (model.forwards, model.backwards) == (3, 3)  # the predicted class costs no pass of its own


def test_a_virtual_layer_looks_at_the_output_before_an_in_place_relu():
    model, x = build("plain"), images(1)
    activation = model.norm(model.conv(x)).detach().requires_grad_()
    score = model.head(torch.relu(model.conv2(torch.relu(activation))).mean((2, 3)))[0, 2]
    g = torch.autograd.grad(score, activation)[0]
    assert bool((activation < 0).any())
    got = NormGrad(model, "norm", upsample=False).attribute(x, 2)
    torch.testing.assert_close(got[0, 0], activation[0].norm(dim=0).detach() * g[0].norm(dim=0), rtol=1e-4, atol=1e-6)


def test_before_the_global_average_norm_grad_cannot_see_the_class():
    model, x = build("plain"), images()
    maps = [NormGrad(model, "relu2").attribute(x, c) for c in range(3)]
    for one in maps[1:]:
        assert float(correlations(maps[0], one).min()) > 0.9999
    with pytest.warns(UserWarning, match="flat maps at relu2"):
        flat = LayerSaliency(model, "relu2", "bias", "norm").attribute(x, 0)
    assert bool((flat == 0).all())


def test_grad_cam_stays_where_it_is_put():
    """Averaging the gradient destroys it off the last layer; the maps of one layer are not those of another."""
    model, x = build("plain"), images()
    early, late = (GradCAM(model, name, relu=False).attribute(x, 1) for name in ("conv", "conv2"))
    assert float(correlations(early, late).mean()) < 0.9


def test_a_vision_transformer_by_its_tokens():
    model, x = build("vit"), fed("vit", 2)
    name = "vit.layers.1"
    from salience.model import capture

    with capture(model, name) as seen:
        score = model(x).logits[:, 1].sum()
    g = torch.autograd.grad(score, seen[name])[0]
    wanted = (seen[name].norm(dim=2) * g.norm(dim=2))[:, 1:].detach().view(2, 2, 2)  # without the class token
    got = NormGrad(model, name, upsample=False).attribute(x, 1)[:, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert NormGrad(model, name).attribute(x, 1).shape == (2, 1, 16, 16)
    with pytest.warns(UserWarning, match="flat"):  # the head reads the class token of the last block alone
        assert bool((NormGrad(model, "vit.layers.2").attribute(x, 1) == 0).all())
    chosen = default_layers(model, x)
    assert "vit.layers.2" not in chosen and len(chosen) == 4
    assert bool((NormGrad(model, chosen[-1]).attribute(x) > 0).any())


@pytest.mark.parametrize(
    "tokens, image, grid",
    [(197, (224, 224), (14, 14)), (196, (224, 224), (14, 14)), (198, (224, 224), (14, 14)), (201, (224, 224), (14, 14)),
     (9, (16, 32), (2, 4)), (8, (16, 32), (2, 4)), (3, (224, 224), (1, 1)), (25, (16, 400), (1, 25))],
)  # fmt: skip
def test_tokens_become_the_grid_of_the_image(tokens, image, grid):
    values = torch.arange(float(tokens))[None, :, None].expand(1, tokens, 2)
    laid = as_grid(values, image)
    assert laid.shape == (1, 2, *grid)
    assert laid[0, 0].flatten().tolist() == list(range(tokens - grid[0] * grid[1], tokens))


def test_layers_that_keep_a_grid():
    model, x = build("plain"), images()
    assert list(spatial_layers(model, x)) == ["conv", "norm", "relu", "conv2", "relu2"]
    resnet = build("resnet")
    layers = default_layers(resnet, fed("resnet"))
    sizes = [spatial_layers(resnet, fed("resnet"))[name] for name in layers]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert bool((GradCAM(resnet, layers[-1], relu=False).attribute(fed("resnet")) != 0).any())
    with pytest.raises(InputError, match="no layer whose output"):
        default_layers(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), x)


def test_batches_change_nothing_and_targets_are_followed():
    model, x = build("plain"), images(5)
    target = torch.tensor([0, 1, 2, 0, 1])
    for one in (NormGrad(model, ["conv", "conv2"]), GradCAM(model, "conv2"), Gradient(model)):
        whole = one.attribute(x, target)
        torch.testing.assert_close(one.attribute(x, target.tolist(), internal_batch_size=2), whole)
        torch.testing.assert_close(one.attribute(x[3:4], 0), whole[3:4])
        predicted = model(x).argmax(1)
        torch.testing.assert_close(one.attribute(x), one.attribute(x, predicted))
    by_function = Gradient(model).attribute(x, lambda logits: logits[:, 0] - logits[:, 1])
    assert not torch.allclose(by_function, Gradient(model).attribute(x, 0))


def test_more_arguments_are_cut_with_the_images():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, shift, scale):
            return (self.conv(x).sigmoid() * scale).sum((2, 3)) + shift

    torch.manual_seed(0)
    model, x, shift = Two(), images(4), torch.randn(4, 4) * 100
    whole = NormGrad(model, "conv").attribute(x, None, (shift, 2.0))
    cut = NormGrad(model, "conv").attribute(x, None, (shift, 2.0), internal_batch_size=3)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(whole, NormGrad(model, "conv").attribute(x, shift.argmax(1), (shift, 2.0)))


def test_out_of_memory_halves_the_batch():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.sizes = build("plain"), []

        def forward(self, x):
            self.sizes.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.inner(x)

    model, x = Small(), images(5)
    with pytest.warns(UserWarning, match="out of memory"):
        maps = NormGrad(model, "inner.conv2").attribute(x, 1)
    torch.testing.assert_close(maps, NormGrad(build("plain"), "conv2").attribute(x, 1))
    assert model.sizes == [5, 2, 2, 1]


def test_a_fully_convolutional_model_is_averaged_over_its_positions():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 1))
    pooled = nn.Sequential(*dense, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images(2)
    torch.testing.assert_close(NormGrad(dense, "1").attribute(x, 3), NormGrad(pooled, "1").attribute(x, 3))
    MetaSaliency(NormGrad(dense, "1")).attribute(x, 3)


def test_half_precision_is_summed_in_single():
    model = build("plain").to(torch.bfloat16)
    x = images(1).to(torch.bfloat16)
    got = NormGrad(model, "conv").attribute(x, 0)
    assert got.dtype == torch.float32 and bool(torch.isfinite(got).all())


# Fusion ----------------------------------------------------------------------------------------------------------


def test_fusion_by_hand():
    a = torch.tensor([[[0.0, 5.0], [10.0, 2.5]]])  # scaled: 0, .5, 1, .25
    b = torch.tensor([[[1.0, 0.5], [0.0, -1.0]]])  # scaled: 1, .75, .5, 0
    mean = fuse([a, b], "mean", [3, 1])
    torch.testing.assert_close(mean[0], torch.tensor([[0.25, 0.5625], [0.875, 0.1875]]))
    product = fuse([a, b], "product", [0.5, 0.5])
    torch.testing.assert_close(product[0], torch.tensor([[1e-3, 0.375**0.5], [0.5**0.5, 0.5e-3]]))
    linear = fuse([a, b], "mean", "linear")
    torch.testing.assert_close(linear, fuse([a, b], "mean", [1, 2]))


def test_a_flat_layer_is_left_out_for_its_image_alone():
    a, b, flat = normalise(images(2)[:, 0]), normalise(images(2)[:, 1]), torch.full((2, 16, 16), 7.0)
    mixed = torch.stack([a[0], flat[1]])
    for how in ("product", "mean"):
        got = fuse([mixed, b], how)
        torch.testing.assert_close(got[0], fuse([a, b], how)[0])
        torch.testing.assert_close(got[1], fuse([b], how)[1])
        assert bool((fuse([flat, flat], how) == 0).all())
    torch.testing.assert_close(normalise(flat), torch.zeros(2, 16, 16))


def test_layers_are_fused_at_the_size_of_the_image():
    model, x = build("resnet"), fed("resnet")
    names = ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    single = [LinearApproximation(model, name, upsample=False).attribute(x, 1) for name in names]
    large = [interpolate(one, size=(16, 16), mode="bilinear")[:, 0] for one in single]
    got = LinearApproximation(model, names).attribute(x, 1)
    torch.testing.assert_close(got[:, 0], fuse(large))
    with pytest.raises(InputError, match="one shape"):
        LinearApproximation(model, names, upsample=False).attribute(x, 1)


@pytest.mark.parametrize("weights", ["even", [1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_bad_layer_weights(weights):
    with pytest.raises(InputError, match="weights"):
        NormGrad(build("plain"), ["conv", "conv2"], weights=weights)


# Meta-saliency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascend", [False, True])
def test_meta_is_the_map_of_the_stepped_model(ascend):
    x, lr = images(3), 0.05
    target = torch.tensor([0, 2, 1])
    got = MetaSaliency(NormGrad(build("plain"), "conv"), lr, ascend=ascend).attribute(x, target)
    for i in range(3):
        model = build("plain")
        loss = cross_entropy(model(x[i : i + 1]), target[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients):
                p += (lr if ascend else -lr) * g
        torch.testing.assert_close(got[i : i + 1], NormGrad(model, "conv").attribute(x[i : i + 1], int(target[i])))
    assert not torch.allclose(got, NormGrad(build("plain"), "conv").attribute(x, target))


def test_meta_makes_a_blind_map_see_the_class():
    model, x = build("plain"), images()
    values = [class_sensitivity(NormGrad(model, "relu2"), x).mean]
    values += [class_sensitivity(MetaSaliency(NormGrad(model, "relu2"), lr), x).mean for lr in (0.05, 0.5)]
    assert values[0] > 0.999 and values[0] > values[1] > values[2]


def test_meta_gives_the_model_its_own_tensors_back():
    model = build("plain").train()
    model.head.weight.requires_grad_(False)
    before, pointers = state_hash(model), [p.data_ptr() for p in model.parameters()]
    meta = MetaSaliency(NormGrad(model, "conv"))
    first = meta.attribute(images())
    assert (state_hash(model), [p.data_ptr() for p in model.parameters()]) == (before, pointers)
    torch.testing.assert_close(meta.attribute(images()), first)
    meta.attribution.attribute = None  # fails while the weights are exchanged
    with pytest.raises(TypeError):
        meta.attribute(images())
    assert (state_hash(model), [p.data_ptr() for p in model.parameters()]) == (before, pointers)


def test_meta_wraps_captum_too():
    logits = LogitsModel(build("vit"))
    x = fed("vit", 2)
    maps = attribute_batches(MetaSaliency(IntegratedGradients(logits), 0.1), x, batch_size=2, n_steps=4)
    assert maps.shape == x.shape


def test_bad_meta():
    plain = NormGrad(build("plain"), "conv")
    for lr in (0, -1.0, float("nan"), "1"):
        with pytest.raises(InputError, match="lr"):
            MetaSaliency(plain, lr)
    with pytest.raises(InputError, match="Attribution"):
        MetaSaliency(IntegratedGradients(lambda x: x))
    with pytest.raises(InputError, match="no step"):
        MetaSaliency(plain).attribute(images() * float("inf"), 0)
    with pytest.raises(InputError, match="not a function"):
        MetaSaliency(plain).attribute(images(), lambda logits: logits[:, 0])


# Checks ------------------------------------------------------------------------------------------------------------


def test_correlations_skip_flat_maps():
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]]])
    b = torch.tensor([[[2.0, 4.0], [6.0, 8.0]], [[1.0, 2.0], [3.0, 4.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
    assert correlations(a, b).tolist() == pytest.approx([1, float("nan"), -1], nan_ok=True)
    assert correlations(a, b, of_size=True).tolist() == pytest.approx([1, float("nan"), 1], nan_ok=True)


def test_class_sensitivity_takes_the_likeliest_and_the_least_likely():
    model, x = build("plain"), images(6)
    got = class_sensitivity(LinearApproximation(model, "conv"), DataLoader(TensorDataset(x, torch.zeros(6)), 4))
    logits = model(x)
    maps = [LinearApproximation(model, "conv").attribute(x, c) for c in (logits.argmax(1), logits.argmin(1))]
    assert got.per_sample == pytest.approx(correlations(*maps).numpy())
    assert got.mean == pytest.approx(got.per_sample.mean()) and got.flat == 0
    with pytest.warns(UserWarning, match="flat"):
        blind = class_sensitivity(LayerSaliency(model, "relu2", "bias", "norm"), x)
    assert np.isnan(blind.mean) and blind.flat == 6


class FromTheImage(Gradient):
    """Does not look at the network at all."""

    def attribute(self, inputs, target=None, additional_forward_args=None, **options):
        return inputs.abs().sum(1, keepdim=True)


@pytest.mark.parametrize("mode", ["cascade", "independent"])
def test_randomisation_tells_a_map_of_the_network_from_one_of_the_image(mode):
    model = build("plain").train()
    before = state_hash(model)
    generator = torch.Generator().manual_seed(0)
    real = randomization_check(LinearApproximation(model), images(), mode=mode, generator=generator)
    assert list(real) == ["head", "conv2", "norm", "conv"] == weight_layers(model)[::-1]
    fake = randomization_check(FromTheImage(model), images(), mode=mode, generator=generator)
    assert all(one.spearman == pytest.approx(1) for one in fake.values())
    assert min(one.spearman for one in real.values()) < 0.5
    assert state_hash(model) == before


def test_randomisation_repeats_itself_and_leaves_the_random_state():
    model = build("vit")
    state = torch.get_rng_state()
    first, second = (
        randomization_check(
            Gradient(model), fed("vit"), layers=["classifier", "vit.layers.0.mlp.fc1"], batch_size=batch,
            generator=torch.Generator().manual_seed(3),
        )
        for batch in (1, 3)
    )  # fmt: skip
    assert list(first) == ["classifier", "vit.layers.0.mlp.fc1"]
    for name in first:
        assert first[name] == pytest.approx(second[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_randomisation():
    model, generator = build("plain"), torch.Generator()
    with pytest.raises(InputError, match="mode"):
        randomization_check(Gradient(model), images(), mode="all", generator=generator)
    with pytest.raises(InputError, match="no parameters"):
        randomization_check(Gradient(model), images(), layers=["relu"], generator=generator)
    with pytest.raises(InputError, match="no layer"):
        randomization_check(Gradient(model), images(), layers=["nowhere"], generator=generator)


def test_the_pointing_game():
    maps = torch.zeros(4, 9, 9)
    for i, (row, column) in enumerate([(4, 4), (4, 6), (4, 7), (0, 0)]):
        maps[i, row, column] = 1
    mask = torch.zeros(4, 9, 9, dtype=torch.bool)
    mask[:, 4, 4] = True
    game = PointingGame(tolerance=3)
    assert game.update(maps, mask, [0, 0, 0, 1]).tolist() == [True, True, False, False]  # strictly less than 3 px
    assert game.per_class() == {0: 2 / 3, 1: 0.0}
    assert game.compute() == pytest.approx(1 / 3)  # the mean of the classes, not of the maps
    strict = PointingGame(0)
    assert strict.update(maps, mask, [0] * 4).tolist() == [True, False, False, False]
    game.reset()
    with pytest.raises(InputError, match="update first"):
        game.compute()


def test_bad_pointing():
    game = PointingGame()
    maps, mask = torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    for bad in (
        (maps[:1], mask, [0, 1]), (maps, mask, [0]), (maps, mask.float(), [0, 1]), (maps * float("nan"), mask, [0, 1]),
        (maps, ~mask, [0, 1]), (maps[0], mask[0], [0, 1]),
    ):  # fmt: skip
        with pytest.raises(InputError):
            game.update(*bad)
    for tolerance in (-1, float("nan"), "15"):
        with pytest.raises(InputError, match="tolerance"):
            PointingGame(tolerance)


# Bad input ---------------------------------------------------------------------------------------------------------


def test_bad_layers():
    model, x = build("plain"), images()
    with pytest.raises(InputError, match="nearest names: 'conv2'"):
        NormGrad(model, "convv2")
    with pytest.raises(InputError, match="no part of Plain"):
        NormGrad(model, nn.Conv2d(3, 3, 3))
    with pytest.raises(InputError, match="the model itself"):
        NormGrad(model, "")
    with pytest.raises(InputError, match="once"):
        NormGrad(model, ["conv", model.conv])
    with pytest.raises(InputError, match="at least one"):
        NormGrad(model, [])
    with pytest.raises(InputError, match=r"shape \(3, 3\).*conv, norm, relu, conv2, relu2"):
        NormGrad(model, "head").attribute(x)
    with pytest.raises(InputError, match="'relu' is ReLU"):
        NormGrad(model, "relu", real_conv=True)
    with pytest.raises(InputError, match="the input"):
        NormGrad(model, None, real_conv=True)
    with pytest.raises(InputError, match="selective"):
        NormGrad(model, "conv", selective=True, real_conv=True)
    for options in ({"extract": "conv5x5"}, {"aggregate": "mean"}, {"fuse": "sum"}):
        with pytest.raises(InputError, match=next(iter(options))):
            LayerSaliency(model, "conv", **options)
    with pytest.raises(InputError, match="Module"):
        NormGrad(lambda x: x, "conv")


@pytest.mark.parametrize(
    "target",
    [3, -1, [0, 1], torch.tensor([0, 1, 3]), torch.tensor([0.0, 1.0, 2.0]), "cat", True, lambda logits: logits.sum()],
)
def test_bad_targets(target):
    with pytest.raises(InputError, match="target"):
        NormGrad(build("plain"), "conv").attribute(images(), target)
    with pytest.raises(InputError, match="target"):
        NormGrad(build("plain"), "conv").attribute(images(), target, internal_batch_size=1)


def test_bad_images():
    maps = NormGrad(build("plain"), "conv")
    for bad in (images()[0], images().int(), [1], torch.zeros(0, 3, 16, 16)):
        with pytest.raises(InputError, match="inputs"):
            maps.attribute(bad)
    with pytest.raises(InputError, match="not finite"):
        maps.attribute(images() * float("nan"), 0)
    with pytest.raises(NothingToDo):
        attribute_batches(maps, torch.zeros(0, 3, 16, 16))
    with pytest.raises(InputError, match="label"):
        attribute_batches(maps, images(), target="label")
    with pytest.raises(InputError, match="target"):
        attribute_batches(maps, images(), target="best")
    with pytest.raises(InputError, match="captum"):
        attribute_batches(lambda x: x, images())


def test_a_model_without_a_gradient_is_told():
    class Hard(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.conv(x).detach().mean((2, 3))

    with pytest.raises(InputError, match="without a gradient"):
        NormGrad(Hard(), "conv").attribute(images())


def test_over_batches_of_every_kind():
    model, x = build("vit"), fed("vit", 5)
    labels = torch.tensor([0, 1, 2, 1, 0])
    maps = Gradient(model)
    wanted = maps.attribute(x, labels)
    rows = [{"pixel_values": a, "labels": int(b)} for a, b in zip(x, labels)]
    for data in (TensorDataset(x, labels), DataLoader(rows, batch_size=2)):
        torch.testing.assert_close(attribute_batches(maps, data, target="label", batch_size=2), wanted)
    torch.testing.assert_close(attribute_batches(maps, x, target=1), maps.attribute(x, 1))
    second = lambda logits: logits.topk(2).indices[:, 1]  # noqa: E731
    torch.testing.assert_close(attribute_batches(maps, x, target=second), maps.attribute(x, second(model(x).logits)))
    captum = attribute_batches(IntegratedGradients(LogitsModel(model)), x, n_steps=3)
    assert captum.shape == x.shape


def test_the_extremes_of_floats():
    model, x = build("plain"), images(2)
    for scale in (0.0, 1e-30, 1e4):
        got = NormGrad(model, ["conv", "conv2"]).attribute(x * scale, 0)
        assert bool(torch.isfinite(got).all())
