"""The registry of parameter-efficient tuning: every family trains, saves, merges, and does what its equation says."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from salience.errors import DataError, InputError, NothingToDo
from salience.weights import (
    REGISTRY,
    BenchRow,
    BenchTable,
    BottleneckAdapter,
    FreezeSelector,
    GradientMask,
    VisualPrompt,
    attach,
    extra_loss,
    gate_values,
    load_adapter,
    merge_adapter,
    peft_bench,
    peft_methods,
    prepare_optimizer,
    recommend_peft,
    save_adapter,
)
from tiny import build, example, state_hash

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

from salience.weights.peft_survey.attaching import trainable  # noqa: E402
from salience.weights.peft_survey.blocks import find_blocks  # noqa: E402
from salience.weights.peft_survey.prefix import Prefix, attend, use_prefixes  # noqa: E402
from salience.weights.peft_survey.selective import SparseDiff, fisher_information  # noqa: E402

LANGUAGE = [card.name for card in peft_methods(modality="language") if card.name != "bitfit"]
VISION = ["bitfit", "ln_tuning", "lora", "houlsby", "adaptformer", "vpt_shallow", "vpt_deep", "unipelt", "mam", "fish"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options(name: str, family: str = "llama") -> dict:
    """What a method cannot do without."""
    if name in ("fish", "child_tuning_d"):
        likelihood = {"log_likelihood": lambda output, t: -cross_entropy(output.logits[:, -1], t)}
        return {"batches": [(example(family), torch.tensor([0, 1, 2]))], **(likelihood if family == "llama" else {})}
    return {"trainable_tokens": {"token_indices": [1, 2, 3]}, "adalora": {"total_step": 20}}.get(name, {})


def loss_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    logits = model(**inputs).logits
    if logits.ndim == 2:
        return cross_entropy(logits, torch.arange(len(logits)) % 3)
    return cross_entropy(logits[:, -8:-1].flatten(0, 1), inputs["input_ids"][:, -7:].flatten())


def train(model: nn.Module, inputs: dict, steps: int = 4, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    prepare_optimizer(model, optimizer)
    losses = []
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        (loss + extra_loss(model)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# the registry


def test_every_family_has_members_that_run_and_cards_are_complete():
    for category in ("selective", "additive", "prompt", "reparameterisation", "hybrid"):
        assert len(peft_methods(category)) >= 2, category
        assert len(peft_methods(category, listed=True)) > len(peft_methods(category))
    for card in REGISTRY.values():
        assert card.mergeable or card.why_not or not card.runs, card.name
        if card.via.startswith("peft:"):
            assert card.via[5:] in peft.PeftType.__members__
    assert {"bitfit", "vpt_deep", "lora"} <= {card.name for card in peft_methods(modality="vision")}
    assert not [card for card in peft_methods(modality="language") if card.name.startswith("vpt")]


def test_a_type_that_an_older_peft_lacks_is_left_out_with_a_reason(monkeypatch):
    from salience.weights.peft_survey import cards

    kinds = [kind for kind in peft.PeftType if kind.value != "SHIRA"]
    monkeypatch.setattr(peft, "PeftType", kinds)
    assert "shira" in cards.skipped() and len(cards.skipped()) == 1
    assert "shira" not in {card.name for card in peft_methods()}
    assert "shira" in {card.name for card in peft_methods(listed=True)}
    with pytest.raises(InputError, match="has no SHIRA"):
        attach(build("llama"), "shira")


# every method, end to end


def _params(names: list[str], quick: tuple[str, ...]) -> list:
    """One or two of every family on every run, the others with the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", _params(LANGUAGE, ("fish", "diff_pruning", "ia3", "houlsby", "prompt_tuning", "lora", "mam"))
)
def test_a_language_method_does_all_that_its_card_says(name, tmp_path):
    round_trip(name, "llama", tmp_path)


@pytest.mark.parametrize("name", _params(VISION, ("bitfit", "vpt_deep", "unipelt")))
def test_a_vision_method_does_all_that_its_card_says(name, tmp_path):
    round_trip(name, "vit", tmp_path)


def round_trip(name, family, tmp_path):
    """Start, training, frozen base, deep copy, file, merge."""
    card, base, inputs = REGISTRY[name], build(family), example(family)
    reference = logits(base, inputs)
    names = {key: value.clone() for key, value in base.state_dict().items()}
    model = attach(copy.deepcopy(base), name, generator=generator(), **options(name, family)).eval()
    start = logits(model, inputs)[..., -reference.shape[-2] :, :] if reference.ndim == 3 else logits(model, inputs)
    shift = float((start - reference).abs().max())
    assert shift < 1e-4 if card.zero_start else shift > 1e-4
    before = float(loss_of(model, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, inputs, steps=6, lr=2e-3)
    after = float(loss_of(model, inputs))
    assert after < before
    inner = model.model if hasattr(model, "card") else model
    trained = {n for n, p in inner.named_parameters() if p.requires_grad}
    for key, value in inner.named_parameters():  # what is frozen has not moved by a bit
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original", "")
        plain = plain.replace("parametrizations.weight", "weight")
        if key not in trained and plain in names and value.shape == names[plain].shape and name != "trainable_tokens":
            assert torch.equal(value, names[plain]), key

    tuned = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), tuned)
    size = save_adapter(model, tmp_path / "adapter")
    count = trainable(model)
    assert size < 12 * count + 16_000  # nothing of the base is in it
    back = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    tolerance = 1e-5 if name == "adalora" else 0.0  # peft stores its ranks packed
    assert float((logits(back, inputs) - tuned).abs().max()) <= tolerance
    with pytest.raises(InputError, match="exists"):
        save_adapter(model, tmp_path / "adapter")

    if card.mergeable:
        merged = merge_adapter(model)
        assert {k for k, _ in merged.named_parameters()} == {k for k, _ in base.named_parameters()}
        torch.testing.assert_close(logits(merged, inputs), tuned, atol=2e-5, rtol=1e-4)
    else:
        with pytest.raises(InputError, match=card.why_not):
            merge_adapter(model)


@pytest.mark.parametrize("name", _params(["lora", "ia3", "houlsby", "unipelt", "vera"], ("ia3", "houlsby")))
def test_the_same_generator_gives_the_same_start_and_the_global_one_is_left_alone(name):
    state = torch.get_rng_state()
    one, two, three = (attach(build("llama"), name, generator=generator(seed)) for seed in (1, 1, 2))
    torch.manual_seed(0)
    assert state_hash(one) == state_hash(two)
    if name not in ("ia3", "vera"):  # begins with ones; draws from a key of its own
        assert state_hash(one) != state_hash(three)
    torch.set_rng_state(state)


@pytest.mark.slow
def test_members_of_peft_are_pefts_own():
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers),
        "loha": peft.LoHaConfig(r=4, alpha=8, target_modules=layers),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"),
        "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        curves, names = [], []
        for ours in (True, False):
            base = build("llama")
            torch.manual_seed(3)
            size = {"r": 4} if name in ("lora", "loha") else {}
            model = attach(base, name, **size) if ours else peft.get_peft_model(base, config)
            names.append([n for n, p in model.named_parameters() if p.requires_grad])
            curves.append(train(model, example("llama")))
        assert names[0] == names[1] and curves[0] == curves[1], name


# counts and budgets


def test_counts_are_the_formulas():
    d, inner, layers = 32, 48, 3
    linear = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)] * layers
    adapter = lambda r: 2 * d * r + r + d  # noqa: E731
    low_rank = sum(4 * (i + o) for i, o in linear)
    expected = {
        ("lora", ("r", 4)): low_rank, ("dora", ("r", 4)): low_rank + sum(o for _, o in linear),
        ("lora_fa", ("r", 4)): sum(4 * o for _, o in linear), ("shira", ("r", 4)): low_rank,
        ("loha", ("r", 4)): 2 * low_rank, ("houlsby", ("r", 5)): 2 * layers * adapter(5),
        ("pfeiffer", ("r", 5)): layers * adapter(5), ("adapterdrop", ("skip", 2)): adapter(16),
        ("mam", ("m", 7)): layers * (adapter(16) + 2 * 2 * 7 * 8),
        ("unipelt", ("m", 7)): layers * (adapter(8) + 2 * 2 * 7 * 8 + 8 * (32 + 32) + 8 * (32 + 16) + 3 * 33),
        ("prompt_tuning", ("num_virtual_tokens", 6)): 6 * d, ("fish", ("keep", 0.01)): round(0.01 * (43520 + 7 * d)),
    }  # fmt: skip
    for (name, (option, value)), count in expected.items():
        assert trainable(attach(build("llama"), name, **{option: value}, **options(name))) == count, name
    assert trainable(attach(build("vit"), "vpt_deep", m=4)) == 3 * 4 * d
    assert trainable(attach(build("vit"), "vpt_shallow", m=4)) == 4 * d
    assert inner == 48


@pytest.mark.parametrize("name", ["lora", "houlsby", "oft", "last_layers", "prompt_tuning", "fish", "shira", "mam"])
def test_a_budget_is_used_but_not_exceeded(name):
    budget = {"last_layers": 20_000}.get(name, 5000)
    model = attach(build("llama"), name, budget=budget, **options(name))
    assert budget / 2.5 < trainable(model) <= budget


def test_a_budget_that_is_too_small_names_the_smallest():
    base = build("llama")
    before = state_hash(base)
    with pytest.raises(InputError, match=r"lora needs at least 1392 \(r=1\)"):
        attach(base, "lora", budget=1000)
    with pytest.raises(InputError, match="ln_tuning has one size only and needs 224"):
        attach(base, "ln_tuning", budget=0.001)
    assert state_hash(base) == before


# adapters


def test_an_adapter_by_hand():
    adapter = BottleneckAdapter(2, 1, "relu", scale=0.5)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, -2.0]]))
        adapter.down.bias.fill_(1.0)
        adapter.up.weight.copy_(torch.tensor([[3.0], [4.0]]))
    h, x = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    torch.testing.assert_close(adapter(h), torch.tensor([[2.5, 2.5], [0.0, 2.0]]))  # relu(1), relu(-3)
    torch.testing.assert_close(adapter(h, x), torch.tensor([[2.5, 2.5], [3.0, 6.0]]))  # relu(1), relu(2)
    for bad in ({"d": 0}, {"r": 0}, {"act": "sin"}, {"position": "above"}):
        with pytest.raises(InputError, match=next(iter(bad))):
            BottleneckAdapter(**{"d": 4, **bad})


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "t5"])
def test_a_parallel_adapter_reads_what_the_feed_forward_layer_reads(family):
    model = attach(build(family), "parallel_adapter", r=3, scale=2.0).eval()
    block = find_blocks(model.model)[-1]
    first, last = (model.model.get_submodule(block.feed_forward[place]) for place in (0, -1))
    nn.init.normal_(last.salience_adapter.up.weight, generator=generator())
    seen = {}
    first.register_forward_pre_hook(lambda layer, args: seen.update(x=args[0].detach()))
    last.register_forward_pre_hook(lambda layer, args: seen.update(inner=args[0].detach()))
    last.register_forward_hook(lambda layer, args, output: seen.update(out=output.detach()))
    logits(model, example(family))
    hook, last._forward_hooks = last._forward_hooks, {}
    plain = last(seen["inner"])
    last._forward_hooks = hook
    adapter = last.salience_adapter
    torch.testing.assert_close(seen["out"], plain + 2.0 * adapter.up(torch.nn.functional.gelu(adapter.down(seen["x"]))))


def test_blocks_of_the_families_and_of_bert():
    for family in ("llama", "gpt2", "qwen2", "vit"):
        blocks = find_blocks(build(family))
        assert len(blocks) == 3 and all(len(block.feed_forward) in (2, 3) for block in blocks), family
    assert len(find_blocks(build("t5"))) == 4
    block = find_blocks(bert())[0]
    assert block.feed_forward[-1].endswith("layer.0.output.dense") and block.core.endswith("attention.self")


# prefix and gates


def test_prefix_attention_by_hand_and_without_a_prefix():
    layer, draw = nn.Identity(), generator()
    layer.is_causal = True
    q, k, v = (torch.randn(2, heads, 5, 4, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    wide = [tensor.repeat_interleave(2, 1) for tensor in (k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attend(layer, q, k, v, None)[0], plain)

    layer.salience_prefix = Prefix(3, 2, 4).double()
    p_k, p_v = (
        tensor.repeat_interleave(2, 0)[None] for tensor in (layer.salience_prefix.key, layer.salience_prefix.value)
    )
    expected = torch.empty_like(plain)
    for t in range(5):  # [P_k; K] and [P_v; V] up to token t
        keys, values = (torch.cat([p.expand(2, -1, -1, -1), x[:, :, : t + 1]], 2) for p, x in zip((p_k, p_v), wide))
        weights = (q[:, :, t : t + 1] @ keys.transpose(2, 3) / 2).softmax(-1)
        expected[:, t] = (weights @ values)[:, :, 0]
    torch.testing.assert_close(attend(layer, q, k, v, None)[0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "vit", "t5", "bert"])
def test_attention_without_a_prefix_is_the_models_own(family):
    model, inputs = (bert(), example("llama")) if family == "bert" else (build(family), example(family))
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, :3] = 0
    before = logits(model, inputs)
    use_prefixes(model)
    seen = [...] if family in ("vit", "bert") else [(0, slice(3, None)), (slice(1, None),)]
    for part in seen if family != "t5" else [...]:  # what padding computes is nobody's business
        torch.testing.assert_close(logits(model, inputs)[part], before[part], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mam", "unipelt"])
def test_a_causal_model_stays_causal_and_its_cache_exact(name):
    model, inputs = attach(build("llama"), name, generator=generator()), example("llama")
    train(model, inputs)
    tokens = inputs["input_ids"]
    whole = logits(model, {"input_ids": tokens})
    changed = tokens.clone()
    changed[:, 6:] = 7
    torch.testing.assert_close(logits(model, {"input_ids": changed})[:, :6], whole[:, :6])
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(input_ids=tokens[:, t : t + 1], past_key_values=cache).logits for t in range(tokens.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def test_gates_differ_between_samples_and_padding_does_not_count():
    model = attach(bert(), "unipelt", head=["classifier"], generator=generator())
    inputs = example("llama")
    train(model, inputs)
    logits(model, inputs)
    gates = gate_values(model)
    assert len(gates) == 2 * 3 and all(value.shape == (3, 1) for value in gates.values())
    assert all(
        float(value.std(0)) > 1e-5 and 0 < float(value.min()) < float(value.max()) < 1 for value in gates.values()
    )
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 4)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 4)),
    }
    plain = logits(model, inputs)
    torch.testing.assert_close(logits(model, padded), plain, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="no gates"):
        gate_values(bert())


# visual prompts


def test_visual_prompts_stand_behind_cls_and_are_renewed():
    x = torch.arange(12.0).view(1, 4, 3)  # [cls] and three patches
    deep = VisualPrompt(2, 3, 2)
    one = deep(x, 0)
    assert one.shape == (1, 6, 3) and torch.equal(one[:, :1], x[:, :1]) and torch.equal(one[:, 3:], x[:, 1:])
    assert torch.equal(one[0, 1:3], deep.tokens[0])
    two = deep(one * 2, 1)
    assert two.shape == (1, 6, 3) and torch.equal(two[0, 1:3], deep.tokens[1]) and torch.equal(two[:, 3:], 2 * x[:, 1:])
    assert torch.equal(deep.without(two), 2 * x)
    shallow = VisualPrompt(2, 3, 1, deep=False)
    assert torch.equal(shallow(one, 1), one)
    bound = (6 / (768 + 3)) ** 0.5
    assert float(deep.tokens.abs().max()) <= bound
    with pytest.raises(InputError, match="at least 1"):
        VisualPrompt(0, 3)


def test_every_block_of_a_vision_transformer_sees_the_prompt():
    model = attach(build("vit"), "vpt_deep", m=4)
    lengths = []
    for block in find_blocks(model.model):
        model.model.get_submodule(block.attention[0]).register_forward_pre_hook(
            lambda layer, args: lengths.append(args[0].shape[1])
        )
    hidden = model.vit(**example("vit")).last_hidden_state
    assert lengths == [4 + 1 + 4] * 3 and hidden.shape[1] == 5
    for family in ("llama", "resnet"):
        with pytest.raises(InputError, match=type(build(family)).__name__):
            attach(build(family), "vpt_deep")


# selective


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_fisher_information_is_that_of_single_samples():
    model, x = two_layers(), torch.randn(7, 4, dtype=torch.float64, generator=generator())
    y = torch.arange(7) % 3
    found = fisher_information(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter)
        for row in range(7):
            (grad,) = torch.autograd.grad(model(x[row]).log_softmax(-1)[y[row]], parameter)
            expected += grad.square() / 7
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=1e-9)
    few = fisher_information(model, [(x, y)], samples=2)
    first = fisher_information(model, [(x[:2], y[:2])])
    torch.testing.assert_close(few["0.weight"], first["0.weight"])
    mask = GradientMask.fisher(model, [(x, y)], keep=0.25)
    flat = torch.cat([value.flatten() for value in found.values()])
    threshold = flat.sort(descending=True).values[mask.count - 1]
    assert mask.count == round(0.25 * len(flat))
    assert all(torch.equal(mask.masks[n], found[n] >= threshold) for n in mask.masks)
    with pytest.raises(NothingToDo, match="no sample"):
        fisher_information(model, [])
    with pytest.raises(DataError, match="not finite"):
        fisher_information(model, [(x * float("nan"), y)])


def test_masked_entries_stay_whatever_the_optimiser_does():
    base = two_layers()
    x, y = torch.randn(8, 4, dtype=torch.float64, generator=generator()), torch.arange(8) % 3
    model = attach(copy.deepcopy(base), "fish", batches=[(x, y)], keep=0.2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    prepare_optimizer(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, value in base.named_parameters():
        moved = model.model.get_parameter(name) != value
        mask = model.mask.masks.get(name, torch.zeros_like(moved))
        assert not (moved & ~mask).any() and moved[mask].all()


def test_child_tuning_f_keeps_the_mean_of_gradients():
    parameter = nn.Parameter(torch.zeros(20_000))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    GradientMask.child(0.25, generator()).apply(optimizer, nn.Module())
    sums = torch.zeros(20_000)
    for step in range(2):
        parameter.grad = torch.ones(20_000)
        before = parameter.detach().clone()
        optimizer.step()
        moved = before - parameter.detach()
        assert set(moved.unique().tolist()) == {0.0, 4.0} and abs(float(moved.mean()) - 1) < 0.06, step
        sums += moved
    assert abs(float((sums == 8).double().mean()) - 1 / 16) < 0.01  # another mask at each step
    with pytest.raises(InputError, match="p: got 0"):
        GradientMask.child(0, generator())


def test_sparse_diffs_by_hand():
    diff = SparseDiff(torch.zeros(3)).eval()
    with torch.no_grad():
        diff.log_alpha.copy_(torch.tensor([-10.0, 0.0, 10.0]))
        diff.delta.copy_(torch.tensor([5.0, 2.0, 3.0]))
    torch.testing.assert_close(diff.gates(), torch.tensor([0.0, 0.5, 1.0]))  # sigmoid(0) * 1.2 - 0.1
    torch.testing.assert_close(diff(torch.ones(3)), torch.tensor([1.0, 2.0, 4.0]))
    assert diff.kept().tolist() == [False, True, True]
    diff.train()
    torch.manual_seed(0)
    alive = torch.stack([diff.gates() != 0 for _ in range(3000)]).double().mean(0).sum()
    assert abs(float(alive) - float(diff.expected_count())) < 0.05  # the L0 norm is what the draws give


def test_freeze_selector_and_what_a_model_lacks():
    assert set(FreezeSelector("bitfit").names(build("vit"))) == {
        n for n, _ in build("vit").named_parameters() if n.endswith("bias")
    }
    assert len(FreezeSelector("layernorm").names(build("llama"))) == 7
    assert all(n.startswith("model.layers.2.") for n in FreezeSelector("last:1").names(build("llama")))
    assert len(FreezeSelector("*.q_proj.weight").names(build("llama"))) == 3
    for wrong, message in (("bitfit", "no biases"), ("last:9", "from 1 to 3"), ("*.qq.weight", "no parameter")):
        with pytest.raises(InputError, match=message):
            FreezeSelector(wrong).names(build("llama"))
    with pytest.raises(InputError, match="no normalisation"):
        attach(two_layers(), "ln_tuning")


# what is refused


@pytest.mark.parametrize(
    ("family", "name", "given", "message"),
    [
        ("llama", "lorra", {}, "nearest names: 'lora'"),
        ("llama", "controlnet", {}, "diffusers has it: ControlNetModel"),
        ("llama", "compacter", {}, "others of its family: unipelt, mam"),
        ("llama", "bitfit", {}, "no biases"),
        ("llama", "lora", {"rank": 4}, "rank: lora has no such option"),
        ("llama", "houlsby", {"rank": 4}, "rank: houlsby has no such option"),
        ("llama", "lora", {"target": ["q_prj"]}, "nearest names: 'q_proj'"),
        ("llama", "houlsby", {"target": ["q_proj"]}, "finds its own places"),
        ("llama", "lora", {"head": ["lm_haed"]}, "nearest names: 'lm_head'"),
        ("llama", "fish", {}, "batches"),
        ("llama", "trainable_tokens", {}, "token_indices"),
        ("llama", "adalora", {}, "total_step"),
        ("llama", "adapterdrop", {"skip": 3}, "the model has 3 blocks"),
        ("llama", "prompt_tuning", {"num_virtual_tokens": 128}, "leave no place in the 128 positions"),
        ("vit", "prompt_tuning", {}, "needs a language model"),
        ("vit", "prefix_tuning", {}, "needs a language model"),
        ("vit", "llama_adapter", {}, "peft cannot put llama_adapter on ViT"),
        ("resnet", "houlsby", {}, "no transformer blocks found in ResNet"),
        ("resnet", "unipelt", {}, "ResNet"),
        ("gpt2", "loha", {}, r"\(in, out\)"),
        ("t5", "unipelt", {}, "is an encoder-decoder, which unipelt does not take"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_changes(family, name, given, message):
    model = build(family)
    before = state_hash(model)
    with pytest.raises(InputError, match=message):
        attach(model, name, **given)
    assert state_hash(model) == before


def test_a_second_method_a_quantised_base_and_classifiers_with_prompts():
    with pytest.raises(InputError, match="has a method on it already"):
        attach(attach(build("llama"), "lora"), "ia3")
    quantised = build("llama")
    quantised.is_quantized = True
    with pytest.raises(InputError, match="is quantised; houlsby changes"):
        attach(quantised, "houlsby")
    assert trainable(attach(quantised, "lora"))
    with pytest.raises(InputError, match="give head for all"):
        attach(bert(), "prompt_tuning")
    with pytest.raises(InputError, match="keeps no past keys"):
        attach(bert(), "prefix_tuning", head=["classifier"])


def test_prompts_mind_positions_and_padding():
    model, inputs = attach(build("gpt2"), "prompt_tuning", num_virtual_tokens=10), example("gpt2")
    with pytest.raises(InputError, match="120 tokens and 10 of the prompt exceed the model's 128 positions"):
        model(input_ids=torch.ones(1, 120, dtype=torch.long))
    left = inputs["attention_mask"].clone()
    left[0, :2] = 0
    model.train()
    with pytest.raises(InputError, match="padded on the left"):
        model(input_ids=inputs["input_ids"], attention_mask=left)
    model(input_ids=inputs["input_ids"], attention_mask=left.flip(1))
    model.eval()
    model(input_ids=inputs["input_ids"], attention_mask=left)  # generation pads on the left


@pytest.mark.slow
def test_the_head_trains_for_all_or_for_none(tmp_path):
    for name in ("lora", "houlsby", "bitfit", "fish", "vpt_deep", "ln_tuning"):
        with_head = attach(build("vit"), name, head=["classifier"], generator=generator(), **options(name, "vit"))
        train(with_head, example("vit"))
        save_adapter(with_head, tmp_path / name)
        back = load_adapter(build("vit"), tmp_path / name)
        assert torch.equal(logits(back, example("vit")), logits(with_head, example("vit"))), name
        trained = [n for n, p in with_head.named_parameters() if p.requires_grad and "classifier" in n]
        assert len(trained) == 2, name
        without = attach(build("vit"), name, **options(name, "vit"))
        names = [n for n, p in without.named_parameters() if p.requires_grad and n.endswith("classifier.weight")]
        assert not names or name == "fish", name


def test_a_member_of_peft_that_fails_midway_leaves_the_model_as_it_was():
    model, inputs = build("llama"), example("llama")
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    before, reference = state_hash(model), logits(model, inputs)
    with pytest.raises(InputError, match="boft"):  # 32 divides the 32 inputs of q_proj, but not the 48 of down_proj
        attach(model, "boft", boft_block_size=32)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert state_hash(model) == before and all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config") and torch.equal(logits(model, inputs), reference)
    handle.remove()
    seen = len(calls)
    logits(model, inputs)
    assert len(calls) == seen == 2
    assert trainable(attach(model, "lora"))


@pytest.mark.parametrize("name", ["bitfit", "fish", pytest.param("ln_tuning", marks=pytest.mark.slow)])
def test_running_statistics_stay_those_of_the_base(name, tmp_path):
    base, images = build("resnet"), example("resnet")
    means = {n: b.clone() for n, b in base.named_buffers()}
    given = {"batches": [(images, torch.tensor([0, 1, 2]))], "keep": 0.05} if name == "fish" else {}
    model = attach(copy.deepcopy(base), name, **given)
    train(model, images)
    inner = model.model if hasattr(model, "card") else model
    moved = [n for n, b in inner.named_buffers() if not any(torch.equal(b, other) for other in means.values())]
    assert not moved and not torch.equal(logits(model, images), logits(base, images))
    save_adapter(model, tmp_path / "a")
    back = load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(logits(back, images), logits(model, images))
    merged = merge_adapter(model)
    merged.train()(**images)
    assert any(not torch.equal(b, means[n]) for n, b in merged.named_buffers())  # and it is a plain network again


@pytest.mark.parametrize("name", ["lora_fa", "dora", "rslora", "prompt_tuning"])
def test_a_loaded_member_of_peft_is_still_the_same_method(name, tmp_path):
    from salience.weights.peft_survey.stored import method_of

    model = attach(build("llama"), name)
    save_adapter(model, tmp_path / "a")
    back = load_adapter(build("llama"), tmp_path / "a")
    assert method_of(back).name == name
    if name != "prompt_tuning":
        flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, back)]
        assert flags[0] == flags[1]
    else:
        with pytest.raises(InputError, match="exceed the model's 128 positions"):
            back(input_ids=torch.ones(1, 120, dtype=torch.long))
    (tmp_path / "a" / "salience_method.json").write_text('{"salience_method": "ia3"}')
    with pytest.raises(DataError, match="'ia3' is no method of peft's"):
        load_adapter(build("llama"), tmp_path / "a")
    (tmp_path / "a" / "salience_method.json").unlink()
    assert method_of(load_adapter(build("llama"), tmp_path / "a")).via == REGISTRY[name].via  # a file of peft's own


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("megatron_config", {"transformer_config": "x"}), ("tokenizer_kwargs", {"trust_remote_code": True}),
        ("auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}), ("corda_config", {"cache_file": "x"}),
        ("prompt_tuning_init_state_dict_path", "x.bin"),
    ],
)  # fmt: skip
def test_configurations_that_could_load_more_than_weights_are_refused(key, value, tmp_path):
    save_adapter(attach(build("llama"), "lora"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model = build("llama")
    before = state_hash(model)
    with pytest.raises(DataError, match=key):
        load_adapter(model, tmp_path / "a")
    assert state_hash(model) == before


def test_the_mask_counts_however_it_is_given():
    model, inputs = attach(bert(), "unipelt", generator=generator()).eval(), example("llama")
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    mask[:, 4:] = 0
    found = []
    for args, kwargs in (((ids, mask), {}), ((ids,), {"attention_mask": mask}), ((ids,), {})):
        with torch.no_grad():
            model(*args, **kwargs)
        found.append(next(iter(gate_values(model).values())))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="holds no adapter_config"):
        load_adapter(build("llama"), tmp_path)
    save_adapter(attach(build("vit"), "houlsby"), tmp_path / "a")
    with pytest.raises(DataError, match="differ in"):
        load_adapter(build("llama"), tmp_path / "a")
    save_adapter(attach(build("vit"), "fish", **options("fish", "vit")), tmp_path / "b")
    with pytest.raises(DataError, match="this base has no"):
        load_adapter(build("llama"), tmp_path / "b")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({"salience_method": "houlsbi", "options": {}, "head": []}))
    with pytest.raises(InputError, match="nearest names: 'houlsby'"):
        load_adapter(build("vit"), tmp_path / "a")
    config.write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        load_adapter(build("vit"), tmp_path / "a")
    with pytest.raises(InputError, match="carries no method"):
        merge_adapter(build("vit"))


# the bench


def row(name: str, count: int, valid: float, spread: float = 0.0, mergeable: bool = True) -> BenchRow:
    """The test metric says the opposite: it may be told, not chosen by."""
    valids = (valid - spread, valid + spread)
    return BenchRow(
        name, "x", 1e-3, count, 0.1, 0, 0, mergeable, 0.0, 0, 0.0, 0.0, 4 * count, 0.0, valid, -valid, (-valid,), valids
    )


def test_advice_follows_measured_rows():
    rows = (row("base", 0, 2.0), row("lora", 1000, 1.0, 0.04), row("ia3", 100, 1.05), row("houlsby", 500, 0.9, 0.0, False),
            row("ln_tuning", 50, 1.9), row("full", 9000, 0.8))  # fmt: skip
    table = BenchTable(rows)
    assert recommend_peft(table).method == "houlsby"
    assert recommend_peft(table, mergeable=True).method == "ia3"  # within LoRA's spread, with fewer parameters
    wide = BenchTable((row("base", 0, 2.0), row("lora", 1000, 1.0, 0.04), row("ia3", 100, 1.5, 0.6)))
    assert recommend_peft(wide).method == "lora"  # a method is not near for being unsteady itself
    assert recommend_peft(table, budget=60).method == "ln_tuning"
    assert recommend_peft(table, file_bytes=400).method == "ia3"
    assert [r.method for r in table.pareto()] == ["base", "ln_tuning", "ia3", "houlsby", "full"]
    with pytest.raises(NothingToDo, match="relax one"):
        recommend_peft(table, budget=10)
    with pytest.raises(NothingToDo, match="beats the base"):
        recommend_peft(BenchTable((row("base", 0, 0.5), row("lora", 10, 0.6))))
    with pytest.raises(InputError, match="modality"):
        recommend_peft(table, modality="smell")
    assert recommend_peft(BenchTable(rows[1:], higher_is_better=True), mergeable=True).method == "ln_tuning"


@pytest.mark.slow
def test_the_bench_measures_every_column():
    from torch.nn.functional import cross_entropy

    draw = generator()
    images, labels = torch.randn(24, 3, 16, 16, generator=draw), torch.arange(24) % 3
    part = (images, labels)
    table = peft_bench(
        lambda: build("vit"), part, part, part, {"full": {}, "lora": {"r": 2}, "pfeiffer": {"r": 4}, "bitfit": {}},
        loss=lambda output, y: cross_entropy(output.logits, y), lrs=[1e-3, 1e6], epochs=2, seeds=(0, 1),
    )  # fmt: skip
    rows = {row.method: row for row in table.rows}
    assert set(rows) == {"base", "full", "lora", "pfeiffer", "bitfit"}
    total = sum(p.numel() for p in build("vit").parameters())
    assert rows["full"].trainable == total and rows["full"].lr == 1e-3  # the mad rate is never the best
    assert rows["lora"].added_parameters == rows["lora"].added_flops == 0 and rows["lora"].merge_error < 1e-5
    # an adapter of 4 units: 2 d r multiplications in 5 tokens and 3 blocks, twice for additions
    assert rows["pfeiffer"].added_parameters == 3 * (2 * 32 * 4 + 4 + 32)
    assert rows["pfeiffer"].added_flops == 3 * 5 * 2 * (2 * 32 * 4)
    assert not rows["pfeiffer"].mergeable and rows["base"].metric > rows["full"].metric
    assert rows["full"].training_bytes > rows["pfeiffer"].training_bytes > 4 * total
    assert 4 * rows["bitfit"].trainable <= rows["bitfit"].file_bytes < 4 * rows["bitfit"].trainable + 8000
    assert rows["lora"].start == rows["base"].start == rows["bitfit"].start
    assert len(rows["lora"].metrics) == 2 and rows["lora"].step_seconds > 0 and rows["lora"].latency_seconds > 0
    assert [r.valid for r in table.rows] == sorted(r.valid for r in table.rows)
    assert table.to_markdown().count("\n") == 6 and "| lora | reparameterisation |" in table.to_markdown()
    for wrong, message in (({"lrs": [-1.0]}, "positive"), ({"seeds": ()}, "empty"), ({"lrs": [1e30]}, "diverged")):
        with pytest.raises(InputError, match=message):
            peft_bench(
                lambda: build("vit"), part, part, part, ["full"], loss=lambda o, y: cross_entropy(o.logits, y), **wrong
            )


# diffusion


@pytest.mark.slow
def test_methods_on_a_diffusion_network(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip
    inputs = (torch.randn(2, 2, 8, 8, generator=generator()), torch.tensor([3, 7]), torch.randn(2, 5, 8))
    assert len(find_blocks(net)) == 4
    before = net(*inputs).sample.detach()
    for name in ("lora", "loha", "lokr", "oft", "houlsby", "parallel_adapter", "bitfit", "ln_tuning", "diff_pruning"):
        size = {"oft_block_size": 4} if name == "oft" else {}
        model = attach(copy.deepcopy(net), name, generator=generator(), **size)
        torch.testing.assert_close(model(*inputs).sample, before, atol=1e-5, rtol=1e-4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            loss = (model(*inputs).sample - 1).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0], name
        model.eval()
        save_adapter(model, tmp_path / name)
        back = load_adapter(copy.deepcopy(net), tmp_path / name)
        torch.testing.assert_close(back(*inputs).sample, model(*inputs).sample)
    with pytest.raises(InputError, match="attention of UNet2DConditionModel"):
        attach(net, "mam")
