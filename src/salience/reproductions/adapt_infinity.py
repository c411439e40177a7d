"""Claim: choosing skill by skill forgets less than sequential training and keeps rare skills better than random replay
of equal size.

Substitute for LLaVA-1.5 and its six data sets: five skills on scikit-learn's handwritten digits arrive one after
another, 1,200, 1,200, 600, 150 and 60 samples, 70 % of them copies with pixel noise of 0.01. A sample is an 8 x 8 image
of random brightness, a question of two words and an answer of one: which digit, even or not, above 5 or not, how
bright, and a question that the words alone answer. A network of 12,000 weights trains on 200 samples a round, from
where the round before left it. Vectors are gradients of its second layer, projected to 512 numbers (the paper: the
adapters of one late layer, 8,192), in 20 clusters (the authors' code: 10; 60 samples of 3,210 get no cluster of their
own then). Rare skills are the two smallest.

Headline of the paper, not reproduced: relative gain 109.7 % with 100,000 samples a step and 99.7 % with 25,000
(LLaVA-1.5-7B; LLaVA-665K, M3IT, MiniGPT4, MANTIS, LAMM, VisionFLAN).
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from salience.data import (
    AdaptSelector,
    RandomProjection,
    Signals,
    StreamStep,
    ccs_sample,
    forgetting,
    gradient_features,
    in_layers,
    measure_samples,
    relative_gain,
    sample_scores,
)
from salience.data.adapt_infinity.choosing import earlier_similarity
from salience.data.kmq.clustering import cluster_rows
from salience.data.kmq.quotas import cluster_quotas
from salience.evidence import Bar, Control, Outcome, Run
from salience.measure import paired_difference
from salience.model import fit
from salience.reproductions.worlds import digits
from salience.reproductions.worlds.nets import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKILLS = {"digit": 1200, "parity": 1200, "above 5": 600, "brightness": 150, "words alone": 60}
RARE = (3, 4)
UNIQUE, NOISE, DARKEST = 0.3, 0.01, 0.4  # share that is no copy, deviation of a copy's pixels, least brightness
PHRASES, ANSWERS, YES, BRIGHT = 4, 16, 10, 12  # second words; digits 0-9, even / odd (yes / no), four bins
BUDGET, CLUSTERS, LIMIT, STREAMS, DIM = 200, 20, 1000, 5, 512
EPOCHS, RATE, TESTED = 30, 3e-3, 300
PIXELS = 64
PROJECTION = RandomProjection(DIM)
GROUNDING = ("image grounding of image skills", "image grounding of words alone")
PURITY, PRUNED = ("purity of clusters",), ("copies pruned before any original",)
STRATEGIES = ("sequential", "random replay", "EL2N, largest", "EL2N, coverage", "Adapt-infinity",
              "Adapt-infinity, pool of 1000", "random vectors and scores", "shares by size")  # fmt: skip


class Samples(NamedTuple):
    """Images with a question of two words behind their pixels, answers, the skill, and whether a copy came before."""

    x: Float[Tensor, "n 66"]
    answer: Int[Tensor, " n"]
    skill: Int[np.ndarray, " n"]
    copy: np.ndarray

    def take(self, rows: Any) -> Samples:
        rows = np.asarray(rows, dtype=np.int64)
        return Samples(self.x[rows], self.answer[rows], self.skill[rows], self.copy[rows])

    @property
    def data(self) -> TensorDataset:
        return TensorDataset(self.x, self.answer)


class Stream(NamedTuple):
    """Data sets in the order in which they arrive, a test set of all skills, and a larger set without copies."""

    train: Samples
    test: Samples
    ample: Samples
    sizes: list[int]


class Net(nn.Module):
    """Image features that the question gates, a second layer, and a head over all answers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(len(SKILLS) + PHRASES, 16)
        self.see, self.ask, self.gate = nn.Linear(PIXELS, width), nn.Linear(32, width), nn.Linear(32, width)
        self.layers = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Linear(width, width), nn.ReLU())])
        self.head = nn.Linear(width, ANSWERS)

    def forward(self, x: Float[Tensor, "b 66"]) -> Float[Tensor, "b answers"]:
        asked = self.words(x[:, PIXELS:].long()).flatten(1)
        seen = torch.relu(self.see(x[:, :PIXELS])) * torch.sigmoid(2 * self.gate(asked))
        return self.head(self.layers[1](seen + torch.relu(self.ask(asked))))


class Course(NamedTuple):
    """What became of one strategy: accuracy after every round, and what the selector saw in each."""

    accuracy: Float[np.ndarray, "rounds skills"]
    rounds: list[dict[str, Any]]


def reproduce(run: Run) -> Outcome:
    """Train through several streams by every strategy."""
    # Data, method: every strategy goes through the same streams from the same weights.
    found: list[dict[str, float]] = []
    tables: dict[str, list[np.ndarray]] = {name: [] for name in STRATEGIES}
    count = 1 if run.smoke else STREAMS if run.master else 2  # bars on means are judged at the master seed alone
    for number, seed in enumerate(run.replicate_seeds(count)):
        run.step(f"stream {number + 1}")
        stream = make_stream(seed, [size // 10 for size in SKILLS.values()] if run.smoke else list(SKILLS.values()))
        budget, epochs = (BUDGET // 10, 5) if run.smoke else (BUDGET, EPOCHS)
        courses = {name: _course(stream, name, seed, budget, epochs) for name in STRATEGIES}
        adapt, limited = courses["Adapt-infinity"], courses["Adapt-infinity, pool of 1000"]
        found.append(_purities(adapt, stream, seed) | _grounding(stream, seed, epochs))
        found[-1] |= _order(adapt, limited, stream, seed)
        reference = _alone(stream, seed, budget, epochs)
        for name, course in courses.items():
            tables[name].append(course.accuracy)
            found[-1][f"relative gain of {name}, %"] = relative_gain(course.accuracy[-1], reference)

    # Measure: means over the streams.
    figures = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    for name in STRATEGIES:
        figures[f"average accuracy, {name}"] = float(np.mean([table[-1] for table in tables[name]]))
        figures[f"forgetting, {name}"] = float(np.mean([forgetting(table) for table in tables[name]]))
        figures[f"rare skills, {name}"] = float(np.mean([table[-1, RARE] for table in tables[name]]))
    own = {name: _lifelong(tables, name, run.seed) for name in STRATEGIES}
    figures |= own["Adapt-infinity"]
    low = "rare skills over random replay, low end"

    def instead(names: tuple[str, ...], way: str) -> dict[str, float]:
        return {name: figures[f"{name}, {way}"] for name in names}

    return Outcome(
        claim="choosing skill by skill forgets less than sequential training and keeps rare skills better than random "
        "replay of equal size",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("image grounding of image skills", at_least=1.5),
            Bar("image grounding of words alone", at_least=0.95, at_most=1.05),
            Bar("purity of clusters", above="purity of clusters of hidden states"),
            Bar("forgetting over that of sequential", at_most=0.5, once=True),
            Bar("rare skills, Adapt-infinity", above="rare skills, random replay", once=True),
            Bar(low, at_least=0.0, once=True),
            Bar("copies pruned before any original", at_least=0.8),
        ],
        controls=[
            Control("grounding shuffled over samples", "random", instead(GROUNDING, "shuffled")),
            Control("question blanked with the image", "fake", instead(GROUNDING, "question blanked")),
            Control("clusters of random vectors", "random", instead(PURITY, "random vectors")),
            Control("a new projection for every batch", "fake", instead(PURITY, "a new projection for every batch")),
            Control("random vectors and scores", "random", own["random vectors and scores"]),
            Control("shares of the budget by size of cluster", "fake", own["shares by size"]),
            Control("pruned in random order", "random", instead(PRUNED, "random order")),
            Control("similarity to any other row, not to earlier ones", "fake", instead(PRUNED, "any other row")),
        ],
        pictures={"Accuracy after every round, mean over the streams": _picture(tables)},
        notes=[
            "Image grounding is measured by a network that has learnt all skills from 1,200 samples each: one that has "
            "seen 60 of a skill does not know yet that the words alone answer it.",
            "Purity is that of the clusters by which each round after the first chose: the network has not trained on "
            "the newest skill.",
        ],
    )  # fmt: skip


def make_stream(seed: int, sizes: list[int]) -> Stream:
    """Five data sets; a share of `UNIQUE` of each is original, the rest are noisy copies in random order."""
    rng = np.random.default_rng([seed, 1])
    split = digits.ink(seed % 2**31)
    lit = [x * rng.uniform(DARKEST, 1, (len(x), 1, 1)) for x in (split.train_x, split.test_x)]
    edges = np.quantile(lit[0].mean(axis=(1, 2)), [0.25, 0.5, 0.75])
    meanings = rng.permutation(10)[:PHRASES]

    def ask(part: int, skill: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = lit[part], (split.train_y, split.test_y)[part]
        rows, phrase = rng.choice(len(images), n, replace=n > len(images)), rng.integers(0, PHRASES, n)
        digit, bright = labels[rows], np.searchsorted(edges, images[rows].mean(axis=(1, 2)))
        answer = (digit, YES + digit % 2, YES + (digit > 5), BRIGHT + bright, meanings[phrase])[skill]
        question = np.stack([np.full(n, skill), len(SKILLS) + phrase], axis=1)
        return np.concatenate([images[rows].reshape(n, PIXELS), question], axis=1), answer

    def joined(parts: list[tuple[np.ndarray, np.ndarray]], copies: list[np.ndarray]) -> Samples:
        x, answer = (np.concatenate(column) for column in zip(*parts))
        skill = np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])
        return Samples(torch.from_numpy(x).float(), torch.from_numpy(answer).long(), skill, np.concatenate(copies))

    train, copies = [], []
    for skill, size in enumerate(sizes):
        unique = max(1, round(UNIQUE * size))
        x, answer = ask(0, skill, unique)
        of = rng.permutation(np.concatenate([np.arange(unique), rng.integers(0, unique, size - unique)]))
        first = np.zeros(size, dtype=bool)
        first[np.unique(of, return_index=True)[1]] = True
        noise = NOISE * rng.normal(size=(size, PIXELS)) * ~first[:, None]
        train.append((np.concatenate([x[of, :PIXELS] + noise, x[of, PIXELS:]], axis=1), answer[of]))
        copies.append(~first)
    none = [np.zeros(n, dtype=bool) for n in [TESTED] * len(sizes)]
    test = joined([ask(1, skill, TESTED) for skill in range(len(sizes))], none)
    ample = [ask(0, skill, max(sizes)) for skill in range(len(sizes))]
    return Stream(joined(train, copies), test, joined(ample, [np.zeros(len(part[1]), bool) for part in ample]), sizes)


def _course(stream: Stream, name: str, seed: int, budget: int, epochs: int) -> Course:
    """Go through the stream: choose by the model of the round before, train on, measure."""
    model, rng = _untrained(seed), np.random.default_rng([seed, 2])
    limit = LIMIT * budget // BUDGET if name.endswith(f"pool of {LIMIT}") else None
    selector = AdaptSelector(n_clusters=CLUSTERS, budget=budget, pool_limit=limit, random_state=seed % 2**31)
    table = np.full((len(stream.sizes), len(stream.sizes)), np.nan)
    rounds = []
    for number, end in enumerate(np.cumsum(stream.sizes)):
        new, pool = np.arange(end - stream.sizes[number], end), np.arange(end)
        if name == "sequential":
            chosen = rng.choice(new, min(budget, len(new)), replace=False)
        elif name == "random replay":
            chosen = rng.choice(pool, min(budget, len(pool)), replace=False)
        elif name.startswith("EL2N"):
            el2n = sample_scores(model, stream.train.take(pool).data, kinds=["el2n"], batch_size=1024)["el2n"].numpy()
            chosen = np.argsort(-el2n)[:budget] if "largest" in name else ccs_sample(el2n, budget, generator=rng)
        else:
            step, signals = _step(selector, new, model, stream, name, rng)
            chosen = step.chosen.astype(np.int64)
            if name == "shares by size":
                chosen = _by_size(step, signals, budget, rng)
            rounds.append({"step": step, "signals": signals, "model": deepcopy(model)})
        _train(model, stream.train.take(chosen), epochs, seed + number)
        table[number, : number + 1] = _accuracy(model, stream.test)[: number + 1]
    return Course(table, rounds)


def _step(
    selector: AdaptSelector, new: np.ndarray, model: Net, stream: Stream, name: str, rng: np.random.Generator
) -> tuple[StreamStep, Signals]:
    """One round of the selector, by what the current model says of the pool or by nothing."""
    measured: list[Signals] = []

    def measure(ids: np.ndarray) -> Signals:
        if name == "random vectors and scores":
            noise = rng.normal(size=(len(ids), 34))
            measured.append(Signals(noise[:, :32], {"one": noise[:, 32], "two": noise[:, 33]}))
        else:
            measured.append(measure_samples(
                model, stream.train.take(ids).data, blank=_no_image, layer="layers.1", params=in_layers(1),
                projection=PROJECTION, vectorize=True, batch_size=512,
            ))  # fmt: skip
        return measured[-1]

    return selector.step(new, measure), measured[-1]


def _by_size(step: StreamStep, signals: Signals, budget: int, rng: np.random.Generator) -> Int[np.ndarray, " b"]:
    """The same clusters, scores and draws, with shares of the budget in proportion to the clusters' sizes."""
    sizes = np.array([each.size for each in step.clusters])
    chosen = []
    for cluster, share in enumerate(cluster_quotas(budget, sizes.astype(float), sizes)):
        members, scorer = np.flatnonzero(step.labels == cluster), step.clusters[cluster].scorer
        values = np.zeros(len(members)) if scorer is None else signals.scores[scorer][members]
        chosen.append(members[ccs_sample(values, int(share), generator=rng)])
    return step.seen[np.concatenate(chosen)].astype(np.int64)


def _purities(course: Course, stream: Stream, seed: int) -> dict[str, float]:
    """Share of samples that are of their cluster's most frequent skill, mean over rounds with several skills."""
    rng = np.random.default_rng([seed, 3])
    found: dict[str, list[float]] = {}
    for each in course.rounds[1:]:
        step, signals = each["step"], each["signals"]
        samples = stream.train.take(step.seen)
        vectors = {
            " of hidden states": signals.embeddings,
            ", random vectors": rng.normal(size=(len(samples.skill), 32)),
            ", a new projection for every batch": _projected_anew(each["model"], samples),
        }
        found.setdefault("purity of clusters", []).append(_purity(step.labels, samples.skill))
        for name, rows in vectors.items():
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            unit = rows / np.where(lengths > 0, lengths, 1.0)
            labels = cluster_rows(unit, min(CLUSTERS, len(rows)), 3, 300, seed % 2**31)[1]
            found.setdefault(f"purity of clusters{name}", []).append(_purity(labels, samples.skill))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _purity(labels: Int[np.ndarray, " n"], skill: Int[np.ndarray, " n"]) -> float:
    return sum(np.bincount(skill[labels == cluster]).max() for cluster in np.unique(labels)) / len(skill)


def _projected_anew(model: Net, samples: Samples, rows: int = 64) -> np.ndarray:
    """Gradient vectors as a lazy implementation would get them: every batch draws a matrix of its own."""
    parts = [
        gradient_features(
            model, samples.take(np.arange(start, min(start + rows, len(samples.skill)))).data, params=in_layers(1),
            projection=RandomProjection(DIM, random_state=start), vectorize=True, batch_size=rows,
        ).vectors
        for start in range(0, len(samples.skill), rows)
    ]  # fmt: skip
    return torch.cat(parts).numpy()


def _grounding(stream: Stream, seed: int, epochs: int) -> dict[str, float]:
    """Mean image grounding of the pool, under a network that has learnt every skill."""
    model = _untrained(seed)
    _train(model, stream.ample, epochs, seed)
    data = stream.train.data
    ratio, both = (
        sample_scores(model, data, kinds=["image_grounding"], blank=blank, batch_size=1024)["image_grounding"].numpy()
        for blank in (_no_image, lambda batch: (torch.zeros_like(batch[0]), batch[1]))
    )
    shuffled = np.random.default_rng([seed, 4]).permutation(ratio)
    words = stream.train.skill == len(SKILLS) - 1
    found = {}
    for name, values in (("", ratio), (", shuffled", shuffled), (", question blanked", both)):
        found[f"image grounding of image skills{name}"] = float(values[~words].mean())
        found[f"image grounding of words alone{name}"] = float(values[words].mean())
    found["accuracy of the network that grounds"] = float(_accuracy(model, stream.test).mean())
    return found


def _order(course: Course, limited: Course, stream: Stream, seed: int) -> dict[str, float]:
    """Share of all copies that leave before any original of their cluster does, at the last round."""
    step, signals = course.rounds[-1]["step"], course.rounds[-1]["signals"]
    copy = stream.train.take(step.seen).copy
    n = len(copy)
    nearest_any = np.maximum(*(
        _backwards(signals.embeddings, step.labels, back) for back in (False, True)
    ))  # fmt: skip
    ways = {
        "": earlier_similarity(signals.embeddings, step.labels),
        ", random order": np.random.default_rng([seed, 5]).random(n),
        ", any other row": nearest_any,
    }
    found = {}
    for name, like in ways.items():
        first = sum(
            int((like[mine & copy] > like[mine & ~copy].max(initial=-1.0)).sum())
            for mine in (step.labels == cluster for cluster in np.unique(step.labels))
        )
        found[f"copies pruned before any original{name}"] = first / max(int(copy.sum()), 1)
    pruned = np.concatenate([each["step"].pruned for each in limited.rounds]).astype(np.int64)
    found["originals pruned, pool of 1000"] = float((~stream.train.copy[pruned]).sum())
    found["copies pruned, pool of 1000"] = float(stream.train.copy[pruned].sum())
    return found


def _backwards(embeddings: np.ndarray, labels: np.ndarray, back: bool) -> Float[np.ndarray, " n"]:
    side = slice(None, None, -1 if back else 1)
    return earlier_similarity(embeddings[side], labels[side])[side]


def _alone(stream: Stream, seed: int, budget: int, epochs: int) -> Float[np.ndarray, " skills"]:
    """Accuracy of every skill by a network that has trained on its data set only."""
    found, ends = [], np.cumsum(stream.sizes)
    for skill, end in enumerate(ends):
        model, size = _untrained(seed), stream.sizes[skill]
        rows = np.random.default_rng([seed, 6, skill]).choice(size, min(budget, size), replace=False)
        _train(model, stream.train.take(end - size + rows), epochs, seed)
        found.append(_accuracy(model, stream.test)[skill])
    return np.maximum(found, 1e-3)


def _lifelong(tables: dict[str, list[np.ndarray]], name: str, seed: int) -> dict[str, float]:
    """The figures that bars judge, of one strategy."""
    rare = {each: [table[-1, RARE].mean() for table in tables[each]] for each in (name, "random replay")}
    gain = paired_difference(rare[name], rare["random replay"], random_state=seed)
    lost = {each: np.mean([forgetting(table) for table in tables[each]]) for each in (name, "sequential")}
    several = len(rare[name]) > 1
    return {
        "forgetting over that of sequential": float(lost[name] / max(lost["sequential"], 1e-9)),  # type: ignore[operator]
        "rare skills, Adapt-infinity": float(np.mean(rare[name])),
        "rare skills over random replay": gain.mean,
        "rare skills over random replay, low end": gain.low if several else float("nan"),
    }


def _untrained(seed: int) -> Net:
    with seeded(seed % 2**31):
        return Net()


def _train(model: Net, samples: Samples, epochs: int, seed: int) -> None:
    fit(
        model, samples.x, samples.answer, loss=cross_entropy, epochs=epochs, batch_size=32, drop_last=False,
        optimizer=torch.optim.Adam(model.parameters(), RATE), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def _accuracy(model: Net, test: Samples) -> Float[np.ndarray, " skills"]:
    with torch.no_grad():
        right = (model(test.x).argmax(dim=1) == test.answer).numpy()
    return np.array([right[test.skill == skill].mean() for skill in range(len(SKILLS))])


def _no_image(batch: Any) -> Any:
    x = batch[0].clone()
    x[:, :PIXELS] = 0
    return x, batch[1]


def _picture(tables: dict[str, list[np.ndarray]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    for ax, name in zip(axes, ("sequential", "random replay", "EL2N, largest", "Adapt-infinity")):
        mean = np.mean(tables[name], axis=0)
        for skill, label in enumerate(SKILLS):
            ax.plot(range(1, len(mean) + 1), mean[:, skill], "o-", label=label, markersize=4)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("data set")
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(0, 1)
    axes[-1].legend(fontsize=7)
    return figure
