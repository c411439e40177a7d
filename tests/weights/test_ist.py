"""Importance-aware sparse tuning: the update by hand, exact sparsity, every kind of adapter, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from salience.errors import DataError, InputError, NothingToDo
from salience.scores import Scores
from salience.weights import ImportanceSparseTuning, ISTCallback, layer_ablation
from salience.weights.ist.damping import damped, find_layers
from tiny import build, example, state_hash

peft = pytest.importorskip("peft")
ATTENTION = ["q_proj", "v_proj"]


class Stack(nn.Module):
    """Layers whose sum is the loss: x -> x + w_i, so that all effects can be worked out by hand."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stack(layers: int = 4) -> Stack:
    torch.manual_seed(0)
    return Stack(layers)


def loss(model, batch):
    return model(batch).square().mean()


def adapted(config=None, family: str = "llama", seed: int = 0):
    model = build(family)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config or peft.LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION))


def text(seed: int = 1):
    batch = example("llama", seed=seed)
    return {**batch, "labels": batch["input_ids"]}


def optimizer_of(model, lr: float = 0.05):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)


def train(model, steps: int = 6, lr: float = 0.05, tuning=None, optimizer=None):
    optimizer = optimizer or optimizer_of(model, lr)
    model.train()
    for step in range(steps):
        if tuning is not None:
            tuning.before_step(step, lambda: text(2))
        optimizer.zero_grad(set_to_none=True)
        model(**text()).loss.backward()
        optimizer.step()
    return optimizer


# The scores


def test_the_update_is_that_of_the_authors_on_the_same_sets_and_losses() -> None:
    """Their loop in scalars: rewards exp(-L) minus the mean, p of before the update, only suppressed layers move."""
    tuning = ImportanceSparseTuning(stack(6), interval=1, generator=generator())
    torch.manual_seed(1)
    scores = torch.zeros(6)
    for step in range(1, 30):
        losses = iter((torch.rand(3, dtype=torch.float64) * 2).tolist())
        tuning.before_step(step, torch.ones(1, 2), lambda model, batch, losses=losses: torch.tensor(next(losses)))
        last = tuning.history_[-1]
        rewards = [math.exp(-value) for value in last["losses"]]
        centred = [reward - sum(rewards) / 3 for reward in rewards]
        p = torch.sigmoid(scores)
        for k in range(3):
            for i in range(6):
                if i in last["suppressed"][k]:
                    scores[i] += centred[k] * p[i] * (1 - p[i]) * 10
    torch.testing.assert_close(-tuning.importance_.float(), scores, atol=1e-6, rtol=1e-5)
    assert scores.abs().max() > 0.5


def test_one_update_by_hand() -> None:
    """Two layers, one suppressed at a time: s moves by 10 * (r_k - mean) / 4 for the layer of set k."""
    tuning = ImportanceSparseTuning(stack(2), n_update=0.5, trials=2, interval=5, generator=generator())
    losses = iter([0.0, math.log(2)])
    tuning.before_step(5, torch.ones(1, 2), lambda model, batch: torch.tensor(next(losses)))
    first, second = tuning.history_[0]["suppressed"]
    assert sorted(first + second) == [0, 1] and tuning.history_[0]["rewards"] == pytest.approx([1, 0.5])
    assert float(tuning.importance_[first[0]]) == pytest.approx(-10 * 0.25 / 4)  # harmless to damp: less important
    assert float(tuning.importance_[second[0]]) == pytest.approx(10 * 0.25 / 4)
    assert float(tuning.probabilities_[second[0]]) > 0.5 > float(tuning.probabilities_[first[0]])


def test_suppressed_and_updated_layers_are_drawn_from_opposite_ends() -> None:
    tuning = ImportanceSparseTuning(stack(8), interval=1, generator=generator())
    tuning._scores[:4], tuning._scores[4:] = -4.0, 4.0  # the first four matter
    suppressed = torch.zeros(8)
    for _ in range(200):
        tuning.before_step(0)
        for chosen in tuning._trial_sets():  # three different ones, so that not all can be the last four
            suppressed[chosen] += 1
    assert tuning.counts_[:4].sum() > 350 and suppressed[4:].sum() > 0.75 * suppressed.sum()
    assert int(tuning.counts_.sum()) == 400 and suppressed.sum() == 200 * 3 * 4


def test_the_sets_are_those_of_torchs_multinomial() -> None:
    tuning = ImportanceSparseTuning(stack(8), generator=generator(3))
    tuning._scores.copy_(torch.linspace(-2, 2, 8))
    expected = torch.multinomial(torch.sigmoid(-torch.linspace(-2, 2, 8).double()), 2, generator=generator(3))
    assert tuning.before_step(0) == sorted(expected.tolist())


def test_scores_are_updated_every_interval_and_layers_drawn_at_every_step() -> None:
    tuning = ImportanceSparseTuning(stack(8), interval=4, generator=generator())
    drawn = [tuple(tuning.before_step(step, torch.ones(3, 2), loss)) for step in range(13)]
    assert [update["step"] for update in tuning.history_] == [4, 8, 12]
    assert len(set(drawn)) > 5
    assert [tuning.due(step) for step in (0, 3, 4, 8)] == [False, False, True, True]


def test_random_mode_scores_nothing_and_draws_evenly() -> None:
    tuning = ImportanceSparseTuning(stack(4), mode="random", n_update=0.5, generator=generator())
    for step in range(600):
        tuning.before_step(step)
    assert not tuning.history_ and not tuning.importance_.any()
    assert (tuning.counts_ - 300).abs().max() < 60


def test_same_seed_same_run() -> None:
    states = []
    for seed in (0, 0, 1):
        model = adapted()
        tuning = ImportanceSparseTuning(model, n_update=0.4, n_suppress=0.4, interval=2, generator=generator(seed))
        train(model, tuning=tuning)
        states.append((tuning.importance_, state_hash(model)))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1] != states[2][1]


# What trains, and what is saved


def test_only_drawn_layers_have_gradients_change_and_get_optimiser_state() -> None:
    model = adapted(peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(model)
    tuning = ImportanceSparseTuning(model, n_update=0.4, n_suppress=0.4, interval=3, generator=generator())
    model.train()
    for step in range(12):
        before = {k: p.detach().clone() for k, p in parameters.items()}
        active = tuning.before_step(step, text(2))
        assert len(active) == 1
        optimizer.zero_grad(set_to_none=True)
        model(**text()).loss.backward()
        optimizer.step()
        for name, parameter in parameters.items():
            drawn = any(f".layers.{i}." in name for i in active)
            assert (parameter.grad is not None) == drawn == parameter.requires_grad
            assert (not torch.equal(parameter, before[name])) == drawn
            ever = any(f".layers.{i}." in name and tuning.counts_[i] for i in range(3))
            assert bool(optimizer.state.get(parameter)) == ever
    tuning.release()
    assert {k for k, p in model.named_parameters() if p.requires_grad} == set(parameters)


def test_with_all_layers_it_is_plain_peft_bit_for_bit() -> None:
    plain, sparse = (adapted(peft.LoraConfig(r=2, target_modules=ATTENTION, lora_dropout=0.2)) for _ in range(2))
    torch.manual_seed(5)
    train(plain)
    torch.manual_seed(5)
    tuning = ImportanceSparseTuning(sparse, n_update=1.0, n_suppress=0.4, interval=2, generator=generator())
    train(sparse, tuning=tuning)
    assert len(tuning.history_) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), sparse.state_dict().values()))


def test_nothing_below_the_lowest_drawn_layer_is_kept_for_the_backward_pass() -> None:
    def kept(active: list[int]) -> tuple[int, list[bool]]:
        model = adapted()
        tuning = ImportanceSparseTuning(model, n_update=0.4, mode="random")
        tuning._activate(active)
        sizes: list[int] = []
        flags: list[bool] = []
        for layer in model.base_model.model.model.layers:
            layer.register_forward_hook(lambda module, args, output: flags.append(output.requires_grad))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**text())
        return sum(sizes), flags

    (low, all_on), (high, last_on) = kept([0]), kept([2])
    assert all_on == [True, True, True] and last_on == [False, False, True]
    assert high < 0.6 * low


def test_gradients_are_drawn_once_for_several_micro_batches() -> None:
    model = adapted()
    tuning = ImportanceSparseTuning(model, n_update=0.4, mode="random", generator=generator())
    active = tuning.before_step(0)
    for _ in range(3):
        model(**text()).loss.backward()
    with_gradient = {k.split(".layers.")[1][0] for k, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {str(i) for i in active}


@pytest.mark.parametrize("idle_state", ["offload", "drop"])
def test_optimiser_state_of_idle_layers(idle_state: str) -> None:
    runs = {}
    for how in ("keep", idle_state):
        model = adapted()
        optimizer = optimizer_of(model)
        tuning = ImportanceSparseTuning(
            model, n_update=0.4, mode="random", idle_state=how, optimizer=optimizer, generator=generator()
        )
        train(model, 8, tuning=tuning, optimizer=optimizer)
        runs[how] = (model, optimizer, tuning)
    model, optimizer, tuning = runs[idle_state]
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), runs["keep"][0].state_dict().values()))
    assert same == (idle_state == "offload")
    held = {id(p) for p in optimizer.state if optimizer.state[p]}
    active = {id(p) for i in tuning.active_ for p in tuning._layers[i].parameters.values()}
    assert active <= held and (held == active) == (idle_state == "drop")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
def test_idle_state_leaves_the_device() -> None:
    model = stack().cuda()
    optimizer = torch.optim.AdamW(model.blocks.parameters())
    tuning = ImportanceSparseTuning(model, mode="random", idle_state="offload", optimizer=optimizer)
    for step in range(6):
        active = tuning.before_step(step)
        optimizer.zero_grad()
        loss(model, torch.ones(2, 2, device="cuda")).backward()
        optimizer.step()
    for number, block in enumerate(model.blocks):
        for parameter in block.parameters():
            if parameter in optimizer.state:
                assert optimizer.state[parameter]["exp_avg"].is_cuda == (number in active)


# Damping


KINDS = {
    "lora": (peft.LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION), True),
    "rank patterns": (
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, use_rslora=True, rank_pattern={"q_proj": 4}), True,
    ),
    "loha": (peft.LoHaConfig(r=2, target_modules=ATTENTION), True),
    "lokr": (peft.LoKrConfig(r=2, target_modules=ATTENTION), True),
    "adalora": (peft.AdaLoraConfig(target_modules=ATTENTION, total_step=10), True),
    "shira": (peft.ShiraConfig(target_modules=["q_proj", "o_proj"], r=2), True),
    "randlora": (peft.RandLoraConfig(target_modules=["q_proj", "o_proj"], r=4), True),
    "ia3": (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), False),
    "oft": (peft.OFTConfig(target_modules=ATTENTION, oft_block_size=4), False),
    "boft": (peft.BOFTConfig(target_modules=["q_proj", "o_proj"], boft_block_size=4), False),
    "vera": (peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4), False),
    "hra": (peft.HRAConfig(target_modules=["q_proj", "o_proj"], r=2), False),
    "layer norms": (peft.LNTuningConfig(target_modules=["input_layernorm"]), False),
    "fourier": (peft.FourierFTConfig(target_modules=["q_proj", "o_proj"], n_frequency=10), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_damped_to_nothing_is_the_model_before_tuning(kind: str) -> None:
    config, scaled = KINDS[kind]
    model = adapted(copy.deepcopy(config))
    with torch.no_grad():
        base = model.eval()(**text()).logits
    tuning = ImportanceSparseTuning(model, n_update=1.0, n_suppress=0.4, interval=2, generator=generator())
    assert len(tuning.layer_names_) == 3 and all(bool(layer.scalings) == scaled for layer in tuning._layers)
    train(model, 3, lr=0.5, tuning=tuning)
    assert len(tuning.history_) == 1
    before = state_hash(model.eval())
    with torch.no_grad():
        tuned = model(**text()).logits
        with damped(tuning._layers, 0.0, tuning.start_):
            assert torch.equal(model(**text()).logits, base)
        with damped(tuning._layers[:1], 0.25, tuning.start_):
            assert not torch.equal(model(**text()).logits, tuned)
        assert not torch.equal(tuned, base) and torch.equal(model(**text()).logits, tuned)
    assert state_hash(model) == before


def test_lora_is_damped_by_its_scaling_and_attentions_own_scaling_is_left_alone() -> None:
    model = adapted(peft.LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, rank_pattern={"v_proj": 8}))
    layer = find_layers(model)[1]
    attention = model.base_model.model.model.layers[1].self_attn
    plain = attention.scaling
    with damped([layer], 0.25, {}):
        assert attention.q_proj.scaling == {"default": 0.5} and attention.v_proj.scaling == {"default": 0.125}
        assert attention.scaling == plain
    assert attention.q_proj.scaling == {"default": 2.0} and attention.v_proj.scaling == {"default": 0.5}


def test_dora_keeps_its_magnitude_as_in_the_authors_code() -> None:
    model = adapted(peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True))
    layers = find_layers(model)
    assert len(layers[0].scalings) == 2 and not layers[0].unscaled
    assert sum("magnitude" in name for name in layers[0].parameters) == 2


def test_a_bottleneck_adapters_scaling_is_a_plain_number() -> None:
    model = stack()
    model.requires_grad_(False)
    for block in model.blocks:
        block.adapter = nn.Linear(2, 2)
        block.adapter.adapter_scaling = 2.0
    layer = find_layers(model)[0]
    assert not layer.unscaled
    with damped([layer], 0.25, {}):
        assert [b.adapter.adapter_scaling for b in model.blocks] == [0.5, 2.0, 2.0, 2.0]
    assert model.blocks[0].adapter.adapter_scaling == 2.0


def test_full_fine_tuning_goes_back_towards_the_start() -> None:
    model = stack()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tuning = ImportanceSparseTuning(model, n_update=0.5, interval=2, generator=generator())
    for step in range(7):
        tuning.before_step(step, torch.ones(3, 2), loss)
        optimizer.zero_grad()
        loss(model, torch.ones(3, 2)).backward()
        optimizer.step()
    drawn = int(tuning.counts_.argmax())
    weight, name = model.blocks[drawn].weight, f"blocks.{drawn}.weight"
    tuned = weight.detach().clone()
    assert torch.equal(tuning.start_[name], start[name]) and not torch.equal(tuned, start[name])
    with damped([tuning._layers[drawn]], 0.25, tuning.start_):
        torch.testing.assert_close(weight.detach(), start[name] + 0.25 * (tuned - start[name]))
    assert torch.equal(weight, tuned) and len(tuning.history_) == 3
    assert set(tuning.start_) <= {k for k in start if k.startswith("blocks.")}


def test_everything_is_put_back_after_an_exception() -> None:
    model = adapted(peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    model.train()
    model.base_model.model.model.layers[0].eval()
    tuning = ImportanceSparseTuning(model, n_suppress=0.4, n_update=0.4, interval=1)
    before = state_hash(model)
    scalings = [dict(place) for layer in tuning._layers for place, _ in layer.scalings]

    def failing(network, batch):
        assert not network.training and not torch.is_grad_enabled()
        raise RuntimeError("in a trial")

    with pytest.raises(RuntimeError, match="in a trial"):
        tuning.before_step(1, text(), failing)
    assert state_hash(model) == before and torch.is_grad_enabled()
    assert [dict(place) for layer in tuning._layers for place, _ in layer.scalings] == scalings
    assert not tuning.history_ and not tuning.importance_.any()


# Which layers


def test_adapters_on_part_of_the_layers() -> None:
    model = adapted(peft.LoraConfig(r=2, target_modules=ATTENTION, layers_to_transform=[0, 2]))
    tuning = ImportanceSparseTuning(model, n_update=0.5, generator=generator(), interval=2)
    assert [name.rsplit(".", 1)[1] for name in tuning.layer_names_] == ["0", "2"]
    train(model, tuning=tuning)
    assert len(tuning.importance_) == 2 and float(tuning.importance_.abs().sum()) > 0


def test_of_several_adapters_only_the_one_that_trains_is_damped_and_drawn() -> None:
    model = adapted()
    model.add_adapter(
        "second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"], layers_to_transform=[1, 2])
    )
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name.split("."))
    tuning = ImportanceSparseTuning(model, n_update=0.5, generator=generator(), interval=2)
    assert [name.rsplit(".", 1)[1] for name in tuning.layer_names_] == ["1", "2"]
    projection = model.base_model.model.model.layers[1].self_attn.v_proj
    with damped(tuning._layers, 0.5, {}):
        assert projection.scaling == {"default": 2.0, "second": 2.0}
    assert projection.scaling == {"default": 2.0, "second": 4.0}
    first = {k: p.detach().clone() for k, p in model.named_parameters() if "default" in k.split(".")}
    train(model, tuning=tuning)
    assert all(torch.equal(model.get_parameter(k), p) for k, p in first.items())


def test_what_stands_outside_of_the_layers_always_trains() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "query"], modules_to_save=["classifier"])
    model = adapted(config, "vit")
    tuning = ImportanceSparseTuning(model, n_update=0.4, mode="random", generator=generator())
    for step in range(5):
        tuning.before_step(step)
        assert all(p.requires_grad for k, p in model.named_parameters() if "modules_to_save" in k)
        assert sum(p.requires_grad for k, p in model.named_parameters() if "lora_" in k) == 2


def test_encoder_and_decoder() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q", "v"])
    model = adapted(config, "t5")
    with pytest.warns(UserWarning, match=r"trains at every step; to draw from all, give layers="):
        assert len(find_layers(model)) == 2
    both = find_layers(model, ["base_model.model.encoder.block", "base_model.model.decoder.block"])
    assert len(both) == 4
    assert find_layers(model, "base_model.model.decoder.block.1")[0].name == "base_model.model.decoder.block.1"


def test_lists_within_layers_are_not_the_layers() -> None:
    model = build("moe")
    assert [layer.name for layer in find_layers(model)] == [f"model.layers.{i}" for i in range(3)]


def test_shared_parameters_belong_to_no_layer() -> None:
    model = stack()
    model.blocks[1].weight = model.blocks[0].weight
    model.blocks[3].bias = model.head.bias = nn.Parameter(torch.zeros(2))
    layers = find_layers(model)
    assert [sorted(name.split(".")[-1] for name in layer.parameters) for layer in layers] == [
        ["bias"], ["bias"], ["bias", "weight"], ["weight"],
    ]  # fmt: skip


# Ablation


def test_ablation_is_the_rise_of_the_loss_layer_by_layer() -> None:
    model = adapted(peft.LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, init_lora_weights=False))
    batches = [text(1), text(2)]
    rises = layer_ablation(model, iter(batches))
    assert rises.dtype == torch.float64 and rises.shape == (3,)
    expected = []
    with torch.no_grad():
        for i in range(3):
            total = 0.0
            for batch in batches:
                whole = float(model(**batch).loss)
                for projection in ATTENTION:
                    getattr(model.base_model.model.model.layers[i].self_attn, projection).set_scale("default", 0.25)
                total += float(model(**batch).loss) - whole
                for projection in ATTENTION:
                    getattr(model.base_model.model.model.layers[i].self_attn, projection).set_scale("default", 1.0)
            expected.append(total / 2)
    assert rises.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(rises.abs().min()) > 0


def test_a_layer_that_carries_the_tuning_becomes_the_most_important() -> None:
    """Only the middle layer's adapter does anything, so that only sets with it cost loss."""
    model = adapted(peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    optimizer = torch.optim.AdamW(
        [p for k, p in model.named_parameters() if ".layers.1." in k and p.requires_grad], 0.02
    )
    train(model, 30, optimizer=optimizer)
    tuning = ImportanceSparseTuning(model, n_suppress=0.67, n_update=0.4, interval=1, generator=generator())
    for step in range(1, 20):
        tuning.before_step(step, text())
    assert int(tuning.importance_.argmax()) == 1 == int(layer_ablation_of(tuning, text()).argmax())
    assert int(tuning.probabilities_.argmax()) == 1


def layer_ablation_of(tuning, batch):
    tuning.release()
    return layer_ablation(tuning.model, [batch])


def test_scores_go_to_other_methods() -> None:
    tuning = ImportanceSparseTuning(stack(), interval=1)
    tuning.before_step(1, torch.ones(3, 2), lambda model, batch: torch.rand((), generator=tuning.generator))
    scores = tuning.scores()
    assert isinstance(scores, Scores) and scores.unit == "layer"
    assert list(scores.ids) == [f"blocks.{i}" for i in range(4)]
    assert scores.values.tolist() == tuning.importance_.tolist()


@pytest.mark.parametrize("mode", ["importance", "random"])
def test_a_layer_that_was_never_drawn_has_a_rise_of_nothing(mode: str) -> None:
    model = stack(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tuning = ImportanceSparseTuning(model, mode=mode, generator=generator())
    for step in range(2):
        tuning.before_step(step)
        optimizer.zero_grad()
        loss(model, torch.ones(3, 2)).backward()
        optimizer.step()
    tuning.release()
    rises = layer_ablation(model, [torch.ones(3, 2)], loss, start=tuning.start_)
    assert 0 < int((tuning.counts_ == 0).sum()) < 4
    assert (rises == 0).tolist() == (tuning.counts_ == 0).tolist()
    untouched = stack(4)
    assert not layer_ablation(untouched, [torch.ones(3, 2)], loss, start={}).any()


# Bad input


def test_models_without_layers_to_draw_from() -> None:
    prompt = peft.get_peft_model(build("gpt2"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prefix = peft.get_peft_model(build("gpt2"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for model in (prompt, prefix, nn.Linear(2, 2)):
        with pytest.raises(InputError, match=r"no nn\.ModuleList that holds trainable parameters\. Prompt and prefix"):
            ImportanceSparseTuning(model)
    with pytest.raises(InputError, match="has no trainable parameter; attach an adapter"):
        ImportanceSparseTuning(stack().requires_grad_(False))
    with pytest.raises(InputError, match="outside of its layers only"):
        model = stack()
        model.blocks.requires_grad_(False)
        ImportanceSparseTuning(model, layers=["blocks"])
    with pytest.raises(InputError, match=r"no layer 'block'; nearest names: 'blocks'"):
        ImportanceSparseTuning(stack(), layers=["block"])
    for layers in (["blocks", "blocks.1"], ["blocks.0", "blocks.0"], [], ["head", ""]):
        with pytest.raises(InputError, match="each once and none within another"):
            ImportanceSparseTuning(stack(), layers=layers)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(InputError, match="its adapter is merged"):
        ImportanceSparseTuning(merged)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n_update": 0.2}, "n_update: 0.2 of 4 layers is none; give at least 0.25"),
        ({"n_suppress": 0.2}, "n_suppress: 0.2 of 4 layers is none"),
        ({"n_update": 1.5}, "n_update: got 1.5; it is a share"),
        ({"n_update": 0}, "n_update: got 0; it is a share"),
        ({"n_suppress": math.nan}, "n_suppress: got nan"),
        ({"n_suppress": 1.0}, "n_suppress: got 1.0, all 4 layers: no two sets"),
        ({"suppression": 1.0}, r"suppression: got 1.0; it must lie in \[0, 1\)"),
        ({"suppression": -0.1}, "suppression: got -0.1"),
        ({"trials": 1}, "trials and interval: got 1 and 10"),
        ({"interval": 0}, "trials and interval: got 3 and 0"),
        ({"score_lr": 0.0}, "score_lr: got 0.0"),
        ({"mode": "greedy"}, "mode: got 'greedy'"),
        ({"idle_state": "delete"}, "idle_state: got 'delete'"),
        ({"idle_state": "drop"}, "optimizer: idle_state='drop' needs"),
    ],
)
def test_options_out_of_range(options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        ImportanceSparseTuning(stack(), **options)


def test_a_share_that_floats_cannot_hold_is_rounded_down_from_the_right_side() -> None:
    assert ImportanceSparseTuning(stack(10), n_update=0.7).n_update == 7  # 0.7 * 10 is 7.000000000000001 - or less
    assert ImportanceSparseTuning(stack(25), n_update=0.28).n_update == 7  # 0.28 * 25 is 7.000000000000001
    assert ImportanceSparseTuning(stack(7), n_update=0.25, n_suppress=0.5).n_suppress == 3


def test_fewer_sets_than_trials_do_not_loop_for_ever() -> None:
    tuning = ImportanceSparseTuning(stack(2), n_update=0.5, trials=5, interval=1)
    tuning.before_step(1, torch.ones(1, 2), loss)
    assert sorted(tuning.history_[0]["suppressed"]) == [[0], [1]]
    tuning._scores.copy_(torch.tensor([1e6, -1e6]))  # the same set again and again
    tuning.before_step(2, torch.ones(1, 2), loss)
    assert tuning.history_[1]["suppressed"] == [[0]]
    assert torch.equal(tuning.importance_, torch.tensor([-1e6, 1e6], dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_no_reward(bad: float) -> None:
    tuning = ImportanceSparseTuning(stack(), interval=1)
    losses = iter([0.0, bad, 0.0])
    with pytest.warns(UserWarning, match=f"step 1: the loss of a trial is {bad}"):
        tuning.before_step(1, torch.ones(1, 2), lambda model, batch: torch.tensor(next(losses)))
    assert tuning.history_[0]["rewards"] == [1.0, 0.0, 1.0] and bool(tuning.importance_.isfinite().all())


def test_losses_that_cannot_be_used() -> None:
    tuning = ImportanceSparseTuning(stack(), interval=1)
    with pytest.raises(InputError, match="scoring_batch: step 3 updates the scores and needs one"):
        tuning.before_step(3)
    with pytest.raises(InputError, match=r"exp\(-loss\) of -1000\.0"):
        tuning.before_step(3, torch.ones(1, 2), lambda model, batch: torch.tensor(-1000.0))
    with pytest.raises(InputError, match="loss_fn: Stack returned no loss"):
        tuning.before_step(3, torch.ones(1, 2))
    assert not tuning.importance_.any()


def test_ties_change_nothing() -> None:
    """Before the first step LoRA does nothing, so that all trials cost the same."""
    model = adapted()
    tuning = ImportanceSparseTuning(model, n_update=0.4, n_suppress=0.4, interval=1)
    tuning.before_step(1, text())
    assert tuning.history_[0]["losses"][0] == tuning.history_[0]["losses"][1]
    assert not tuning.importance_.any()


def test_ablation_of_nothing() -> None:
    with pytest.raises(NothingToDo, match="batches: there are none"):
        layer_ablation(adapted(), [])
    with pytest.raises(InputError, match=r"start: 'blocks\.0\.weight' of layer 'blocks\.0' has no scaling"):
        layer_ablation(stack(), [torch.ones(1, 2)], loss)
    with pytest.raises(InputError, match="suppression: got 1"):
        layer_ablation(adapted(), [text()], suppression=1.0)


# The Trainer of transformers, and going on


def test_state_goes_on_as_if_nothing_had_happened() -> None:
    whole, first = (ImportanceSparseTuning(stack(), interval=2, generator=generator()) for _ in range(2))
    drawn = [whole.before_step(step, torch.ones(3, 2), loss) for step in range(12)]
    for step in range(7):
        first.before_step(step, torch.ones(3, 2), loss)
    first.release()
    second = ImportanceSparseTuning(first.model, interval=2)
    second.load_state_dict(first.state_dict())
    assert [second.before_step(step, torch.ones(3, 2), loss) for step in range(7, 12)] == drawn[7:]
    assert torch.equal(second.importance_, whole.importance_) and torch.equal(second.counts_, whole.counts_)
    with pytest.raises(InputError, match="state: it is of the layers"):
        ImportanceSparseTuning(stack(5), interval=2).load_state_dict(first.state_dict())


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.tensor([(i * 7 + j * 3) % 50 + 1 for j in range(8)])
        return {"input_ids": ids, "labels": ids}


def trainer(folder, callback, full: bool = False, **more):
    import transformers

    torch.manual_seed(0)
    model = (
        build("gpt2") if full else adapted(peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), "gpt2")
    )
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 8,
            "save_steps": 4, "report_to": [], "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True,
            "logging_strategy": "no", **more,
        }
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=Rows(), callbacks=[callback])


def callback(**options) -> ISTCallback:
    return ISTCallback(n_update=0.4, n_suppress=0.4, interval=2, batch_size=6, **options)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full fine-tuning"])
def test_the_callback_trains_saves_and_resumes(tmp_path, full: bool) -> None:
    whole = trainer(tmp_path / "a", told := callback(), full)
    trainable = {k for k, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    assert [update["step"] for update in told.tuning.history_] == [2, 4, 6] and int(told.tuning.counts_.sum()) == 8
    assert {k for k, p in whole.model.named_parameters() if p.requires_grad} == trainable
    assert bool(told.tuning.start_) == full
    resumed = trainer(tmp_path / "a", fresh := callback(), full)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(fresh.tuning.importance_, told.tuning.importance_)
    assert fresh.tuning.history_ == told.tuning.history_
    assert all(torch.equal(value, fresh.tuning.start_[name]) for name, value in told.tuning.start_.items())
    for one, two in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.allclose(one, two, atol=1e-6)


def test_a_run_after_an_interrupted_one_finds_all_layers(tmp_path) -> None:
    run = trainer(tmp_path, told := callback(), max_steps=2, save_strategy="no")
    names = {k for k, p in run.model.named_parameters() if p.requires_grad}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "training_step", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        run.train()
    assert {k for k, p in run.model.named_parameters() if p.requires_grad} < names
    layers = told.tuning.layer_names_
    run.train()
    assert told.tuning.layer_names_ == layers
    assert {k for k, p in run.model.named_parameters() if p.requires_grad} == names


def test_checkpoints_without_or_with_damaged_importance(tmp_path) -> None:
    trainer(tmp_path / "a", callback()).train()
    with pytest.raises(DataError, match=r"checkpoint-4: no readable importance of layers"):
        trainer(tmp_path / "b", callback()).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    (tmp_path / "a" / "checkpoint-4" / "ist.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="no readable importance"):
        trainer(tmp_path / "a", callback()).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


def test_scoring_batches_pass_over_the_shuffled_data_set(tmp_path) -> None:
    run = trainer(tmp_path, told := callback(), max_steps=1, save_strategy="no")
    run.train()
    first = [told.scoring_batch(step)["input_ids"] for step in range(2, 12, 2)]  # 5 batches of 6 of 32 rows
    assert all(len(batch) == 6 for batch in first)
    rows = {tuple(row.tolist()) for batch in first for row in batch}
    assert len(rows) == 30
    assert not torch.equal(told.scoring_batch(12)["input_ids"], first[0])
    assert torch.equal(told.scoring_batch(4)["input_ids"], first[1])


def test_a_scoring_set_smaller_than_a_batch_is_used_whole(tmp_path) -> None:
    few = [Rows()[i] for i in range(3)]
    run = trainer(tmp_path, told := callback(dataset=few), max_steps=3, save_strategy="no")
    run.train()
    assert len(told.scoring_batch(2)["input_ids"]) == 3 and len(told.tuning.history_) == 1


def test_the_callback_refuses_what_it_cannot_use(tmp_path) -> None:
    with pytest.raises(InputError, match="batch_size: got 0"):
        ISTCallback(batch_size=0)
    with pytest.raises(InputError, match="dataset: list has no rows"):
        trainer(tmp_path, callback(dataset=[]), save_strategy="no").train()
    with pytest.raises(InputError, match="training has not begun"):
        callback().scoring_batch(2)


def test_gradient_checkpoints_that_enter_again_get_inputs_with_gradient(tmp_path) -> None:
    """Else a layer whose input needs no gradient would silently learn nothing."""
    for kwargs in ({"use_reentrant": True}, {"use_reentrant": False}):
        run = trainer(
            tmp_path, told := callback(), max_steps=6, save_strategy="no", gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
        )  # fmt: skip
        before = {k: p.detach().clone() for k, p in run.model.named_parameters() if "lora_B" in k}
        run.train()
        for number, count in enumerate(told.tuning.counts_.tolist()):
            moved = [not torch.equal(run.model.get_parameter(k), p) for k, p in before.items() if f".h.{number}." in k]
            assert all(moved) == bool(count)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = adapted()
    optimizer = optimizer_of(model)
    tuning = ImportanceSparseTuning(model, n_update=0.4, n_suppress=0.4, interval=2, generator=generator())
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    drawn = []
    for step in range(8):
        drawn.append(tuning.before_step(step, text(10 + rank)))  # other rows, and so other losses
        optimizer.zero_grad(set_to_none=True)
        wrapped(**text(20 + rank)).loss.backward()
        optimizer.step()
    torch.save({"drawn": drawn, "scores": tuning.importance_, "hash": state_hash(model)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_a_distributed_run_draw_the_same_layers(tmp_path) -> None:
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["drawn"] == two["drawn"] and len({tuple(active) for active in one["drawn"]}) > 1
    assert torch.equal(one["scores"], two["scores"]) and bool(one["scores"].any())
    assert one["hash"] == two["hash"]
