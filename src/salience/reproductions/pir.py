"""Claim: dropping the supporting steps that the model's confidence in the answer does not need shortens traces at about
the accuracy of full traces, well above dropping as many at random.

Substitute for Qwen2.5-32B on LIMO and S1: running sums of digits modulo 5 with a known role for every step, read and
written by a transformer of 0.35 million parameters. With probability 0.25 a step states a wrong sum and a correction
follows; otherwise, with probability 0.6, a check or a sum in the other order repeats the right one. The correction of
the last sum is needed for the answer; earlier ones are carried on by the next step, which states the right sum again.
At ratio 0.5 every pattern loses half of its steps rounded down, so that chains must be long for random removal to
lose much: 24 sums where scores are judged. For the retraining, 8, and learners start from the evaluator's weights: from
nothing they stay near chance within the budget.

Headline of the paper: S1-32B on AIME 37.9 to 42.1 with 29 % fewer tokens after training on refined traces.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

from salience.data import PIR, Step, comparator, efficiency, prune_steps
from salience.data.pir.steps import FUNCTIONAL, PATTERNS
from salience.evidence import Bar, Control, Outcome, Run
from salience.model.at import training_mode
from salience.reproductions.worlds import nets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = 5  # the brief setting has 10; a table of 100 sums takes the small models too long
RATIO, TEMPLATE = 0.5, "{question};{reasoning}={answer}"
CHARACTERS = string.digits + string.ascii_lowercase + "WAE;=."
DRAWS = 8  # of random removal


class Setting(NamedTuple):
    """Sums of long and short chains; batches of each that the evaluator sees; chains judged, and how many of them with
    scores of all steps; for the retraining, chains, passes over them, problems and samples of each."""

    long: int
    short: int
    batches: int
    judged: int
    spirit: int
    chains: int
    epochs: int
    problems: int
    samples: int


SETTINGS = {
    "smoke": Setting(6, 4, 4, 12, 6, 40, 1, 4, 2),
    "desk": Setting(24, 8, 500, 250, 40, 1000, 6, 150, 8),
    "full": Setting(24, 8, 3000, 2000, 2000, 15000, 12, 1000, 8),
}


@dataclass
class Problem:
    """A question, its chain of steps and its answer; `last` is whether the last sum was corrected."""

    question: str
    steps: list[Step]
    answer: str
    last: bool


class World:
    """Draws problems; turns text into tokens, one for each character."""

    def __init__(self) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {character: number for number, character in enumerate(CHARACTERS)}
        inner = Tokenizer(models.WordLevel(words, unk_token="."))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=".", pad_token=".")

    def draw(self, sums: int, rng: np.random.Generator, last: bool | None = None) -> Problem:
        """One problem with so many sums; `last` settles whether the last one is stated wrongly and corrected."""
        digits = rng.integers(BASE, size=sums + 1).tolist()
        letters = string.ascii_lowercase[: sums + 1]
        total, steps = digits[0], []
        wrong = False
        for number, (letter, digit) in enumerate(zip(letters[1:], digits[1:])):
            before, total = total, (total + digit) % BASE
            wrong = bool(rng.random() < 0.25)
            if last is not None and number == sums - 1:
                wrong = last
            stated = (total + int(rng.integers(1, BASE))) % BASE if wrong else total
            steps.append(Step(f"{letter}{digit}{before}{stated}", "progressive"))
            if wrong:
                steps.append(Step(f"E{total}", "error_correction"))
            elif rng.random() < 0.6:
                check = rng.random() < 0.5
                text = f"W{total}" if check else f"A{digit}{before}{total}"
                steps.append(Step(text, "verification" if check else "multi_method"))
        question = "".join(f"{letter}{digit}" for letter, digit in zip(letters, digits))
        return Problem(question, steps, str(total), wrong)

    def text(self, problem: Problem, gone: Sequence[int] = ()) -> str:
        """Question, steps that stay, answer, and the end."""
        kept = "".join(step.text for number, step in enumerate(problem.steps) if number not in set(gone))
        return TEMPLATE.format(question=problem.question, reasoning=kept, answer=problem.answer) + "."

    def ids(self, texts: Sequence[str]) -> torch.Tensor:
        """Rows of tokens, filled up with the end."""
        return self.tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]


def network(seed: int) -> Any:
    """A Llama with 2 layers of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with nets.seeded(seed):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(CHARACTERS), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=8, initializer_range=0.12, max_position_embeddings=512, bos_token_id=None,
            eos_token_id=None,
        ))  # fmt: skip


def train(model: Any, batches: Sequence[torch.Tensor], rate: float) -> None:
    """AdamW with warm-up and linear decay; the answer, one token of many, counts five times; one end of each text."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    end, equals = CHARACTERS.index("."), CHARACTERS.index("=")
    with training_mode(model, True):
        for number, ids in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((number + 1) / 30, 1.05 - number / len(batches))
            given, targets = ids[:, :-1], ids[:, 1:]
            weights = (given != end).float() + 4.0 * (given == equals)
            losses = cross_entropy(model(input_ids=given).logits.transpose(1, 2), targets, reduction="none")
            optimizer.zero_grad(set_to_none=True)
            ((losses * weights).sum() / weights.sum()).backward()
            optimizer.step()


def evaluator(run: Run, world: World, setting: Setting) -> Any:
    """The scoring model: short chains, towards the end some long ones, half without some of their redundant steps."""
    rng, model = run.rng("evaluator"), network(run.seed)
    batches = []
    for number in range(setting.batches):
        late = number >= 0.85 * setting.batches
        sums, rows = (setting.long, 20) if late and number % 2 else (setting.short, 64)
        texts = []
        for row in range(rows):
            problem = world.draw(sums, rng)
            redundant = [at for at, step in enumerate(problem.steps) if step.pattern in FUNCTIONAL[:2]]
            texts.append(world.text(problem, [at for at in redundant if row % 2 and rng.random() < 0.5]))
        batches.append(world.ids(texts))
    train(model, batches, 5e-3)
    return model


def greedy(model: Any, world: World, problems: Sequence[Problem], gone: Sequence[Sequence[int]]) -> np.ndarray:
    """Whether the likeliest answer after each shortened chain is right."""
    texts = [world.text(problem, out) for problem, out in zip(problems, gone, strict=True)]
    right = np.zeros(len(texts), dtype=bool)
    with training_mode(model, False), torch.no_grad():
        for start in range(0, len(texts), 125):
            part = texts[start : start + 125]
            ids = world.ids(part)
            asked = torch.tensor([len(text) - 3 for text in part])  # the equals sign
            answers = model(input_ids=ids).logits[torch.arange(len(part)), asked].argmax(-1)
            right[start : start + 125] = (answers == ids[torch.arange(len(part)), asked + 1]).numpy()
    return right


def own_perplexity(model: Any, world: World, problem: Problem) -> list[float]:
    """The fake: how surprising each step's own tokens are, in nats per token."""
    ids = world.ids([world.text(problem)])
    with training_mode(model, False), torch.no_grad():
        losses = cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="none").numpy()
    values, at = [], len(problem.question)  # of the prediction of the first step's first token
    for step in problem.steps:
        values.append(float(losses[at : at + len(step.text)].mean()))
        at += len(step.text)
    return values


def with_scores(problem: Problem, scores: Iterable[float]) -> list[Step]:
    """The steps with other scores in the place of PIR."""
    return [replace(step, pir=float(value)) for step, value in zip(problem.steps, scores, strict=True)]


def reproduce(run: Run) -> Outcome:
    """Score chains whose roles are known, prune them, and train again on pruned ones."""
    setting, world = SETTINGS[run.scale], World()
    # Model
    run.step("training the evaluator")
    model = evaluator(run, world, setting)
    pir = PIR(model, world.tokenizer, ratio=RATIO, template=TEMPLATE, batch_size=16)

    # Method: half of the judged chains end in a correction, and count for a quarter.
    run.step("scoring chains")
    rng = run.rng("judged")
    problems = [world.draw(setting.long, rng, last=bool(number % 2)) for number in range(setting.judged)]
    for number, problem in enumerate(problems):
        patterns = PATTERNS if number < setting.spirit else FUNCTIONAL
        pir.score(problem.question, problem.steps, problem.answer, patterns)
    judged = Judged(model, world, problems, run)

    # Retraining
    run.step("scoring chains to train on")
    rng = run.rng("chains")
    chains = [world.draw(setting.short, rng) for _ in range(setting.chains)]
    for problem in chains:
        pir.score(problem.question, problem.steps, problem.answer)
    arms = retrained(run, world, setting, model, chains)

    # Measure
    figures = {**judged.figures(), **{f"retrained {what}, {name}": value for name, arm in arms.items()
                                      for what, value in arm.items()}}  # fmt: skip
    figures |= compared(arms, "PIR")
    return Outcome(
        claim="dropping the supporting steps that the model's confidence in the answer does not need shortens traces "
        "at about the accuracy of full traces, well above dropping as many at random",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("AUC of needed corrections over redundant steps", at_least=0.8),
            Bar("distance of the mean PIR of redundant steps from 0", at_most=0.2),
            Bar("accuracy over full chains", at_least=-0.02),
            Bar("accuracy over random functional removal", at_least=0.10),
            Bar("retrained: share of tokens saved", at_least=0.10),
            Bar("retrained: accuracy over full chains", at_least=-0.01),
            Bar("retrained: efficiency over full chains", at_least=1.0),
        ],
        controls=[
            Control("random scores", "random", {**judged.control("random"), **compared(arms, "random")}),
            Control("perplexity of the step itself", "fake", judged.control("fake")),
        ],
        pictures={"PIR by the role of the step, and accuracy after pruning": picture(judged)},
        notes=[
            "A correction is needed where it is the last one before the answer; the AUC of earlier ones, which the "
            "next step carries on, and of all is told beside it.",
            "Half of the judged chains end in a correction; all figures on accuracy weigh them back to one in four.",
            "Efficiency is a quotient: PIR's accuracy per generated token over that of full chains.",
        ],
    )  # fmt: skip


class Judged:
    """Scores, removals and accuracies of the chains with known roles."""

    def __init__(self, model: Any, world: World, problems: list[Problem], run: Run) -> None:
        self.model, self.world, self.problems = model, world, problems
        rng = run.rng("control")
        self.others = {
            "random": [with_scores(p, rng.normal(size=len(p.steps))) for p in problems],
            "fake": [with_scores(p, own_perplexity(model, world, p)) for p in problems],
        }
        chains = {"PIR": [problem.steps for problem in problems], **self.others}
        self.gone = {name: [prune_steps(steps, RATIO) for steps in many] for name, many in chains.items()}
        rng = run.rng("rule")
        counts = [len(gone) for gone in self.gone["PIR"]]
        rule = [[comparator(p.steps, n, "rule", rng) for p, n in zip(problems, counts)] for _ in range(DRAWS)]
        whole = [p for p in problems if all(step.pir is not None for step in p.steps)]
        spirit = [comparator(p.steps, n, "spirit") for p, n in zip(whole, counts)]
        self.right = {name: greedy(model, world, problems, gone) for name, gone in self.gone.items()}
        self.right["full"] = greedy(model, world, problems, [[] for _ in problems])
        self.right["spirit"] = greedy(model, world, whole, spirit)  # the first ones alone
        self.right["rule"] = np.mean([greedy(model, world, problems, gone) for gone in rule], axis=0)

    def accuracy(self, name: str) -> float:
        """Over chains of which one in four ends in a correction."""
        right = np.asarray(self.right[name], dtype=np.float64)
        last = np.array([problem.last for problem in self.problems[: len(right)]])
        return float(0.25 * right[last].mean() + 0.75 * right[~last].mean())

    def roles(self, steps: Sequence[Sequence[Step]]) -> dict[str, Float[np.ndarray, " n"]]:
        """Scores by role."""
        found: dict[str, list[float]] = {"last correction": [], "earlier correction": [], "verification": [],
                                         "multi_method": [], "progressive": []}  # fmt: skip
        for problem, chain in zip(self.problems, steps, strict=True):
            for number, step in enumerate(chain):
                role = step.pattern
                if role == "error_correction":
                    role = "last correction" if problem.last and number == len(chain) - 1 else "earlier correction"
                if step.pir is not None:
                    found[role].append(step.pir)
        return {role: np.array(values) for role, values in found.items()}

    def judged(self, name: str, steps: Sequence[Sequence[Step]]) -> dict[str, float]:
        """The figures that bars are on, with other scores."""
        roles = self.roles(steps)
        redundant = np.concatenate([roles["verification"], roles["multi_method"]])
        return {
            "AUC of needed corrections over redundant steps": auc(roles["last correction"], redundant),
            "accuracy over full chains": self.accuracy(name) - self.accuracy("full"),
            "accuracy over random functional removal": self.accuracy(name) - self.accuracy("rule"),
        }

    def control(self, name: str) -> dict[str, float]:
        """A control's figures."""
        return self.judged(name, self.others[name])

    def figures(self) -> dict[str, float]:
        """PIR's figures, and what is told beside them."""
        roles = self.roles([problem.steps for problem in self.problems])
        redundant = np.concatenate([roles["verification"], roles["multi_method"]])
        corrections = np.concatenate([roles["last correction"], roles["earlier correction"]])
        steps, gone = sum(len(p.steps) for p in self.problems), sum(map(len, self.gone["PIR"]))
        return {
            **self.judged("PIR", [problem.steps for problem in self.problems]),
            "distance of the mean PIR of redundant steps from 0": abs(float(redundant.mean())),
            **{f"mean PIR, {role}": float(values.mean()) for role, values in roles.items()},
            "AUC of earlier corrections": auc(roles["earlier correction"], redundant),
            "AUC of all corrections": auc(corrections, redundant),
            **{f"accuracy, {name}": self.accuracy(name) for name in self.right},
            "share of steps removed": gone / steps,
        }


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative."""
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(labels, np.concatenate([positive, negative])))


def retrained(
    run: Run, world: World, setting: Setting, model: Any, chains: Sequence[Problem]
) -> dict[str, dict[str, float]]:
    """Accuracy, generated tokens and efficiency of copies of the evaluator, tuned on full and shortened chains."""
    rng = run.rng("retraining control")
    gone = {
        "full": [[] for _ in chains],
        "PIR": [prune_steps(problem.steps, RATIO) for problem in chains],
        "random": [prune_steps(with_scores(p, rng.normal(size=len(p.steps))), RATIO) for p in chains],
    }
    draw = run.rng("problems")
    problems = [world.draw(setting.short, draw) for _ in range(setting.problems)]
    arms = {}
    for name, removed in gone.items():
        run.step(f"retraining on {name} chains")
        texts = [world.text(problem, out) for problem, out in zip(chains, removed, strict=True)]  # type: ignore[call-overload]
        order, batches = run.rng("batches"), []
        for _ in range(setting.epochs):
            rows = order.permutation(len(texts))
            batches += [world.ids([texts[at] for at in rows[start : start + 32]]) for start in range(0, len(rows), 32)]
        learner = copy.deepcopy(model)
        train(learner, batches, 1e-3)
        arms[name] = answered(run, world, learner, problems, setting)
    return arms


def answered(run: Run, world: World, model: Any, problems: Sequence[Problem], setting: Setting) -> dict[str, float]:
    """Accuracy and tokens of sampled responses: temperature 0.7, eight a problem, one budget for all."""
    prompts = world.ids([problem.question + ";" for problem in problems]).repeat_interleave(setting.samples, 0)
    end = CHARACTERS.index(".")
    with nets.seeded(run.seed), training_mode(model, False), torch.no_grad():
        written = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=0.7, top_k=0,
            max_new_tokens=10 * setting.short, eos_token_id=end, pad_token_id=end,
        )[:, prompts.shape[1] :]  # fmt: skip
    texts = ["".join(CHARACTERS[token] for token in row).split(".")[0] for row in written.tolist()]
    answers = [problem.answer for problem in problems for _ in range(setting.samples)]
    accuracy = float(np.mean([text.endswith(f"={answer}") for text, answer in zip(texts, answers, strict=True)]))
    tokens = float(np.mean([len(text) + 1 for text in texts]))
    return {"accuracy": accuracy, "tokens": tokens, "efficiency": efficiency(accuracy, tokens)}


def compared(arms: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """What training on shortened chains saves and costs."""
    ours, full = arms[name], arms["full"]
    return {
        "retrained: share of tokens saved": 1 - ours["tokens"] / full["tokens"],
        "retrained: accuracy over full chains": ours["accuracy"] - full["accuracy"],
        "retrained: efficiency over full chains": ours["efficiency"] / max(full["efficiency"], 1e-9),
    }


def picture(judged: Judged) -> Figure:
    """Scores by role as boxes, and accuracies as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    roles = judged.roles([problem.steps for problem in judged.problems])
    above.boxplot(list(roles.values()), orientation="horizontal", widths=0.6, flierprops={"markersize": 2})
    above.set_yticks(range(1, len(roles) + 1), list(roles))
    above.axvline(0, color="0.6", linewidth=0.8)
    above.set_xlabel("PIR, nats per token of the answer")
    names = ["full", "PIR", "spirit", "rule", "random", "fake"]
    labels = ["full chain", "PIR", "lowest PIR of all steps", "random functional steps", "random scores",
              "perplexity of the step"]  # fmt: skip
    values = [judged.accuracy(name) for name in names]
    below.barh(labels, values, color=["C0" if name == "PIR" else "0.7" for name in names])
    below.invert_yaxis()
    below.set_xlim(0, 1.05)
    for row, value in enumerate(values):
        below.annotate(f"{value:.3f}", (value, row), xytext=(4, 0), textcoords="offset points", va="center")
    below.set_xlabel("accuracy of the greedy answer")
    return figure
