"""Train the graph attention network batch by batch, and read confidence and attention from it."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from salience.data.gais.edges import Graph, GraphBatch
from salience.data.gais.network import GraphAttention, received_attention
from salience.model.at import training_mode

_PATIENCE = 15
_HELD = 0.2  # share of the rows that decide when to stop


class Read(NamedTuple):
    """What a network says of every row, averaged over rounds.

    Attributes
    ----------
    attention : (n,) float64
        Attention received; NaN for rows that are nobody's neighbour.
    confidence : (n,) float64
        Probability of the row's own label, or the largest of any class.
    edges : float
        Mean number of edges into a row, without self loops.
    isolated : float
        Share of rows without any.
    """

    attention: Float[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    edges: float
    isolated: float


def train(
    model: GraphAttention, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], graph: Graph, *, epochs: int, rounds: int,
    lr: float, seed: int,
) -> list[float]:  # fmt: skip
    """Train by class-balanced cross-entropy on 80 % of the rows, until the loss on the others falls no more.

        L = sum_i v_{y_i} CE(f(i), y_i) / sum_i v_{y_i},      v_c = n / (C n_c)

    One step of Adam (weight decay 5e-4) per batch; epoch t goes through round ``t mod rounds`` of the graph. The
    weights of the epoch with the least held-out loss are kept; 15 epochs without a lower one end the training.

    Parameters
    ----------
    model : GraphAttention
        Trained in place.
    x, y : (n, d), (n,)
    graph : Graph
    epochs, rounds : int
    lr : float
    seed : int
        Of the split and of dropout.

    Returns
    -------
    list of float
        Held-out loss after every epoch.

    Notes
    -----
    All numbers are reconstructed.
    """
    learn = _split(y.cpu().numpy(), np.random.default_rng(seed))
    held = learn if learn.all() else ~learn  # classes too small to hold a row out
    counts = torch.bincount(y).clamp(min=1)
    balance = (len(y) / (len(counts) * counts)).to(x.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=5e-4)
    losses: list[float] = []
    best, kept = np.inf, deepcopy(model.state_dict())
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), training_mode(model, True):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            for batch in graph.batches(epoch % rounds):
                if not learn[batch.rows].any():
                    continue
                loss, _ = _loss(model, batch, x, y, learn, balance)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            losses.append(_held_loss(model, graph, epoch % rounds, x, y, held, balance))
            if losses[-1] < best:
                best, kept = losses[-1], deepcopy(model.state_dict())
            elif epoch - int(np.argmin(losses)) >= _PATIENCE:
                break
    model.load_state_dict(kept)
    return losses


def read(
    model: GraphAttention, x: Float[Tensor, "n d"], graph: Graph, *, rounds: int, y: Int[Tensor, " n"] | None = None
) -> Read:
    """Confidence and attention received of every row, over all batches of all rounds.

    Parameters
    ----------
    model : GraphAttention
    x : (n, d)
    graph : Graph
    rounds : int
    y : (n,), optional
        Labels whose probability is the confidence; without them it is the largest probability.

    Returns
    -------
    Read
    """
    n = len(x)
    total, times, confidence = np.zeros(n), np.zeros(n), np.zeros(n)
    edges, isolated = 0, 0
    with training_mode(model, False), torch.no_grad():
        for number in range(rounds):
            for batch in graph.batches(number):
                logits, alphas, index = _forward(model, batch, x)
                received, received_times = received_attention(alphas, index, len(batch.rows))
                total[batch.rows] += received.cpu().numpy()
                times[batch.rows] += received_times.cpu().numpy()
                p = torch.softmax(logits, 1)
                sure = p.amax(1) if y is None else p.gather(1, y[torch.from_numpy(batch.rows).to(y.device), None])[:, 0]
                confidence[batch.rows] += sure.double().cpu().numpy()
                inward = np.bincount(batch.edges.index[1], minlength=len(batch.rows)) - 1
                edges, isolated = edges + int(inward.sum()), isolated + int((inward == 0).sum())
    attention = np.divide(total, times, out=np.full(n, np.nan), where=times > 0)
    return Read(attention, confidence / rounds, edges / (n * rounds), isolated / (n * rounds))


def _forward(
    model: GraphAttention, batch: GraphBatch, x: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "m classes"], list[Float[Tensor, "e _"]], Int[Tensor, "2 e"]]:
    index = torch.from_numpy(batch.edges.index).to(x.device)
    rows = torch.from_numpy(batch.rows).to(x.device)
    logits, alphas = model(x[rows], index, torch.from_numpy(batch.edges.weight).to(x.device))
    return logits, alphas, index


def _loss(
    model: GraphAttention, batch: GraphBatch, x: Tensor, y: Tensor, which: Bool[np.ndarray, " n"], balance: Tensor
) -> tuple[Float[Tensor, ""], float]:
    """Class-balanced loss of the rows of a batch that count, and the sum of their weights."""
    logits, _, _ = _forward(model, batch, x)
    at = torch.from_numpy(np.flatnonzero(which[batch.rows])).to(x.device)
    targets = y[torch.from_numpy(batch.rows).to(x.device)][at]
    return cross_entropy(logits[at], targets, weight=balance), float(balance[targets].sum())


def _held_loss(
    model: GraphAttention, graph: Graph, number: int, x: Tensor, y: Tensor, held: Bool[np.ndarray, " n"],
    balance: Tensor,
) -> float:  # fmt: skip
    total, weights = 0.0, 0.0
    with training_mode(model, False), torch.no_grad():
        for batch in graph.batches(number):
            if held[batch.rows].any():
                loss, weight = _loss(model, batch, x, y, held, balance)
                total, weights = total + float(loss) * weight, weights + weight
    return total / weights


def _split(y: Int[np.ndarray, " n"], rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """True for the rows that are learnt from: four in five of each class, and never none."""
    order = np.lexsort((rng.random(len(y)), y))
    sizes = np.bincount(y)
    place = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    learn = np.empty(len(y), dtype=bool)
    learn[order] = place >= np.floor(_HELD * sizes)[y[order]]
    return learn
