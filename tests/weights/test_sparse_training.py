"""Training under masks: what moves when, to the unit; checkpoints; tickets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from salience.errors import DataError, InputError
from salience.weights import (
    SparseTrainer,
    SparsityCallback,
    allocate,
    lottery_ticket,
    mask_from_scores,
    score_magnitude,
)

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))


def start(method: str, optimizer: str = "sgd", net=None, **options):
    net = network() if net is None else net
    opt = OPTIMIZERS[optimizer](net.parameters())
    settings = {"density": 0.2, "total_steps": 40, "update_every": 5, "generator": generator(), "method": method}
    return net, opt, SparseTrainer(net, opt, **{**settings, **options})


def steps(net, opt, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        rows = torch.arange(10) + 10 * (i % 6)
        opt.zero_grad()
        cross_entropy(net(X[rows]), Y[rows]).backward()
        opt.step()


def kept(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def weights(net) -> dict[str, torch.Tensor]:
    return {name: p for name, p in net.named_parameters() if p.ndim > 1}


TOTAL = 6 * 20 + 20 * 12 + 12 * 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["static", "set", "rigl", "granet", "gmp"])
def test_absent_weights_and_their_momentum_stay_zero(method: str, optimizer: str) -> None:
    net, opt, sparse = start(method, optimizer)
    for i in range(40):
        steps(net, opt, 1, i)
        for name, weight in weights(net).items():
            absent = ~sparse.masks[name]
            assert not weight[absent].any()
            for value in opt.state[weight].values():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    assert not value[absent].any()


@pytest.mark.parametrize("method", ["set", "rigl", "snfs"])
def test_the_density_is_constant_to_the_unit(method: str) -> None:
    net, opt, sparse = start(method)
    shares = allocate({n: tuple(w.shape) for n, w in weights(net).items()}, 0.2)
    counts = {name: round(shares[name] * w.numel()) for name, w in weights(net).items()}
    assert {name: int(mask.sum()) for name, mask in sparse.masks.items()} == counts
    changes = 0
    for i in range(40):
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        steps(net, opt, 1, i)
        moved = any(not torch.equal(before[name], mask) for name, mask in sparse.masks.items())
        assert not moved or ((i + 1) % 5 == 0 and i + 1 <= 30)
        changes += moved
        assert kept(sparse.masks) == sum(counts.values())
        if method != "snfs":
            assert {name: int(mask.sum()) for name, mask in sparse.masks.items()} == counts
    assert changes >= 3


def test_what_rigl_drops_and_grows() -> None:
    """One update by hand: the smallest active weights go, the inactive of largest dense gradient come."""
    net, opt, sparse = start("rigl", regrow=False)
    steps(net, opt, 4)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    twin = copy.deepcopy(net)
    rows = torch.arange(10) + 40
    cross_entropy(twin(X[rows]), Y[rows]).backward()
    reference = {name: w.grad for name, w in weights(twin).items()}
    # The optimiser steps first, with masked gradients; then weights are compared.
    after_step = copy.deepcopy(net)
    plain = torch.optim.SGD(after_step.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    plain.load_state_dict(opt.state_dict())
    cross_entropy(after_step(X[rows]), Y[rows]).backward()
    for name, w in weights(after_step).items():
        w.grad.mul_(before[name])
    plain.step()
    steps(net, opt, 1, 4)
    share = 0.3 / 2 * (1 + math.cos(math.pi * 5 / 30))
    for name, mask in sparse.masks.items():
        old, size = before[name], weights(after_step)[name].detach().abs()
        count = int(share * int(old.sum()))
        dropped, grown = old & ~mask, mask & ~old
        assert int(dropped.sum()) == int(grown.sum()) == count
        if count:
            assert size[dropped].max() <= size[old & mask].min()
            gradient = reference[name].abs()
            assert gradient[grown].min() >= gradient[~old & ~grown].max()
        assert not weights(net)[name][grown].any()


def test_a_dropped_weight_may_return_unless_told() -> None:
    for regrow in (True, False):
        net, opt, sparse = start("rigl", regrow=regrow, density=0.5, drop_fraction=1.0)
        steps(net, opt, 4)
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        # Gradients of the weights that go are by far the largest.
        opt.zero_grad()
        cross_entropy(net(X), Y).backward()
        for name, weight in weights(net).items():
            small = weight.detach().abs().masked_fill(~before[name], math.inf)
            weight.grad[small <= small.flatten().kthvalue(3).values] *= 1e4
        for group in opt.param_groups:
            group["lr"] = 0.0
        opt.step()
        same = sum(int((before[n] & m).sum()) for n, m in sparse.masks.items())
        dropped_share = int(0.5 * (1 + math.cos(math.pi * 5 / 30)) * int(before["0.weight"].sum()))
        assert (same > kept(before) - 3 * dropped_share) or not regrow
        returned = sum(int((before[n] & sparse.masks[n] & (weights(net)[n] == 0)).sum()) for n in before)
        assert (returned >= 6) is regrow  # those that came back begin at 0


def test_set_needs_no_dense_gradient() -> None:
    def poisoned(method: str) -> dict[str, torch.Tensor]:
        net, opt, sparse = start(method)
        for i in range(10):
            rows = torch.arange(10) + 10 * (i % 6)
            opt.zero_grad()
            cross_entropy(net(X[rows]), Y[rows]).backward()
            if i % 5 == 4:
                for name, weight in weights(net).items():  # what masking hides
                    weight.grad.masked_fill_(~sparse.masks[name], 0)
            opt.step()
        return sparse.masks

    def normal(method: str) -> dict[str, torch.Tensor]:
        net, opt, sparse = start(method)
        steps(net, opt, 10)
        return sparse.masks

    same = {m: all(torch.equal(poisoned(m)[n], mask) for n, mask in normal(m).items()) for m in ("set", "rigl")}
    assert same == {"set": True, "rigl": False}


def test_gmp_follows_the_cubic_and_never_grows() -> None:
    net, opt, sparse = start("gmp", density=0.1)
    assert kept(sparse.masks) == TOTAL
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    for i in range(40):
        steps(net, opt, 1, i)
        at = i + 1
        if at % 5 == 0 and at <= 30:
            sparsity = 0.9 * (1 - (1 - at / 30) ** 3)
            assert kept(sparse.masks) == round((1 - sparsity) * TOTAL)
        assert all((mask & ~before[name]).sum() == 0 for name, mask in sparse.masks.items())
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
    assert kept(sparse.masks) == round(0.1 * TOTAL)


@pytest.mark.parametrize(("method", "every"), [("gmp", 7), ("granet", 7), ("gmp", 100)])
def test_the_final_density_is_reached_whatever_the_rhythm(method: str, every: int) -> None:
    net, opt, sparse = start(method, density=0.1, update_every=every, scope="global")
    steps(net, opt, 40)
    assert kept(sparse.masks) == round(0.1 * TOTAL)
    net, opt, sparse = start("gmp", density=0.1, update_every=every, scope="layer")
    steps(net, opt, 40)
    assert all(int(m.sum()) == round(0.1 * m.numel()) for m in sparse.masks.values())


def test_granet_prunes_and_regrows() -> None:
    net, opt, sparse = start("granet", density=0.1, start_density=0.5)
    assert kept(sparse.masks) == pytest.approx(0.5 * TOTAL, abs=2)
    grew = False
    for i in range(40):
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        steps(net, opt, 1, i)
        grew |= any((mask & ~before[name]).any() for name, mask in sparse.masks.items())
    assert grew and kept(sparse.masks) == round(0.1 * TOTAL)


def test_snfs_moves_weights_between_layers_by_momentum() -> None:
    net, opt, sparse = start("snfs", density=0.3)
    shares = {name: int(mask.sum()) for name, mask in sparse.masks.items()}
    steps(net, opt, 40)
    assert {name: int(mask.sum()) for name, mask in sparse.masks.items()} != shares
    assert sparse.report(X[:1]).training_flops > 0
    plain = network()
    opt = torch.optim.SGD(plain.parameters(), 0.1)
    SparseTrainer(plain, opt, density=0.2, total_steps=40, update_every=5, generator=generator(), method="snfs")
    with pytest.raises(InputError, match="momentum"):
        steps(plain, opt, 5)


def test_operations_of_training_are_counted() -> None:
    example = X[:1]
    net, opt, sparse = start("static")
    steps(net, opt, 10)
    report = sparse.report(example)
    assert report.training_flops == pytest.approx(10 * 3 * report.flops) and report.explored == report.density
    net, opt, sparse = start("rigl")
    steps(net, opt, 40)
    report = sparse.report(example)
    updates = 6  # at 5, 10, ..., 30
    assert report.training_flops == pytest.approx(
        (40 - updates) * 3 * report.flops + updates * (2 * report.flops + report.dense_flops)
    )
    assert report.dense_training_flops == 40 * 3 * report.dense_flops and report.explored > report.density
    net, opt, sparse = start("gmp", density=0.1)
    steps(net, opt, 40)
    assert sparse.report(example).explored == 1


def test_a_resumed_run_is_the_same_run() -> None:
    for method in ("set", "rigl", "granet"):
        net, opt, sparse = start(method)
        steps(net, opt, 40)
        half, half_opt, half_sparse = start(method)
        steps(half, half_opt, 18)
        saved = copy.deepcopy((half.state_dict(), half_opt.state_dict(), half_sparse.state_dict()))
        again, again_opt, again_sparse = start(method, net=network(7), generator=generator(99))
        again.load_state_dict(saved[0])
        again_opt.load_state_dict(saved[1])
        again_sparse.load_state_dict(saved[2])
        steps(again, again_opt, 22, 18)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
        assert all(torch.equal(mask, again_sparse.masks[name]) for name, mask in sparse.masks.items())
        assert again_sparse.report(X[:1]) == sparse.report(X[:1])
    with pytest.raises(InputError, match="of method 'granet'"):
        start("set")[2].load_state_dict(saved[2])


@pytest.mark.parametrize("method", ["rigl", "snfs", "granet"])
def test_a_gradient_scaler_changes_nothing(method: str) -> None:
    """Gradients are looked at when they have been unscaled, and a step that overflows is none."""
    net, opt, sparse = start(method)
    steps(net, opt, 22)
    other, other_opt, other_sparse = start(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)  # a power of two: exact
    for i in range(22):
        rows = torch.arange(10) + 10 * (i % 6)
        if i == 7:  # one overflow in between
            other_opt.zero_grad()
            scaler.scale(cross_entropy(other(X[rows] * math.inf), Y[rows])).backward()
            scaler.step(other_opt)
            scaler.update()
        other_opt.zero_grad()
        scaler.scale(cross_entropy(other(X[rows]), Y[rows])).backward()
        scaler.step(other_opt)
        scaler.update()
    assert other_sparse.steps == sparse.steps == 22
    for name, mask in sparse.masks.items():
        assert torch.equal(mask, other_sparse.masks[name]), name
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_ranks_that_average_gradients_keep_the_same_masks(method: str) -> None:
    """What grows is decided by the gradients at the step, averaged over ranks by then, not by those of one rank."""
    ranks = [start(method) for _ in range(2)]
    whole = start(method)
    for i in range(40):
        rows = torch.arange(20) + 20 * (i % 3)
        for (net, opt, _), part in zip([*ranks, whole], (rows[:10], rows[10:], rows), strict=True):
            opt.zero_grad()
            cross_entropy(net(X[part]), Y[part]).backward()
        for one, two in zip(ranks[0][0].parameters(), ranks[1][0].parameters(), strict=True):
            one.grad = two.grad = (one.grad + two.grad) / 2
            two.grad = one.grad.clone()
        for _, opt, _ in (*ranks, whole):
            opt.step()
    for name, mask in ranks[0][2].masks.items():
        assert torch.equal(mask, ranks[1][2].masks[name]) and torch.equal(mask, whole[2].masks[name]), name


def test_several_groups_frozen_parts_and_hooks_that_come_off() -> None:
    net = network()
    opt = torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01},
                           {"params": net[4].parameters()}], 0.1, momentum=0.9)  # fmt: skip
    net[0].weight.requires_grad_(False)
    sparse = SparseTrainer(net, opt, density=0.3, total_steps=20, update_every=5, generator=generator(), method="rigl")
    frozen, mask = net[0].weight.detach().clone(), sparse.masks["0.weight"].clone()
    steps(net, opt, 10)
    assert all(not weights(net)[name][~mask].any() for name, mask in sparse.masks.items())
    # What is not trained is not moved: grown weights of a frozen layer would stay zero for ever.
    assert torch.equal(net[0].weight, frozen) and torch.equal(sparse.masks["0.weight"], mask)
    sparse.detach()
    steps(net, opt, 2)
    assert weights(net)["2.weight"][~sparse.masks["2.weight"]].any()


def test_masks_from_elsewhere_and_what_is_left_out() -> None:
    net = network()
    masks = mask_from_scores(score_magnitude(net), 0.25)
    _, _, sparse = start("static", net=net, masks=masks)
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in masks.items())
    _, _, part = start("rigl", exclude=["4.*"])
    assert set(part.masks) == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "ring"}, "method"), ({"density": 0}, "density"), ({"density": 1.5}, "density"),
        ({"total_steps": 0}, "total_steps"), ({"update_every": 0}, "update_every"), ({"stop": 1.2}, "stop"),
        ({"drop_fraction": -0.1}, "drop_fraction"), ({"scope": "row"}, "scope"), ({"exclude": ["9.*"]}, "exclude"),
        ({"method": "gmp", "start_density": 0.1, "density": 0.2}, "start_density"), ({"method": "gmp", "stop": 0.0}, "stop"),
        ({"masks": {"9.weight": torch.ones(1, 1, dtype=torch.bool)}}, "masks"), ({"allocation": "best"}, "mode"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        start(options.pop("method", "rigl"), **options)


def test_an_optimiser_without_a_weight() -> None:
    net = network()
    with pytest.raises(InputError, match=r"lacks the weight '2\.weight'"):
        SparseTrainer(net, torch.optim.SGD(net[0].parameters(), 0.1), density=0.5, total_steps=9, generator=generator())


# The Trainer of transformers


def test_the_callback_trains_saves_and_resumes(tmp_path) -> None:
    import transformers

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            ids = torch.tensor([(i * 7 + j * 3) % 50 + 1 for j in range(8)])
            return {"input_ids": ids, "labels": ids}

    def trainer(folder, callback, **more):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ))  # fmt: skip
        args = transformers.TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=16, save_steps=8, report_to=[],
            learning_rate=1e-2, use_cpu=True, disable_tqdm=True, logging_strategy="no", **more,
        )  # fmt: skip
        return transformers.Trainer(model, args, train_dataset=Rows(), callbacks=[callback])

    def callback() -> SparsityCallback:
        return SparsityCallback(0.3, method="rigl", update_every=3, exclude=["transformer.wte.*"])

    whole = trainer(tmp_path / "a", callback())
    whole.train()
    sparse = next(c for c in whole.callback_handler.callbacks if isinstance(c, SparsityCallback)).sparse
    assert sparse is not None and sparse.steps == 16
    for name, mask in sparse.masks.items():
        assert not whole.model.get_parameter(name)[~mask].any()
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "checkpoint-16")
    assert all(not back.get_parameter(name)[~mask].any() for name, mask in sparse.masks.items())
    resumed = trainer(tmp_path / "a", fresh := callback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert all(torch.equal(mask, fresh.sparse.masks[name]) for name, mask in sparse.masks.items())
    for one, two in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.allclose(one, two, atol=1e-6)
    elsewhere = trainer(tmp_path / "b", callback())
    with pytest.raises(DataError, match=r"checkpoint-8 holds no sparsity\.json: new masks would zero trained weights"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    (tmp_path / "a" / "checkpoint-8" / "sparsity.json").write_text("{}")
    with pytest.raises(DataError, match="no readable state"):
        trainer(tmp_path / "a", callback()).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))


# Lottery tickets


def test_a_ticket_is_rewound_and_exactly_as_dense_as_asked() -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def train(model, masks, on_step) -> None:
        opt = OPTIMIZERS["sgd"](model.parameters())
        SparseTrainer(model, opt, density=0.5, total_steps=6, generator=generator(), method="static", masks=masks)
        for i in range(6):
            steps(model, opt, 1, i)
            on_step(i + 1)
            if len(seen) < 6:
                seen.append(copy.deepcopy(model.state_dict()))

    ticket = lottery_ticket(network, train, density=0.3)
    counts = [TOTAL]
    while counts[-1] > round(0.3 * TOTAL):
        counts.append(max(round(0.8 * counts[-1]), round(0.3 * TOTAL)))
    assert [round(d * TOTAL) for d in ticket.densities] == counts[1:] and ticket.trainings == len(counts) - 1
    start_values = network().state_dict()
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.model.state_dict()[name], start_values[name] * mask)
    first = mask_from_scores({n: v.abs() for n, v in seen[-1].items() if v.ndim > 1}, 0.8)
    assert all((mask & ~first[name]).sum() == 0 for name, mask in ticket.masks.items())  # survivors only
    seen.clear()
    late = lottery_ticket(network, train, density=0.5, rewind_step=3)
    for name, mask in late.masks.items():
        assert torch.equal(late.model.state_dict()[name], seen[2][name] * mask)
    with pytest.raises(InputError, match="fewer steps"):
        lottery_ticket(network, train, density=0.5, rewind_step=7)
    for options in ({"density": 0}, {"density": 1}, {"density": 0.5, "rate": 1}, {"density": 0.5, "rewind_step": -1}):
        with pytest.raises(InputError, match="density, rate, rewind_step"):
            lottery_ticket(network, train, **options)


def test_dense_backwards_cost_what_was_absent_then() -> None:
    """GraNet begins dense: a first step with dense gradients costs no more than a dense one."""
    net = network()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    sparse = SparseTrainer(
        net, opt, density=0.1, total_steps=20, update_every=1, generator=generator(), method="granet", start_density=1.0
    )
    example_row = torch.randn(1, net[0].in_features)
    steps(net, opt, 1)
    report = sparse.report(example_row)
    assert report.training_flops == pytest.approx(report.dense_training_flops)
    # By hand from then on: 2 f_S + f_D at every step, at the density of that step.
    costs = {name: layer.dense_flops for name, layer in report.layers.items()}
    expected = report.training_flops
    for _ in range(5):
        shares = {name: float(mask.sum()) / mask.numel() for name, mask in sparse.masks.items()}
        steps(net, opt, 1)
        expected += sum(cost * (2 * shares[name] + 1) for name, cost in costs.items())
    assert sparse.report(example_row).training_flops == pytest.approx(expected)


def test_explored_and_density_count_the_same_weights() -> None:
    net = network()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    sparse = SparseTrainer(
        net, opt, density=0.1, total_steps=20, generator=generator(), method="static", exclude=["2.*"]
    )
    report = sparse.report(torch.randn(1, net[0].in_features))
    assert report.explored == pytest.approx(report.density)
