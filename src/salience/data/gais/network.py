"""The graph attention network: two layers in plain torch, on a list of weighted edges."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, elu, leaky_relu

SLOPE = 0.2  # of the leaky ReLU


class AttentionLayer(nn.Module):
    r"""Graph attention of several heads over weighted edges j -> i.

        e_ij = LeakyReLU_0.2(a^T [W h_i || W h_j]) + log w_ij,     alpha_ij = softmax over j in N(i)
        h_i' = || over heads of sum_j alpha_ij W h_j + b

    Parameters
    ----------
    d_in, d_out : int
        Width before, and of each head after.
    heads : int
        Their outputs are concatenated.
    dropout : float
        Share of the attention weights, and of the inputs, that a training pass leaves out.

    Notes
    -----
    Source: Velickovic et al. 2018 (arXiv 1710.10903), section 2.1; the edge weight in the exponent is reconstructed.
    With weights of 1 it is `GATConv` of PyTorch Geometric.
    """

    def __init__(self, d_in: int, d_out: int, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.d_out, self.dropout = heads, d_out, dropout
        self.linear = nn.Linear(d_in, heads * d_out, bias=False)
        self.of_target = nn.Parameter(torch.empty(heads, d_out))  # the half of a that meets W h_i
        self.of_source = nn.Parameter(torch.empty(heads, d_out))  # and the half that meets W h_j
        self.bias = nn.Parameter(torch.zeros(heads * d_out))
        for weight in (self.linear.weight, self.of_target, self.of_source):
            nn.init.xavier_uniform_(weight)

    def forward(
        self, h: Float[Tensor, "n d"], edge_index: Int[Tensor, "2 e"], edge_weight: Float[Tensor, " e"]
    ) -> tuple[Float[Tensor, "n out"], Float[Tensor, "e heads"]]:
        """New node states, and the attention of every edge.

        Parameters
        ----------
        h : (n, d_in)
        edge_index : (2, e) int64
            Row 0 holds the source j, row 1 the target i; every node needs its self loop.
        edge_weight : (e,)
            Positive.

        Returns
        -------
        (n, heads * d_out), (e, heads)
            The attention sums to 1 over the edges into a node, before dropout.
        """
        source, target = edge_index
        z = self.linear(dropout(h, self.dropout, self.training)).view(len(h), self.heads, self.d_out)
        e = (z * self.of_target).sum(-1)[target] + (z * self.of_source).sum(-1)[source]
        alpha = _softmax(leaky_relu(e, SLOPE) + edge_weight.log()[:, None], target, len(h))
        kept = dropout(alpha, self.dropout, self.training)
        out = torch.zeros_like(z).index_add(0, target, kept[..., None] * z[source])
        return out.flatten(1) + self.bias, alpha


class GraphAttention(nn.Module):
    """Graph attention layers with ELU between them, and one head at the end that gives a logit per class.

    Parameters
    ----------
    n_features, n_classes : int
    hidden, heads : int
        Width of a head, and their number, in every layer but the last.
    layers : int
        The last one included.
    dropout : float

    Notes
    -----
    Sizes are reconstructed: the paper's section on the network could not be read.
    """

    def __init__(
        self, n_features: int, n_classes: int, *, hidden: int = 32, heads: int = 4, layers: int = 2,
        dropout: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [n_features, *[hidden * heads] * (layers - 1)]
        self.layers = nn.ModuleList(AttentionLayer(before, hidden, heads, dropout) for before, _ in pairwise(widths))
        self.layers.append(AttentionLayer(widths[-1], n_classes, 1, dropout))

    def forward(
        self, x: Float[Tensor, "n d"], edge_index: Int[Tensor, "2 e"], edge_weight: Float[Tensor, " e"]
    ) -> tuple[Float[Tensor, "n classes"], list[Float[Tensor, "e _"]]]:
        """Logits of every node, and the attention of every edge by layer.

        Parameters
        ----------
        x : (n, n_features)
        edge_index : (2, e) int64
        edge_weight : (e,)

        Returns
        -------
        (n, n_classes), list of (e, heads)
        """
        alphas: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x, alpha = layer(elu(x) if number else x, edge_index, edge_weight)
            alphas.append(alpha)
        return x, alphas


def received_attention(
    alphas: list[Float[Tensor, "e _"]], edge_index: Int[Tensor, "2 e"], n: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    r"""Attention that a node receives from its neighbours, against what equal attention would give.

        A_j = mean over layers, heads and edges j -> i, i != j, of alpha_ij |N(i)|

    1 is neutral: a node in small neighbourhoods has no advantage. |N(i)| counts the self loop.

    Returns
    -------
    (n,), (n,)
        The sum over the edges, and their number; 0 edges leave a node without a value.
    """
    source, target = edge_index
    degree = torch.bincount(target, minlength=n)
    mean = torch.stack([alpha.mean(1) for alpha in alphas]).mean(0) * degree[target]
    other = source != target
    total = torch.zeros(n, dtype=torch.float64, device=mean.device).index_add(0, source[other], mean[other].double())
    return total, torch.bincount(source[other], minlength=n).double()


def _softmax(e: Float[Tensor, "e heads"], target: Int[Tensor, " e"], n: int) -> Float[Tensor, "e heads"]:
    """Softmax over the edges into each node."""
    highest = torch.full((n, e.shape[1]), -torch.inf, dtype=e.dtype, device=e.device)
    highest = highest.scatter_reduce(0, target[:, None].expand_as(e), e.detach(), "amax")
    exponentials = (e - highest[target]).exp()
    return exponentials / torch.zeros_like(highest).index_add(0, target, exponentials)[target]
