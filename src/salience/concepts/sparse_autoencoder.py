"""A sparse autoencoder: codes that one matrix product makes, of which only the K largest are kept."""

from __future__ import annotations

import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from salience.concepts.extractors import Activations, fitting_matrix
from salience.errors import InputError
from salience.model.fitting import fit


class SAEConcepts(BaseEstimator):
    """Top-K sparse autoencoder.

        u = TopK(ReLU((a - b) W^T + c)),    decode(u) = u V + b,    min |A - U V - b|^2,    |V_i| = 1

    Trained by Adam on activations divided by their root mean square distance from the mean, which is `b` to begin with;
    `W` begins as `V`, and `V` as rows of the activations, less `b`.

    Parameters
    ----------
    n_concepts : int
        k; there may be more than columns.
    n_active : int, optional
        K, the codes of a row that may be above 0; at most k. By default a quarter of k, rounded up.
    steps, batch_size, learning_rate
        Of the training: at least so many steps, in whole passes over the rows.
    random_state : int

    Attributes
    ----------
    components_ : Tensor (k, p)
    encoder_ : Tensor (k, p)
        `W`.
    threshold_ : Tensor (k,)
        `c`.
    mean_ : Tensor (p,)
        `b`.
    n_active_ : int
        K.

    Notes
    -----
    Source: Makhzani and Frey, "k-Sparse Autoencoders", 2014; Gao et al., "Scaling and evaluating sparse autoencoders",
    2024 (arXiv 2406.04093), section 2.3, without its loss for dead codes.
    """

    def __init__(
        self,
        *,
        n_concepts: int = 20,
        n_active: int | None = None,
        steps: int = 1000,
        batch_size: int = 256,
        learning_rate: float = 5e-3,
        random_state: int = 0,
    ) -> None:
        self.n_concepts, self.n_active, self.steps = n_concepts, n_active, steps
        self.batch_size, self.learning_rate, self.random_state = batch_size, learning_rate, random_state

    def fit(self, activations: Activations) -> SAEConcepts:
        """Train it; errors as in `KMeansConcepts.fit`, but up to n concepts."""
        a = torch.from_numpy(fitting_matrix(activations, self.n_concepts, overcomplete=True))
        active = -(-self.n_concepts // 4) if self.n_active is None else self.n_active
        if not 1 <= active <= self.n_concepts:
            raise InputError(f"n_active: got {active}; it must be in 1..{self.n_concepts}, the concepts")
        size = min(self.batch_size, len(a))
        if size < 1 or self.steps < 1 or not self.learning_rate > 0:
            raise InputError(f"steps, batch_size and learning_rate: got {self.steps}, {self.batch_size} and "
                             f"{self.learning_rate}; they must be at least 1, at least 1 and above 0")  # fmt: skip
        mean = a.double().mean(0).to(a)
        scale = float((a - mean).double().square().sum(1).mean().sqrt()) or 1.0
        generator = torch.Generator().manual_seed(self.random_state)
        x = (a - mean) / scale
        network = _Autoencoder(x[torch.randperm(len(x), generator=generator)[: self.n_concepts]], active)
        fit(
            network, x, x, loss=nn.functional.mse_loss, epochs=-(-self.steps // (len(x) // size)), batch_size=size,
            optimizer=torch.optim.Adam(network.parameters(), lr=self.learning_rate), generator=generator,
            on_step=lambda step: network.normalize(),
        )  # fmt: skip
        # In the units of the activations: codes grow by `scale`, the unit rows of the dictionary stay.
        self.n_active_ = active
        self.components_, self.encoder_ = network.dictionary.detach(), network.encoder.detach()
        self.threshold_, self.mean_ = network.threshold.detach() * scale, mean + network.offset.detach() * scale
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """The K largest of the encoder's outputs, where above 0."""
        check_is_fitted(self)
        w, c, b = (part.to(activations) for part in (self.encoder_, self.threshold_, self.mean_))
        return _top((activations - b) @ w.T + c, self.n_active_)

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """The product with the dictionary, and `b`."""
        check_is_fitted(self)
        return codes @ self.components_.to(codes) + self.mean_.to(codes)


class _Autoencoder(nn.Module):
    def __init__(self, rows: Float[Tensor, "k p"], n_active: int) -> None:
        super().__init__()
        self.n_active = n_active
        self.dictionary = nn.Parameter(rows.clone())
        self.normalize()
        self.encoder = nn.Parameter(self.dictionary.detach().clone())
        self.threshold = nn.Parameter(torch.zeros(len(rows), dtype=rows.dtype))
        self.offset = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))

    def forward(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """Activations as the codes write them."""
        codes = _top((x - self.offset) @ self.encoder.T + self.threshold, self.n_active)
        return codes @ self.dictionary + self.offset

    def normalize(self) -> None:
        """Rows of the dictionary back to length 1: or codes would shrink as it grows."""
        with torch.no_grad():
            self.dictionary.copy_(nn.functional.normalize(self.dictionary))


def _top(values: Float[Tensor, "n k"], count: int) -> Float[Tensor, "n k"]:
    """The `count` largest of each row where they are above 0, and 0 elsewhere."""
    kept, where = values.relu().topk(count, dim=1)
    return torch.zeros_like(values).scatter(1, where, kept)
