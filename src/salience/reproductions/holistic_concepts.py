"""Claim: on a linear head gradient x input, integrated gradients and occlusion give the best order of concepts, ahead
of random and Sobol orders; NMF keeps the distribution of activations better than k-means and than PCA read without its
mean; local importances tell two planted strategies apart.

Substitute for three networks on ten classes of ImageNet: scikit-learn's digits, a small network with a hidden layer of
64 before its head, 10 concepts. The strategies are planted: a class is shown by a plus or by a cross.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from salience.concepts import (
    ConceptModel,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
    RandomConcepts,
    SAEConcepts,
    SemiNMFConcepts,
    concept_importance,
    draw_graph,
    extraction_report,
    importance_report,
    strategy_graph,
    wasserstein,
)
from salience.concepts.attributions import summed
from salience.concepts.concept_curves import follow_orders
from salience.concepts.extractors import Activations
from salience.errors import InputError
from salience.evidence import Bar, Control, Outcome, Run
from salience.model.fitting import fit
from salience.reproductions.worlds import digits, nets, zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.concepts import ExtractionReport, ImportanceReport, StrategyGraph

CLAIM = (
    "on a linear head gradient x input, integrated gradients and occlusion give the best concept order, ahead of "
    "random and Sobol orders; NMF keeps the distribution of activations better than k-means and than PCA read without "
    "its mean; local importances tell two planted strategies apart"
)
LAYER, CONCEPTS, FEW = "relu5", 10, 6  # before the head; FEW concepts have all their orders tried
EPOCHS = 8
DRAWS = 20  # random importances
EXACT = ("gradient_input", "integrated_gradients", "occlusion")
SIDE = 16
EPOCHS_OF_SHAPES, EPOCHS_OF_HEAD = 25, 200
LATE, PARTS = "flatten", 6  # layer and concepts of the planted world


def reproduce(run: Run) -> Outcome:
    """Measure extractors, importances and strategies."""
    if run.data is not None:
        raise InputError("--data: this reproduction uses scikit-learn's digits and draws its own shapes; leave it out")

    # Data and model: digits, a network whose head is linear.
    run.step("training the network")
    model = cast(nn.Sequential, zoo.trained(zoo.Recipe(build, train_briefly if run.smoke else train), run.seed))
    world = digits.split(run.seed)
    learn, test = torch.from_numpy(world.train_x), torch.from_numpy(world.test_x)
    with torch.no_grad():
        before, predicted = model[:-1], model(test).argmax(1)
        known, unseen = before(learn), before(test)

    # Method and measure: extractors on held-out activations.
    run.step("extractors")
    reports = {
        name: extraction_report(known, unseen, extractor.fit(known), head=model[-1], random_state=run.seed)
        for name, extractor in extractors(run).items()
    }
    written = distances(reports, known, unseen, run)

    run.step("importances")
    concepts = ConceptModel(model, LAYER, NMFConcepts(n_concepts=CONCEPTS).fit(known))
    rows = slice(0, 10 if run.smoke else 120)
    measured, exactness = importances(concepts, test[rows], predicted[rows], run)
    best = above_best(
        ConceptModel(model, LAYER, NMFConcepts(n_concepts=FEW).fit(known)), test[:40], predicted[:40], run
    )

    run.step("planted strategies")
    planted = find_strategies(run)
    return outcome(reports, written, measured, exactness, best, planted,
                   float((predicted == torch.from_numpy(world.test_y)).double().mean()))  # fmt: skip


def outcome(
    reports: dict[str, ExtractionReport], written: dict[str, float], measured: dict[str, ImportanceReport],
    exactness: dict[str, float], best: dict[str, float], planted: Planted, accuracy: float,
) -> Outcome:  # fmt: skip
    """Figures, bars and controls."""
    deletion = {name: float(report.deletion.area.mean()) for name, report in measured.items()}
    insertion = {name: float(report.insertion.area.mean()) for name, report in measured.items()}
    fidelity = {name: float(report.mu_fidelity.mean()) for name, report in measured.items()}
    for name, areas in (("C-deletion", deletion), ("C-insertion", insertion), ("muFidelity", fidelity)):
        draws = [areas.pop(each) for each in list(areas) if each.startswith("random ")]
        areas["random"] = float(np.mean(draws))
        written |= {f"{name}, {each}": value for each, value in areas.items()}
    zeros = (CONCEPTS - 1) / CONCEPTS
    figures = {
        "largest difference of the three": exactness["the three"],
        "least muFidelity of the three": min(fidelity[name] for name in EXACT),
        "most above the best of all orders": best["gradient_input"],
        "zeros of k-means off (k - 1) / k": abs(reports["k-means"].sparsity - zeros),
        "adjusted Rand index": planted.agreement["local importances"],
        "strategies found": planted.found["local importances"],
        **written,
        **{f"{measure.replace('_', ' ')}, {name}": getattr(report, measure) for name, report in reports.items()
           for measure in ("relative_l2", "sparsity", "stability", "ood", "agreement")},
        "accuracy of the network": accuracy,
    }  # fmt: skip
    order = ("gradient_input", "sobol", "random")
    return Outcome(
        claim=CLAIM,
        level="mechanism",
        figures=figures,
        bars=[
            Bar("largest difference of the three", at_most=1e-4),
            Bar("least muFidelity of the three", at_least=0.999),
            Bar("most above the best of all orders", at_most=1e-4),
            *(Bar(f"C-deletion, {b}", above=f"C-deletion, {a}") for a, b in itertools.pairwise(order)),
            *(Bar(f"C-insertion, {a}", above=f"C-insertion, {b}") for a, b in itertools.pairwise(order)),
            Bar("zeros of k-means off (k - 1) / k", at_most=1e-9),
            Bar("W1 of NMF over k-means'", at_most=0.5),
            Bar("W1 of NMF over that of PCA without its mean", at_most=0.5),
            Bar("adjusted Rand index", at_least=0.9),
            Bar("strategies found", at_least=2, at_most=2),
        ],
        controls=[
            *(Control(f"{label} importance", kind, {  # type: ignore[arg-type]
                "largest difference of the three": exactness[name],
                "least muFidelity of the three": fidelity[name.split(" ")[0]],
                "most above the best of all orders": best[name],
            }) for label, name, kind in (("random", "random 0", "random"), ("saliency as", "saliency", "fake"),
                                         ("Sobol as", "sobol", "fake"))),
            *(Control(f"{name} in NMF's place", kind, {  # type: ignore[arg-type]
                figure: value * written[f"W1, {name}"] / written["W1, NMF"]
                for figure, value in written.items() if figure.startswith("W1 of NMF over") and "with its" not in figure
            }) for name, kind in (("random", "random"), ("rows of the activations", "fake"))),
            Control("k-means with codes by distance", "fake",
                    {"zeros of k-means off (k - 1) / k": written.pop("zeros of soft codes")}),
            *(Control(f"strategies by {name}", kind, {  # type: ignore[arg-type]
                "adjusted Rand index": planted.agreement[name], "strategies found": planted.found[name],
            }) for name, kind in (("random importances", "random"), ("codes", "fake"), ("activations", "fake"))),
        ],
        pictures={"Strategies of a class that is shown by a plus or by a cross": _strategies(planted),
                  "Concepts out, on a linear head": _deletion(measured)},
        notes=[
            "C-deletion and C-insertion are areas under the logit of the predicted class; muFidelity is Pearson's.",
            "PCA with its mean put back has the lower W1: the last of the figures on W1 is above 1. The bar is on PCA "
            "whose mean is taken off at fit alone, as in the trial that it was set after.",
        ],
    )  # fmt: skip


def build(seed: int) -> nn.Module:
    """Two convolutions, a hidden layer of 64 and the head."""
    with nets.seeded(seed):
        return nn.Sequential(OrderedDict(
            c1=nn.Conv2d(1, 16, 3, padding=1), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            c2=nn.Conv2d(16, 32, 3, padding=1), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(), hidden=nn.Linear(128, 64), relu5=nn.ReLU(), head=nn.Linear(64, 10),
        ))  # fmt: skip


def train(model: nn.Module, seed: int) -> None:
    """Teach it the digits, to an accuracy of about 0.94."""
    _fit(model, seed, EPOCHS)


def train_briefly(model: nn.Module, seed: int) -> None:
    """Train just long enough to try the plumbing."""
    _fit(model, seed, 2)


def _fit(model: nn.Module, seed: int, epochs: int) -> None:
    world = digits.split(seed)
    fit(model, torch.from_numpy(world.train_x), torch.from_numpy(world.train_y), loss=cross_entropy, epochs=epochs,
        optimizer=torch.optim.Adam(model.parameters()), generator=torch.Generator().manual_seed(seed))  # fmt: skip


# Extractors -----------------------------------------------------------------------------------------------------------


class UncentredPCA(PCAConcepts):
    """PCA used as is often done: directions about the mean, but codes ``A V^T`` and no mean put back."""

    def encode(self, activations: Tensor) -> Tensor:
        """Coordinates from 0."""
        return activations @ self.components_.T

    def decode(self, codes: Tensor) -> Tensor:
        """The product with the dictionary alone."""
        return codes @ self.components_


class RowConcepts(RandomConcepts):
    """Rows of the activations as a dictionary, read like NMF's."""

    def fit(self, activations: Activations) -> RowConcepts:
        """Draw the rows."""
        rows = np.random.default_rng(self.random_state).choice(len(activations), self.n_concepts, replace=False)
        self.components_ = torch.as_tensor(activations)[torch.from_numpy(rows)].clone()
        return self


def extractors(run: Run) -> dict[str, Any]:
    """All extractors, unfitted, and what stands beside them."""
    kinds = {
        "PCA": PCAConcepts, "PCA without its mean": UncentredPCA, "k-means": KMeansConcepts, "NMF": NMFConcepts,
        "semi-NMF": SemiNMFConcepts, "autoencoder": SAEConcepts, "random": RandomConcepts,
        "rows of the activations": RowConcepts,
    }  # fmt: skip
    more = {name: {} if issubclass(kind, PCAConcepts) else {"random_state": run.seed} for name, kind in kinds.items()}
    if run.smoke:
        more["autoencoder"]["steps"] = 30
    return {name: kind(n_concepts=CONCEPTS, **more[name]) for name, kind in kinds.items()}


def distances(reports: dict[str, ExtractionReport], known: Tensor, unseen: Tensor, run: Run) -> dict[str, float]:
    """W1 of each extractor, NMF's over others', and the zeros of soft codes about k-means' centres."""
    w1 = {name: report.w1 for name, report in reports.items()}
    centres = KMeansConcepts(n_concepts=CONCEPTS, random_state=run.seed).fit(known).components_
    soft = torch.softmax(-torch.cdist(unseen, centres), 1)
    return {
        **{f"W1, {name}": value for name, value in w1.items()},
        "W1 of NMF over k-means'": w1["NMF"] / w1["k-means"],
        "W1 of NMF over that of PCA without its mean": w1["NMF"] / w1["PCA without its mean"],
        "W1 of NMF over that of PCA with its mean": w1["NMF"] / w1["PCA"],
        "W1 of two halves of the test activations": wasserstein(unseen[: len(unseen) // 2],
                                                                unseen[len(unseen) // 2 :][: len(unseen) // 2]),
        "zeros of soft codes": abs(float((soft.abs() <= 1e-6).double().mean()) - (CONCEPTS - 1) / CONCEPTS),
    }  # fmt: skip


# Importances ----------------------------------------------------------------------------------------------------------


def importances(
    concepts: ConceptModel, images: Tensor, classes: Tensor, run: Run
) -> tuple[dict[str, ImportanceReport], dict[str, float]]:
    """Curves and fidelity of each method, and how far each is from gradient x input."""
    with torch.no_grad():
        codes = concepts.encode(images)
    names = (*EXACT, "saliency", "smoothgrad", "sobol", "kernelshap", "rise", "hsic")
    phi = {name: concept_importance(concepts, codes, images, classes, method=name, random_state=run.seed)
           for name in names}  # fmt: skip
    rng = run.rng("random importances")
    phi |= {f"random {i}": rng.random(codes.shape) for i in range(3 if run.smoke else DRAWS)}
    reports = {name: importance_report(concepts, codes, images, classes, values, correlation="pearson",
                                       n_subsets=50 if run.smoke else 200, random_state=run.seed)
               for name, values in phi.items()}  # fmt: skip
    off = {name: float(np.abs(values - phi["gradient_input"]).max()) for name, values in phi.items()}
    off["the three"] = max(float(np.abs(phi[a] - phi[b]).max()) for a, b in itertools.combinations(EXACT, 2))
    return reports, off


def above_best(concepts: ConceptModel, images: Tensor, classes: Tensor, run: Run) -> dict[str, float]:
    """How much larger an importance's area under deletion is than that of the best of all orders, at most."""
    with torch.no_grad():
        codes = concepts.encode(images)
    orders = np.array([np.argsort(order) for order in itertools.permutations(range(FEW))], dtype=float)
    best = np.empty(len(images))
    for i in range(len(images)):
        changed, scores = follow_orders(concepts, codes[i : i + 1], images[i : i + 1], int(classes[i]), orders,
                                        mode="deletion", score="logit")  # fmt: skip
        best[i] = np.trapezoid(scores[:, 0], changed, axis=-1).min()
    phi = {name: concept_importance(concepts, codes, images, classes, method=name)
           for name in ("gradient_input", "saliency", "sobol")}  # fmt: skip
    phi["random 0"] = run.rng("random order").random(codes.shape)
    areas = {name: importance_report(concepts, codes, images, classes, values, n_subsets=2).deletion.area
             for name, values in phi.items()}  # fmt: skip
    return {name: float((area - best).max()) for name, area in areas.items()}


# Strategies -----------------------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """How well clusters of several things tell the strategies, how many there are, and the graph."""

    agreement: dict[str, float]
    found: dict[str, int]
    graph: StrategyGraph


def shapes(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, np.ndarray]:
    """Images, whether each holds (plus or cross, ring, bars), and which of plus (0), cross (1), neither (-1).

    Shapes are 5 x 5 at random places of a noisy image, one in each quarter that has one, of random strength; plus and
    cross are bright, ring and bars dark.
    """
    plus, cross, ring, bars = np.zeros((4, 5, 5))
    plus[2], plus[:, 2] = 1, 1
    cross[range(5), range(5)], cross[range(5), range(4, -1, -1)] = 1, 1
    ring[[0, -1]], ring[:, [0, -1]] = -1, -1
    bars[::2] = -1
    which = rng.choice([-1, 0, 1], count, p=[0.4, 0.3, 0.3])
    others = rng.random((count, 2)) < 0.5
    images = rng.normal(0, 0.1, (count, SIDE, SIDE))
    for i in range(count):
        quarters = rng.permutation(4)
        held = ([(plus, cross)[which[i]]] if which[i] >= 0 else []) + [
            s for s, on in zip((ring, bars), others[i]) if on
        ]
        for quarter, shape in zip(quarters, held, strict=False):
            top, left = (8 * int(side) + int(rng.integers(0, 4)) for side in divmod(quarter, 2))
            images[i, top : top + 5, left : left + 5] += shape * rng.uniform(0.6, 1.4)
    labels = np.column_stack([which >= 0, others])
    return torch.from_numpy(images).float()[:, None], torch.from_numpy(labels).float(), which


def build_shapes(seed: int) -> nn.Module:
    """The small network of four convolutions, one output for each label."""
    return nets.small_cnn(seed, num_classes=3)


def train_shapes(model: nn.Module, seed: int) -> None:
    """Teach the features to tell the four shapes, and then a linear head to read the three labels off them.

    The first label is so reached through either of two groups of features. A network that is taught the labels alone
    may well merge the two, and then there is one strategy.
    """
    *body, head = cast(nn.Sequential, model)
    images, labels, which = shapes(2000, np.random.default_rng([seed, 1]))
    four = torch.from_numpy(np.column_stack([which == 0, which == 1, labels[:, 1:]])).float()
    with nets.seeded(seed):
        features = nn.Sequential(*body, nn.Linear(cast(nn.Linear, head).in_features, 4))
    generator = torch.Generator().manual_seed(seed)
    fit(features, images, four, loss=binary_cross_entropy_with_logits, epochs=EPOCHS_OF_SHAPES,
        optimizer=torch.optim.Adam(features.parameters(), lr=3e-3), generator=generator)  # fmt: skip
    with torch.no_grad():
        pooled = features[:-1](images)
    fit(head, pooled, labels, loss=binary_cross_entropy_with_logits, epochs=EPOCHS_OF_HEAD,
        optimizer=torch.optim.Adam(head.parameters(), lr=1e-2), generator=generator)  # fmt: skip


def find_strategies(run: Run) -> Planted:
    """Cluster the images of the first label by local importances, and by codes, activations and chance."""
    model = zoo.trained(zoo.Recipe(build_shapes, train_shapes), run.seed) if not run.smoke else build_shapes(run.seed)
    learn, _, known = shapes(200 if run.smoke else 600, run.rng("learn"))
    images, _, which = shapes(100 if run.smoke else 400, run.rng("held out"))
    learn, images, which = learn[known >= 0], images[which >= 0], which[which >= 0]
    concepts = ConceptModel(model, LATE, NMFConcepts(n_concepts=PARTS))
    with torch.no_grad():
        concepts.extractor.fit(concepts.activations(learn).flatten(0, -2))
        activations, codes = concepts.activations(images), concepts.encode(images)
        right = (model(images)[:, 0] > 0).numpy()
    by = {
        "local importances": concept_importance(concepts, codes, images, 0),
        "codes": summed(codes).double().numpy(), "activations": summed(activations).double().numpy(),
        "random importances": run.rng("random strategies").normal(size=(len(images), PARTS)),
    }  # fmt: skip
    graphs = {
        name: strategy_graph(values, right, n_clusters=None, random_state=run.seed) for name, values in by.items()
    }
    index = {name: float(adjusted_rand_score(which, graph.labels)) for name, graph in graphs.items()}
    found = {name: len(graph.nodes) for name, graph in graphs.items()}
    return Planted(index, found, graphs["local importances"])


def _strategies(planted: Planted) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    draw_graph(figure.subplots(), planted.graph)
    return figure


def _deletion(measured: dict[str, ImportanceReport]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axis = figure.subplots()
    for label, name in (("gradient x input", "gradient_input"), ("Sobol", "sobol"), ("saliency", "saliency"),
                        ("random", "random 0")):  # fmt: skip
        curve = measured[name].deletion
        axis.plot(curve.changed, curve.scores.mean(0), label=label)
    axis.set_xlabel("share of the concepts that is out")
    axis.set_ylabel("logit")
    axis.legend()
    return figure
