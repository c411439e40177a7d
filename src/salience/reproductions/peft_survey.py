"""Claim: every family lowers its own starting loss with a small share of the parameters, and reparameterised adapters
close most of the gap to full tuning.

The survey has no experiment of its own; its families are measured here. Language: a byte-level Llama trained on the
sources of the standard library, tuned to the descriptions of scikit-learn's data sets. Vision: a vision transformer
trained on scikit-learn's digits, tuned to digits turned by 90 degrees. Each method has a learning rate of its own,
fixed before any judging run; batches and steps are the same for all.
"""

from __future__ import annotations

import copy
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.evidence import Bar, Control, NoControl, Outcome, Run
from salience.model.fitting import fit
from salience.report import figures as draw
from salience.reproductions.worlds import digits, zoo
from salience.reproductions.worlds.nets import seeded, tiny_vit
from salience.weights import load_adapter, merge_adapter, save_adapter
from salience.weights.peft_survey.attaching import attach, trainable
from salience.weights.peft_survey.bench import Trial, mean_loss, tune
from salience.weights.peft_survey.cards import REGISTRY
from salience.weights.peft_survey.hybrid import gate_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY, WINDOW, BATCH = 128, 64, 8
WIDTH, INNER, LAYERS = 128, 256, 3
LINEAR = (4 * [(WIDTH, WIDTH)] + 2 * [(WIDTH, INNER)] + [(INNER, WIDTH)]) * LAYERS  # (in, out) of all linear layers
# Method: its learning rate and its options. What trains few parameters gets a larger rate than LoRA.
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "ln_tuning": (1e-2, {}),
    "fish": (3e-3, {"keep": 0.05}),
    "ia3": (3e-2, {}),
    "llama_adapter": (3e-2, {}),
    "houlsby": (5e-3, {"r": 16}),
    "prompt_tuning": (3e-2, {}),
    "prefix_tuning": (3e-2, {}),
    "lora": (5e-3, {"r": 4}),
    "dora": (5e-3, {"r": 4}),
    "loha": (5e-3, {"r": 4}),
    "oft": (5e-3, {"oft_block_size": 8}),
    "vera": (1e-2, {"r": 32}),
    "unipelt": (5e-3, {"r": 8, "m": 10}),
    "mam": (5e-3, {"r": 16, "m": 10}),
}
VISION: dict[str, tuple[float, dict[str, Any]]] = {
    "bitfit": (1e-2, {}), "lora": (5e-3, {"r": 4}), "vpt_deep": (1e-2, {}),
}  # fmt: skip
FULL_RATE = 1e-3
CLOSING = ("lora", "dora", "loha")
SMOKE = ("ln_tuning", "ia3", "prompt_tuning", "lora", "dora", "loha", "oft", "vera", "unipelt", "bitfit", "vpt_deep")
MERGING = ("lora", "dora", "loha", "ia3", "vera", "oft")


class Language(NamedTuple):
    """The base and windows of the new domain, each its own target."""

    base: nn.Module
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def build(seed: int) -> nn.Module:
    """The Llama before any training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        return LlamaForCausalLM(config)


def pretrain(model: nn.Module, seed: int) -> None:
    """400 steps on the sources of the standard library."""
    windows = _windows(_sources(), 4800, 64, np.random.default_rng(seed))
    fit(
        model, windows, windows, loss=next_byte, optimizer=torch.optim.AdamW(model.parameters(), 2e-3), epochs=1,
        batch_size=12, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def next_byte(output: Any, tokens: Tensor) -> Tensor:
    """Cross-entropy of each byte after the first; logits of a prompt in front are left out."""
    logits = output.logits[:, -tokens.shape[1] : -1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build_vit(seed: int) -> nn.Module:
    """A vision transformer for 8 x 8 digits."""
    return tiny_vit(seed, image_size=8, patch_size=2)


def pretrain_vit(model: nn.Module, seed: int) -> None:
    """10 epochs on upright digits."""
    split = digits.split(seed)
    fit(
        model, torch.from_numpy(split.train_x), torch.from_numpy(split.train_y), loss=class_loss,
        optimizer=torch.optim.AdamW(model.parameters(), 2e-3), epochs=10, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def class_loss(output: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of class labels."""
    return cross_entropy(output.logits, targets)


def reproduce(run: Run) -> Outcome:
    """Tune the same base by every method, and check what each one promises."""
    # Data and models.
    run.step("the base")
    world = language(run)
    before = mean_loss(world.base, world.held_out, next_byte)
    full = tuned(world, "full", FULL_RATE, run.seed)

    # Method: every family on the same batches; the vision transformer beside it.
    trials: dict[str, Trial] = {}
    for name, (lr, options) in METHODS.items():
        if run.smoke and name not in SMOKE:
            continue
        run.step(name)
        more = fisher_options(world) if name == "fish" else {}
        trials[name] = tuned(world, name, lr, run.seed, **options, **more)
    vision = see(run)

    # Measure.
    run.step("measuring")
    closed = {name: (before - trial.end) / (before - full.end) for name, trial in trials.items()}
    drops = {name: trial.start - trial.end for name, trial in trials.items()}
    drops |= {f"vision {name}": trial.start - trial.end for name, trial in vision.items() if name in VISION}
    zero = {name: abs(trials[name].start - before) for name in trials if REGISTRY[name].zero_start}
    counts = {name: trainable(trial.model) for name, trial in trials.items()}
    wrong = sum(counts[name] != formula(name) for name in trials if formula(name) is not None)
    gates = {name: value for name, value in gates_of(world, trials["unipelt"]).items()}
    round_trips = {name: round_trip(run, world, name, trial.model) for name, trial in trials.items()}
    merges = {name: merge_error(world, trials[name].model) for name in MERGING}
    figures = {
        "held-out loss before": before,
        "held-out loss, full tuning": full.end,
        **{f"held-out loss {name}": trial.end for name, trial in trials.items()},
        **{f"own start {name}": trial.start for name, trial in trials.items()},
        **{f"gap closed {name}": value for name, value in closed.items()},
        **{f"trained {name}": float(count) for name, count in counts.items()},
        **{f"vision loss {name}": trial.end for name, trial in vision.items()},
        "vision loss before": vision["full"].start,
        "smallest drop from own start": min(drops.values()),
        "largest shift of a zero-effect start": max(zero.values()),
        "methods whose count differs from its formula": float(wrong),
        "largest merge error": max(merges.values()),
        "largest change by saving and loading": max(round_trips.values()),
        "spread of UniPELT's gates over samples": min(float(value.std(0).mean()) for value in gates.values()),
    }
    return Outcome(
        claim="every family lowers its own starting loss with a small share of the parameters, and reparameterised "
        "adapters close most of the gap to full tuning",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("smallest drop from own start", at_least=0.001),
            *(Bar(f"gap closed {name}", at_least=0.7) for name in CLOSING),
            Bar("largest shift of a zero-effect start", at_most=1e-4),
            Bar("methods whose count differs from its formula", at_most=0),
            Bar("largest merge error", at_most=1e-4),
            Bar("largest change by saving and loading", at_most=0),
            Bar("spread of UniPELT's gates over samples", at_least=0.001),
        ],
        controls=controls(run, world, before, full.end, trials),
        pictures={"Share of the gap between base and full tuning that each method closes": picture(closed, counts)},
        notes=[
            "The survey has no figures of its own. Its families are compared on stand-ins: a byte-level Llama of "
            "525,184 parameters and a small vision transformer.",
            "Learning rates were fixed before, one for each method, not searched; steps and batches are the same.",
        ],
    )  # fmt: skip


def controls(
    run: Run, world: Language, before: float, best: float, trials: dict[str, Trial]
) -> list[Control | NoControl]:
    """What must miss: random corrections, LoRA that starts at random, and the usual mistakes in merging and saving."""
    lora = copy.deepcopy(trials["lora"].model)
    generator = run.generator("control")
    with torch.no_grad():
        for name, value in lora.named_parameters():
            if ".lora_B." in name:  # as large as what was learned
                value.copy_(torch.randn(value.shape, generator=generator) * value.std())
    chance = mean_loss(lora, world.held_out, next_byte)
    few = tuned(world, "lora", METHODS["lora"][0], run.seed, r=1, target=["q_proj"])
    unscaled = merge_error(world, trials["lora"].model, scaled=False)
    return [
        Control("LoRA with random corrections", "random", {
            "smallest drop from own start": before - chance,
            **{f"gap closed {name}": (before - chance) / (before - best) for name in CLOSING},
        }),
        Control("LoRA that starts with a random B", "random", {
            "largest shift of a zero-effect start": abs(chance - before),
        }),
        Control("rank 1 on queries alone, called LoRA", "fake", {
            "gap closed lora": (before - few.end) / (before - best),
        }),
        Control("merging without alpha / r", "fake", {"largest merge error": unscaled}),
        Control("only B is stored, and A drawn anew", "fake", {
            "largest change by saving and loading": half_stored(world, trials["lora"].model),
        }),
        NoControl("Gates that are not the sample's own have a spread of 0 by identity, and a method of another size "
                  "misses its formula by construction: for these two figures no control is possible that could pass."),
    ]  # fmt: skip


def language(run: Run) -> Language:
    """The trained base; descriptions in windows, the first 80 % to train on."""
    recipe = zoo.Recipe(_small if run.smoke else build, _hardly if run.smoke else pretrain)
    text = _bytes("\n".join(_descriptions()))
    cut = int(0.8 * len(text))
    steps = 2 if run.smoke else 80
    train = _windows(text[:cut], steps * BATCH, WINDOW, run.rng("windows"))
    held = text[cut:][: len(text[cut:]) // WINDOW * WINDOW].reshape(-1, WINDOW)
    held_out = torch.from_numpy(held[:8] if run.smoke else held)
    return Language(zoo.trained(recipe, run.seed), (train, train), (held_out, held_out))


def _small(seed: int) -> nn.Module:
    return build(seed)


def _hardly(model: nn.Module, seed: int) -> None:
    windows = _windows(_sources(), 120, 64, np.random.default_rng(seed))
    fit(
        model, windows, windows, loss=next_byte, optimizer=torch.optim.AdamW(model.parameters(), 4e-3), epochs=1,
        batch_size=12, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def tuned(world: Language, name: str, lr: float, seed: int, **options: Any) -> Trial:
    """The base tuned by one method."""
    return tune(
        lambda: copy.deepcopy(world.base), name, world.train, world.held_out, loss=next_byte, lr=lr, batch_size=BATCH,
        seed=seed, **options,
    )  # fmt: skip


def fisher_options(world: Language) -> dict[str, Any]:
    """128 windows of the training part, and the log-likelihood of one."""
    windows = world.train[0][:128]
    return {"batches": [(windows, windows)], "log_likelihood": lambda output, tokens: -next_byte(output, tokens)}


def see(run: Run) -> dict[str, Trial]:
    """The vision transformer: full tuning, its head alone, and methods of vision, on turned digits."""
    split = digits.split(run.seed)
    turned = [torch.from_numpy(x).rot90(1, (2, 3)).contiguous() for x in (split.train_x, split.test_x)]
    train = (turned[0], torch.from_numpy(split.train_y))
    test = (turned[1], torch.from_numpy(split.test_y))
    if run.smoke:
        train, test = (train[0][:64], train[1][:64]), (test[0][:32], test[1][:32])
    base = build_vit(run.seed) if run.smoke else zoo.trained(zoo.Recipe(build_vit, pretrain_vit), run.seed)
    found = {}
    for name, (lr, options) in {"full": (FULL_RATE, {}), "head": (1e-2, {}), **VISION}.items():
        if run.smoke and name not in (*SMOKE, "full"):
            continue
        run.step(f"vision: {name}")
        found[name] = tune(
            lambda: copy.deepcopy(base), name, train, test, loss=class_loss, lr=lr, epochs=1 if run.smoke else 3,
            batch_size=32, seed=run.seed, head=["classifier"], **options,
        )  # fmt: skip
    return found


def formula(name: str) -> int | None:
    """How many parameters a method trains, by its own arithmetic."""
    adapter = lambda r: 2 * WIDTH * r + r + WIDTH  # noqa: E731
    low_rank = sum(4 * (i + o) for i, o in LINEAR)
    outs = sum(o for _, o in LINEAR)
    lora_and_gates = 2 * 8 * 2 * WIDTH + 3 * (WIDTH + 1)
    return {
        "ln_tuning": (2 * LAYERS + 1) * WIDTH,
        "lora": low_rank, "dora": low_rank + outs, "loha": 2 * low_rank,
        "oft": sum(i // 8 * 28 for i, _ in LINEAR),  # 8 (8 - 1) / 2 entries of a skew-symmetric block
        "vera": 32 * len(LINEAR) + outs,
        "ia3": LAYERS * (2 * WIDTH + INNER),
        "llama_adapter": (LAYERS - 1) * (10 * WIDTH + 1),
        "houlsby": LAYERS * 2 * adapter(16),
        "prompt_tuning": 10 * WIDTH, "prefix_tuning": 2 * LAYERS * 10 * WIDTH,
        "unipelt": LAYERS * (lora_and_gates + 2 * 10 * WIDTH + adapter(8)),
        "mam": LAYERS * (2 * 10 * WIDTH + adapter(16)),
    }.get(name)  # fmt: skip


@torch.no_grad()
def merge_error(world: Language, model: Any, scaled: bool = True) -> float:
    """Largest change of a logit by merging; without alpha / r it is the mistake of a control."""
    tokens = world.held_out[0][:4]
    model = copy.deepcopy(model).eval()
    before = model(tokens).logits
    if not scaled:
        for module in model.modules():
            if hasattr(module, "lora_A") and isinstance(getattr(module, "scaling", None), dict):
                module.scaling = dict.fromkeys(module.scaling, 1.0)
    return float((merge_adapter(model)(tokens).logits - before).abs().max())


@torch.no_grad()
def round_trip(run: Run, world: Language, name: str, model: Any) -> float:
    """Largest change of a logit by saving the adapter and putting it on a fresh base."""
    tokens, folder = world.held_out[0][:4], run.scratch / name
    save_adapter(model, folder)
    back = load_adapter(copy.deepcopy(world.base), folder)
    return float((back(tokens).logits - model(tokens).logits).abs().max())


@torch.no_grad()
def half_stored(world: Language, model: Any) -> float:
    """What changes if A is not stored."""
    tokens = world.held_out[0][:4]
    fresh = attach(copy.deepcopy(world.base), "lora", r=4, generator=torch.Generator().manual_seed(1)).eval()
    fresh.load_state_dict({n: v for n, v in model.state_dict().items() if ".lora_B." in n}, strict=False)
    return float((fresh(tokens).logits - model(tokens).logits).abs().max())


@torch.no_grad()
def gates_of(world: Language, trial: Trial) -> dict[str, Tensor]:
    """The mean gate of each sample: (sample, 1) by gate."""
    trial.model(world.held_out[0][:16])
    return {name: value.mean(1, keepdim=True) for name, value in gate_values(trial.model).items()}


@cache
def _sources() -> np.ndarray:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"), key=lambda path: path.name)
    return _bytes("\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files))


def _descriptions() -> list[str]:
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst"))]


def _bytes(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("ascii", errors="ignore"), dtype=np.uint8)
    return codes.astype(np.int64)


def _windows(text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> Tensor:
    starts = rng.integers(len(text) - length, size=count)
    return torch.from_numpy(text[starts[:, None] + np.arange(length)])


def picture(closed: dict[str, float], counts: dict[str, int]) -> Figure:
    """Bars by method, the count of trained parameters beside its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.6), layout="constrained")
    names = sorted(closed, key=lambda name: -closed[name])
    draw.bars(
        figure.subplots(), [f"{name} ({counts[name]:,})" for name in names], [100 * closed[name] for name in names],
        highlight=[f"{name} ({counts[name]:,})" for name in CLOSING], xlabel="gap closed in %",
    )  # fmt: skip
    return figure
