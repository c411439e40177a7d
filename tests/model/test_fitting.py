from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from salience.errors import InputError
from salience.model import fit
from tiny import Plain, state_hash

X = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0].mean((1, 2)) > 0).long()


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.drop = Plain(), nn.Dropout(0.5)

    def forward(self, x):
        return self.body(self.drop(x))


def trained(seed=0, optimizer=torch.optim.AdamW, network=Dropping, **options):
    torch.manual_seed(5)
    model = network()
    settings = dict(loss=cross_entropy, epochs=3, batch_size=16, generator=torch.Generator().manual_seed(seed))
    history = fit(model, X, Y, optimizer=optimizer(model.parameters(), lr=0.01), **(settings | options))
    return model, history


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_seed_gives_the_same_weights_bit_for_bit(optimizer):
    (one, history), (two, again) = trained(optimizer=optimizer), trained(optimizer=optimizer)
    assert state_hash(one) == state_hash(two)
    assert history == again
    other, _ = trained(seed=1, optimizer=optimizer)
    assert state_hash(other) != state_hash(one)


def test_the_global_random_state_is_neither_used_nor_moved():
    one, _ = trained()
    torch.manual_seed(5)
    model = Dropping()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    fit(model, X, Y, loss=cross_entropy, optimizer=optimizer, epochs=3, batch_size=16, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert state_hash(model) == state_hash(one)


def test_one_full_batch_is_gradient_descent_by_hand():
    # One weight w = 0, loss (w x - y)^2: gradient -2 mean(x y), so w becomes 2 lr mean(x y).
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = fit(model, x, y, loss=mse_loss, optimizer=optimizer, epochs=1, batch_size=3, generator=torch.Generator())
    assert model.weight.item() == pytest.approx(2 * 0.01 * (2 + 8 + 18) / 3)
    assert history.loss == [pytest.approx((4 + 16 + 36) / 3)] and history.steps == 1
    assert model.weight.grad is None


def test_every_row_is_seen_once_an_epoch_in_new_orders():
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            seen.append(x[:, 0].long().tolist())
            return super().forward(x)

    model = Watch(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.arange(10.0)[:, None]
    settings = dict(loss=mse_loss, optimizer=optimizer, epochs=2, batch_size=4, generator=torch.Generator())
    history = fit(model, x, x, drop_last=False, **settings)
    assert [len(b) for b in seen] == [4, 4, 2, 4, 4, 2] and history.steps == 6
    epochs = [[row for batch in batches for row in batch] for batches in (seen[:3], seen[3:])]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    # Rows count alike in the mean, however the batches fall.
    with torch.no_grad():
        assert history.loss == [pytest.approx(mse_loss(model(x), x).item(), rel=1e-6)] * 2
    seen.clear()
    fit(model, x, x, **settings)
    assert [len(b) for b in seen] == [4, 4, 4, 4]


def test_milestones_lower_the_learning_rate():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    weights = [0.0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(
        model, torch.ones(2, 1), torch.ones(2, 1), loss=lambda out, y: -out.mean(), optimizer=optimizer,
        epochs=4, batch_size=2, milestones=[1, 3], gamma=0.5, generator=torch.Generator(),
        on_step=lambda step: weights.append(model.weight.item()),
    )  # fmt: skip
    assert [b - a for a, b in pairwise(weights)] == [1.0, 0.5, 0.5, 0.25]


def test_on_step_can_put_masked_weights_back():
    steps = []
    torch.manual_seed(0)
    model = Plain()

    def restore(step):
        steps.append(step)
        with torch.no_grad():
            model.norm.weight[0] = 0

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    fit(model, X, Y, loss=cross_entropy, optimizer=optimizer, epochs=2, generator=generator, batch_size=16,
        on_step=restore)  # fmt: skip
    assert steps == [1, 2, 3, 4, 5, 6]
    assert model.norm.weight[0] == 0 and (model.norm.weight[1:] != 1).all()


def test_flags_come_back_and_frozen_parameters_stay():
    torch.manual_seed(0)
    model = Plain().eval()
    model.head.train()
    model.conv.requires_grad_(False)
    frozen = model.conv.weight.clone()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    settings = dict(loss=cross_entropy, epochs=1, batch_size=16, generator=torch.Generator())
    with torch.no_grad():  # an outer block must not switch learning off
        fit(model, X, Y, optimizer=optimizer, **settings)
    assert not model.norm.training and model.head.training and not model.conv.weight.requires_grad
    assert torch.equal(model.conv.weight, frozen)
    assert model.norm.num_batches_tracked == 3  # it was in training mode meanwhile
    assert all(p.grad is None for p in model.parameters())


def test_it_learns():
    _, history = trained(network=Plain, epochs=40)
    assert history.loss[-1] < 0.5 * history.loss[0]


def test_bad_arguments_are_named():
    for options, text in [
        (dict(epochs=0), "epochs"),
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=51), "lower batch_size"),
        (dict(loss=lambda out, y: out.mean() * float("nan")), "epoch 1"),
    ]:
        with pytest.raises(InputError, match=text):
            trained(**options)
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="targets"):
        fit(model, X, Y[:-1], loss=cross_entropy, optimizer=optimizer, epochs=1, generator=torch.Generator())
