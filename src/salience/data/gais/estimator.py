"""`GAIS`: keep the few rows of a labelled table that a graph attention network scores as important."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from salience.data.gais.edges import Graph
from salience.data.gais.hashing import HashGraph
from salience.data.gais.minibatches import MiniBatchGraph
from salience.data.gais.network import GraphAttention
from salience.data.gais.selection import IMPORTANCE, choose, importance_scores, reduced_sizes
from salience.data.gais.training import read, train
from salience.data.kmq.quotas import class_quotas
from salience.errors import DataError, InputError

GRAPHS = ("minibatch", "sl_lsh", "ml_lsh", "mv_lsh")


class GAIS(BaseEstimator):
    r"""Instance selection by a graph attention network: scores every row of a labelled table, and keeps the best.

        s_j = z(A_j) + z(p_{y_j}(j)),      A_j = mean over layers, heads, edges j -> i of alpha_ij |N(i)|

    A graph joins similar rows; the network learns the classes on it; a row that its neighbours attend to and whose
    class is clear scores high. Of each class ``max(n_min, round((1 - reduction) n_c))`` rows stay.

    Parameters
    ----------
    graph : {"minibatch", "sl_lsh", "ml_lsh", "mv_lsh"}
        Distances inside stratified mini-batches, or hashing at a single level, at several, or in several views.
    reduction : float
        Share of the rows to leave out, in [0, 1).
    importance : {"attention+confidence", "attention", "confidence"}
        "confidence" is the predecessor's.
    confidence : {"label", "max"}
        Probability of the row's own label, or, as the predecessor has it, the largest of any class. Where classes
        overlap, "max" prefers rows that the network is sure are of another class than their label says.
    coverage : bool
        Choose in turns over buckets of alike rows, in place of the best scores alone.
    threshold : float, optional
        Keep every row with at least this score, in place of `reduction` and `coverage`, and still `n_min` of a class.
    n_min : int
        Rows to keep of each class at least; all, where it has fewer.
    batch_size, n_rounds : int
        Rows of a mini-batch, and how often all rows are shuffled into batches anew; scores are averaged over rounds.
    theta_s, theta_r : float
        Quantile of the similarities in a batch that an edge has to reach; probability to take a pair away.
    n_tables, n_bits : int
        Hash tables and their bits.
    levels : tuple of int
        Bits of the levels of "ml_lsh", ascending.
    n_views : int
        Of "mv_lsh"; the tables are shared out over them.
    bucket_cap, max_neighbors : int
        Largest bucket that is compared as a whole, and edges into a row by hashing.
    hidden, heads, epochs : int
    lr : float
    device : str or torch.device
    random_state : int, RandomState or None

    Attributes
    ----------
    selected_idx_ : (b,) int64
        Rows kept, ascending.
    scores_, attention_, confidence_ : (n,) float64
        `attention_` is NaN for a row that is nobody's neighbour; it counts as the mean of its class.
    classes_ : (k,)
    network_ : GraphAttention
        In evaluation mode.
    losses_ : list of float
        Held-out loss after each epoch.
    graph_stats_ : dict
        "edges": mean number of edges into a row; "isolated": share of rows without any.
    x_, y_, seed_
        What `select` needs: standardised rows, (n, d) float32; class codes, (n,); the seed of all draws.
    n_features_in_ : int

    Raises
    ------
    InputError, DataError
        See `fit`.

    Notes
    -----
    Source: Rustamov, Zaitouny, Zaki, AI Open 6 (2025) 167-182 (arXiv 2502.20293), and Rustamov et al. 2024 (arXiv
    2412.19201). Only their abstracts and summaries could be read. Verified: stratified mini-batches with distances only
    inside, random masking and a similarity threshold, hashing by random projections in three variants, a graph
    attention network, importance by attention, the predecessor's confidence. Reconstructed: every number, the
    formulas of edge weights and scores, class quotas. `coverage` and confidence in the row's own label are ours.

    The same seed, data and number of threads give the same rows on a CPU.
    """

    def __init__(
        self, *, graph: str = "minibatch", reduction: float = 0.96, importance: str = "attention+confidence",
        confidence: str = "label", coverage: bool = True, threshold: float | None = None, n_min: int = 2,
        batch_size: int = 256, n_rounds: int = 4, theta_s: float = 0.9, theta_r: float = 0.3, n_tables: int = 8,
        n_bits: int = 8, levels: tuple[int, ...] = (4, 8, 12), n_views: int = 4, bucket_cap: int = 64,
        max_neighbors: int = 32, hidden: int = 32, heads: int = 4, epochs: int = 100, lr: float = 5e-3,
        device: Any = "cpu", random_state: Any = 0,
    ) -> None:  # fmt: skip
        self.graph = graph
        self.reduction = reduction
        self.importance = importance
        self.confidence = confidence
        self.coverage = coverage
        self.threshold = threshold
        self.n_min = n_min
        self.batch_size = batch_size
        self.n_rounds = n_rounds
        self.theta_s = theta_s
        self.theta_r = theta_r
        self.n_tables = n_tables
        self.n_bits = n_bits
        self.levels = levels
        self.n_views = n_views
        self.bucket_cap = bucket_cap
        self.max_neighbors = max_neighbors
        self.hidden = hidden
        self.heads = heads
        self.epochs = epochs
        self.lr = lr
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> GAIS:
        """Build the graph, train on it, score every row, and choose.

        Parameters
        ----------
        X : (n, d) float
            Features, of the training part alone. They are standardised here; constant ones are left out.
        y : (n,)
            Classes.

        Raises
        ------
        InputError
            A parameter is not usable.
        DataError
            A value is missing, infinite or not a number; `y` is no classification target, or has one class.
        """
        self._check()
        rows, codes = self._validated(X, y)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.x_, self.y_, self.seed_ = _standardised(rows), codes, seed
        if self.graph == "minibatch" and self.batch_size < len(self.classes_):
            raise InputError(
                f"batch_size is {self.batch_size}, smaller than the {len(self.classes_)} classes: no batch could hold "
                "them all"
            )
        graph, rounds = self._graph(seed)
        device = torch.device(self.device)
        x, y_ = torch.from_numpy(self.x_).to(device), torch.from_numpy(codes).to(device)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network = GraphAttention(x.shape[1], len(self.classes_), hidden=self.hidden, heads=self.heads)
        self.network_ = network.to(device)
        self.losses_ = train(self.network_, x, y_, graph, epochs=self.epochs, rounds=rounds, lr=self.lr, seed=seed)
        known = y_ if self.confidence == "label" else None
        found = read(self.network_.eval(), x, graph, rounds=rounds, y=known)
        self.attention_, self.confidence_ = found.attention, found.confidence
        self.graph_stats_ = {"edges": found.edges, "isolated": found.isolated}
        self.scores_ = importance_scores(found.attention, found.confidence, codes, self.importance)
        self.selected_idx_ = self.select()
        return self

    def fit_resample(self, X: ArrayLike, y: ArrayLike) -> tuple[Any, Any]:
        """Fit, and give the rows kept and their labels, in the type in which they came.

        Parameters
        ----------
        X : (n, d)
        y : (n,)

        Returns
        -------
        (b, d), (b,)
        """
        self.fit(X, y)
        return _rows_of(X, self.selected_idx_), _rows_of(y, self.selected_idx_)

    def select(self, count: int | None = None) -> Int[np.ndarray, " b"]:
        """Rows to keep by the scores that were fitted.

        Parameters
        ----------
        count : int, optional
            Exactly so many rows, shared out over the classes, in place of `reduction` and `threshold`.

        Returns
        -------
        (b,) int64
            Ascending.

        Raises
        ------
        InputError
            `count` is out of range, or too small for `n_min` of each class.
        """
        check_is_fitted(self)
        sizes = np.bincount(self.y_)
        if count is None and self.threshold is not None:
            best = choose(self.scores_, self.y_, np.minimum(sizes, self.n_min))
            return np.union1d(best, np.flatnonzero(self.scores_ >= self.threshold))
        if count is None:
            quotas = reduced_sizes(sizes, self.reduction, self.n_min)
        elif isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= len(self.y_):
            raise InputError(f"count must be a whole number in 1..{len(self.y_)}, not {count!r}")
        else:
            quotas = class_quotas(sizes, int(count), self.n_min)
        return choose(self.scores_, self.y_, quotas, x=self.x_ if self.coverage else None, seed=self.seed_)

    def _graph(self, seed: int) -> tuple[Graph, int]:
        """The graph, and the rounds of batches to go through."""
        if self.graph == "minibatch":
            batches = MiniBatchGraph(self.x_, self.y_, batch_size=self.batch_size, theta_s=self.theta_s,
                                     theta_r=self.theta_r, seed=seed)  # fmt: skip
            return batches, self.n_rounds
        levels = tuple(self.levels) if self.graph == "ml_lsh" else (self.n_bits,)
        hashed = HashGraph(self.x_, n_tables=self.n_tables, levels=levels, cap=self.bucket_cap, seed=seed,
                           n_views=self.n_views if self.graph == "mv_lsh" else 1,
                           max_neighbors=self.max_neighbors)  # fmt: skip
        return hashed, hashed.rounds(self.n_rounds)

    def _validated(self, X: Any, y: ArrayLike) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
        if y is None:
            raise DataError("requires y to be passed, but the target y is None: GAIS learns the classes of the rows")
        if issparse(X):
            warnings.warn(f"sparse X is made dense: {X.shape[0]:,} x {X.shape[1]:,} numbers", stacklevel=3)
            X = X.toarray()
        kinds = [getattr(kind, "kind", "O") for kind in _kinds(X)]
        if "c" in kinds:
            raise DataError("Complex data not supported: X must be real numbers")
        if any(kind not in "biuf" for kind in kinds):
            raise DataError("X holds columns that are not numbers (dtype object, text or category): encode them first")
        try:
            check_classification_targets(y)
            rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_all_finite="allow-nan")
        except (TypeError, ValueError) as error:
            raise DataError(str(error)) from error
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            what = "NaN" if np.isnan(rows[tuple(bad[0])]) else "inf (infinity)"
            raise DataError(
                f"X holds {what} at row {bad[0][0]}, column {bad[0][1]} ({len(bad)} such values): fill them or leave "
                "the rows out"
            )
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"y has {len(self.classes_)} class; at least two classes are needed to learn")
        return rows, codes

    def _check(self) -> None:
        for name, value, allowed in (("graph", self.graph, GRAPHS), ("importance", self.importance, IMPORTANCE),
                                     ("confidence", self.confidence, ("label", "max"))):  # fmt: skip
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        for name, least in (("n_min", 1), ("batch_size", 2), ("n_rounds", 1), ("n_tables", 1), ("n_bits", 1),
                            ("n_views", 1), ("bucket_cap", 2), ("max_neighbors", 1), ("hidden", 1), ("heads", 1),
                            ("epochs", 1)):  # fmt: skip
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {number!r}")
        for name in ("reduction", "theta_s", "theta_r"):
            share = getattr(self, name)
            if not isinstance(share, int | float) or not 0 <= share < 1:
                raise InputError(f"{name} must lie in [0, 1), not {share!r}")
        if not isinstance(self.lr, int | float) or not 0 < self.lr < np.inf:
            raise InputError(f"lr must be positive and finite, not {self.lr!r}")
        levels = list(self.levels)
        if not levels or levels != sorted(set(levels)) or not 1 <= levels[0] <= levels[-1] <= 32 or self.n_bits > 32:
            raise InputError(f"levels and n_bits must be bits from 1 to 32, levels ascending; not {self.levels!r} and "
                             f"{self.n_bits!r}")  # fmt: skip

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.sparse = True
        return tags


def _standardised(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Mean 0 and variance 1 per feature, constant features left out."""
    middle = rows.mean(axis=0)
    spread = np.sqrt(((rows - middle) ** 2).mean(axis=0))
    varies = spread > 1e-12 * np.abs(middle)
    if not varies.all():
        warnings.warn(f"{int((~varies).sum())} constant features were left out", stacklevel=3)
    if not varies.any():  # all rows are alike: only chance tells them apart
        return np.zeros((len(rows), 1), np.float32)
    return ((rows[:, varies] - middle[varies]) / spread[varies]).astype(np.float32)


def _kinds(X: Any) -> list[Any]:
    """Types of the columns of a frame, or of the whole matrix."""
    return list(X.dtypes) if hasattr(X, "dtypes") else [np.asarray(X).dtype]


def _rows_of(values: Any, chosen: Int[np.ndarray, " b"]) -> Any:
    if hasattr(values, "iloc"):
        return values.iloc[chosen]
    return values[chosen] if issparse(values) else np.asarray(values)[chosen]
