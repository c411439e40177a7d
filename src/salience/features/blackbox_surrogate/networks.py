"""The paper's networks for wide tables: a convolutional autoencoder, and a self-attention network as probe.

Autoencoder: a row of M columns is padded with zeros to a square image; three times convolution, ReLU, batch
normalisation and pooling give the code, and the mirror image gives the row back. Classes are read from the code.

Self-attention network (SAN) on D columns, heads h:

    a_h(v) = softmax(W_h v + b_h),      o = 1/H sum_h a_h(v) * v,      logits = W_3 SELU(dropout(W_2 o + b_2)) + b_3

Sources: Karim et al., DSAA 2023 (arXiv 2208.13405) and its notebooks; Škrlj et al., "Feature importance estimation with
self-attention networks" (arXiv 2002.04464), whose two views of attention are `local_attention` and `global_attention`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot

from salience.errors import InputError
from salience.model.at import training_mode
from salience.model.batches import map_batches
from salience.model.fitting import fit


class ConvAutoencoder(nn.Module):
    """Code and reconstruction of table rows laid out as square images.

    Parameters
    ----------
    n_features : int
        M; padded to the next square, whose extra cells are left out of the reconstruction.
    channels : tuple of int
        Channels of the encoder's convolutions.
    """

    def __init__(self, n_features: int, channels: tuple[int, ...] = (16, 8, 8)) -> None:
        super().__init__()
        self.n_features = n_features
        self.side = math.ceil(math.sqrt(n_features))
        sides = [self.side]
        for _ in channels:
            sides.append(math.ceil(sides[-1] / 2))
        self.code_shape = (channels[-1], sides[-1], sides[-1])
        down: list[nn.Module] = []
        for before, after in zip((1, *channels), channels):
            down += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(after)]
            down += [nn.MaxPool2d(2, ceil_mode=True)]
        self.encoder = nn.Sequential(*down)
        up: list[nn.Module] = []
        for before, after in zip((channels[-1], *channels[:0:-1]), channels[::-1]):
            up += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.ReLU(),
                nn.BatchNorm2d(after),
                nn.Upsample(scale_factor=2),
            ]
        self.decoder = nn.Sequential(*up, nn.Conv2d(channels[0], 1, 3, padding=1))

    def encode(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch code"]:
        """Codes of rows."""
        padded = nn.functional.pad(x, (0, self.side**2 - self.n_features))
        return self.encoder(padded.view(-1, 1, self.side, self.side)).flatten(1)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Rows given back by their codes."""
        image = self.decoder(self.encode(x).view(-1, *self.code_shape))
        return image[:, 0, : self.side, : self.side].flatten(1)[:, : self.n_features]


class CodeClassifier(nn.Module):
    """Class logits of rows by their codes: the paper's supervised black box; the encoder trains along."""

    def __init__(self, autoencoder: ConvAutoencoder, n_classes: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        channels, side, _ = autoencoder.code_shape
        small = math.ceil(side / 2)
        self.head = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32), nn.MaxPool2d(2, ceil_mode=True),
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(32 * small * small, 512), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(512, n_classes),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits; softmax gives probabilities."""
        return self.head(self.autoencoder.encode(x).view(-1, *self.autoencoder.code_shape))


class SelfAttentionNet(nn.Module):
    """Class logits of rows whose columns are weighed by attention (see the module's text).

    Parameters
    ----------
    n_features, n_classes : int
    heads : int
        Each holds an ``n_features x n_features`` matrix.
    hidden : int
    dropout : float
    """

    def __init__(self, n_features: int, n_classes: int, heads: int = 2, hidden: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(n_features, n_features) for _ in range(heads))
        self.inner = nn.Linear(n_features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, n_classes)

    def local_attention(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Attention of each row to its columns, the mean over heads; sums to 1."""
        return torch.stack([head(x).softmax(dim=1) for head in self.heads]).mean(dim=0)

    def global_attention(self) -> Float[Tensor, " features"]:
        """Softmax of each head's diagonal, the mean over heads; sums to 1."""
        return torch.stack([head.weight.diagonal().softmax(dim=0) for head in self.heads]).mean(dim=0)  # type: ignore[operator]

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits; the sigmoid of each is that class's score."""
        attended = self.local_attention(x) * x
        return self.outer(nn.functional.selu(self.dropout(self.inner(attended))))


class _TableNet(ClassifierMixin, BaseEstimator):
    """What both classifiers share: standardised columns, classes, probabilities in batches."""

    def _start(self, X: Any, y: Any) -> tuple[Tensor, Tensor, torch.Generator]:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=4)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y holds one class only ({self.classes_[0]!r}); a classifier needs two")
        self.mean_, spread = rows.mean(axis=0), rows.std(axis=0)
        self.scale_ = np.where(spread > 0, spread, 1.0)
        generator = torch.Generator().manual_seed(int(np.random.default_rng(self.random_state).integers(2**31)))
        return self._standard(rows), torch.from_numpy(codes), generator

    def _standard(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(((rows - self.mean_) / self.scale_).astype(np.float32))

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self._standard(validate_data(self, X, dtype=np.float64, reset=False))

    def _logits(self, X: Any, fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        with torch.no_grad(), training_mode(self.network_, False):
            return map_batches(fn or self.network_, self._rows(X), batch_size=1024)

    def predict(self, X: Any) -> np.ndarray:
        """Classes of rows."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """Probabilities of the classes."""
        raise NotImplementedError


class CAEClassifier(_TableNet):
    """The paper's black box: an autoencoder trained on the rows, then a classifier on its code.

    Parameters
    ----------
    channels : tuple of int
    pretraining, epochs : int
        Epochs of the autoencoder (mean squared error) and of the classifier (cross-entropy).
    batch_size : int
    learning_rate : float
        Of Adam.
    random_state : int

    Attributes
    ----------
    network_ : CodeClassifier
    reconstruction_ : float
        Mean squared error of the autoencoder on standardised columns; 1 is that of the mean.
    """

    def __init__(
        self, *, channels: tuple[int, ...] = (16, 8, 8), pretraining: int = 10, epochs: int = 30, batch_size: int = 32,
        learning_rate: float = 1e-3, random_state: int = 0,
    ) -> None:  # fmt: skip
        self.channels = channels
        self.pretraining = pretraining
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> CAEClassifier:
        """Train on (n, M) rows and their n classes."""
        rows, codes, generator = self._start(X, y)
        with _seeded(generator):
            autoencoder = ConvAutoencoder(rows.shape[1], tuple(self.channels))
            network = CodeClassifier(autoencoder, len(self.classes_))
        size = min(self.batch_size, len(rows))
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=self.learning_rate)
        history = fit(autoencoder, rows, rows, loss=mse_loss, optimizer=optimizer, epochs=self.pretraining,
                      generator=generator, batch_size=size)  # fmt: skip
        self.reconstruction_ = history.loss[-1]
        optimizer = torch.optim.Adam(
            [*autoencoder.encoder.parameters(), *network.head.parameters()], lr=self.learning_rate
        )
        fit(network, rows, codes, loss=cross_entropy, optimizer=optimizer, epochs=self.epochs, generator=generator,
            batch_size=size)  # fmt: skip
        self.network_ = network
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """Softmax of the logits."""
        return self._logits(X).double().softmax(dim=1).numpy()


class SANClassifier(_TableNet):
    """A self-attention network that classifies rows and tells which columns it attends to.

    Parameters
    ----------
    heads, hidden, dropout
        See `SelfAttentionNet`.
    epochs, batch_size : int
    patience : int
        Stop after so many epochs without a lower training loss.
    learning_rate : float
        Of Adam.
    max_features : int
        Heads hold as many weights as the square of the number of columns: of a wider table only the columns with the
        largest F statistic are attended to, which is said by a warning.
    random_state : int

    Attributes
    ----------
    network_ : SelfAttentionNet
    attention_ : (M,) float
        Local attention averaged over the training rows that are classified correctly (all, if none is); 0 for columns
        that were left out.
    global_attention_ : (M,) float
        By the diagonals of the heads.
    columns_ : (D,) int
        Columns that the network sees.
    """

    def __init__(
        self, *, heads: int = 2, hidden: int = 32, dropout: float = 0.2, epochs: int = 32, batch_size: int = 32,
        patience: int = 10, learning_rate: float = 1e-3, max_features: int = 5000, random_state: int = 0,
    ) -> None:  # fmt: skip
        self.heads = heads
        self.hidden = hidden
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.patience = patience
        self.learning_rate = learning_rate
        self.max_features = max_features
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SANClassifier:
        """Train on (n, M) rows and their n classes."""
        rows, codes, generator = self._start(X, y)
        self.columns_ = self._preselected(rows, codes)
        rows = rows[:, self.columns_]
        classes = len(self.classes_)
        with _seeded(generator):
            network = SelfAttentionNet(rows.shape[1], classes, self.heads, self.hidden, self.dropout)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        best, since, size = math.inf, 0, min(self.batch_size, len(rows))
        for _ in range(self.epochs):
            history = fit(network, rows, one_hot(codes, classes).float(), loss=binary_cross_entropy_with_logits,
                          optimizer=optimizer, epochs=1, generator=generator, batch_size=size)  # fmt: skip
            since = 0 if history.loss[-1] < best else since + 1
            best = min(best, history.loss[-1])
            if since >= self.patience:
                break
        self.network_ = network
        with torch.no_grad(), training_mode(network, False):
            right = map_batches(network, rows, batch_size=1024).argmax(dim=1) == codes
            local = map_batches(network.local_attention, rows[right] if right.any() else rows, batch_size=1024)
            diagonal = network.global_attention()
        self.attention_ = self._spread(local.double().mean(dim=0).numpy())
        self.global_attention_ = self._spread(diagonal.double().numpy())
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """Sigmoid of each logit, scaled to a sum of 1."""
        scores = self._logits(X, lambda rows: self.network_(rows[:, self.columns_])).double().sigmoid().numpy()
        return scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-300)

    def local_attention(self, X: Any) -> Float[np.ndarray, "n features"]:
        """Attention of each row to each column."""
        local = self._logits(X, lambda rows: self.network_.local_attention(rows[:, self.columns_]))
        return np.stack([self._spread(row) for row in local.double().numpy()])

    def _preselected(self, rows: Tensor, codes: Tensor) -> np.ndarray:
        if rows.shape[1] <= self.max_features:
            return np.arange(rows.shape[1])
        from sklearn.feature_selection import f_classif

        warnings.warn(
            f"attention over {rows.shape[1]:,} columns would take {rows.shape[1] ** 2 * self.heads * 4 / 1e9:,.1f} GB: "
            f"only the {self.max_features:,} columns with the largest F statistic are attended to",
            stacklevel=3,
        )
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant columns have no F statistic
            statistic = np.nan_to_num(f_classif(rows.numpy(), codes.numpy())[0], nan=-1.0)
        return np.sort(np.argsort(-statistic, kind="stable")[: self.max_features])

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """Values of the network's columns among all columns."""
        every = np.zeros(len(self.mean_))
        every[self.columns_] = values
        return every


class _seeded:
    """Draw the initial weights from a generator, and leave the global state as it was."""

    def __init__(self, generator: torch.Generator) -> None:
        self._seed = int(torch.randint(2**31, (), generator=generator))

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self._state)
