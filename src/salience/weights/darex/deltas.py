"""Drop entries of a delta: at random with rescaling (DARE), by importance, by whole input columns."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from salience.errors import DataError, InputError

HEADS = ("classifier", "lm_head", "score")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
BLOCK = 1 << 18  # entries of one draw of a mask: 1 MB in float32, which stays in a core's cache
_LAYERS = ("self_attn", "attn", "attention", "mlp", "block_sparse_moe", "feed_forward")


def dare(
    delta: Float[Tensor, "*shape"],
    p: float,
    *,
    q: float | None = None,
    generator: torch.Generator | None = None,
    dim: int | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop entries of a delta at random and divide the others by `q`.

        D' = m * D / q,   m ~ Bernoulli(1 - p) per entry

    ``q = 1 - p`` is DARE, which keeps the mean of every output and lets its spread grow by ``1 / (1 - p)``; a larger
    q trades some of the mean for less spread (DAREx-q).

    Parameters
    ----------
    delta : Tensor
        Fine-tuned minus pre-trained weights; computed in float32 at least, returned in its own dtype.
    p : float in [0, 1)
        Share of entries to drop; 0 returns the delta divided by q.
    q : float, optional
        What the kept entries are divided by; `1 - p` by default.
    generator : torch.Generator, optional
        On the CPU; torch's global one by default.
    dim : int, optional
        Drop whole slices along this axis instead: the input columns of a weight (out, in) with ``dim=1``.

    Raises
    ------
    InputError
        p outside [0, 1), q not positive, a delta that is not floating-point.
    DataError
        The delta is not finite.

    References
    ----------
    Yu et al., arXiv 2311.03099 (DARE); Deng et al., arXiv 2410.09344, sections 2 and 4.1, structural in 4.4.
    """
    q = check_rates(p, q)
    if not delta.is_floating_point():
        raise InputError(f"delta: has dtype {delta.dtype}; dequantise integer weights before taking their difference")
    if not torch.isfinite(delta).all():
        raise DataError("delta: holds NaN or infinite entries")
    seed = int(torch.randint(2**62, (), generator=generator))
    mask = keep_mask(seed, "", delta.shape, 1 - p, dim).to(delta.device)
    wide = delta if delta.dtype == torch.float64 else delta.float()
    return (wide.where(mask, 0) / q).to(delta.dtype)


def importance_delta(
    delta: Float[Tensor, "*shape"], rate: float, *, act_norm: Float[Tensor, " in"] | None = None
) -> Float[Tensor, "*shape"]:
    """Keep the most important entries of a delta, without rescaling.

    Magnitude pruning keeps the largest ``|D|`` of the tensor; with `act_norm` the largest
    ``|D_ij| * ||x_j||`` of every output row are kept (WANDA).

    Parameters
    ----------
    delta : Tensor
        For WANDA a weight (out, in).
    rate : float in [0, 1)
        Share to drop; of n entries ``round((1 - rate) n)`` are kept, at least one.
    act_norm : Tensor (in,), optional
        Euclidean norm over the calibration tokens of each input.

    Raises
    ------
    InputError
        `rate` outside [0, 1), or shapes that do not fit.
    """
    check_rates(rate, None)
    if act_norm is not None and (delta.ndim != 2 or act_norm.shape != delta.shape[1:]):
        raise InputError(f"act_norm: has shape {tuple(act_norm.shape)}; a delta {tuple(delta.shape)} needs (in,)")
    size = delta.abs().float()
    size = size.reshape(1, -1) if act_norm is None else size * act_norm.float()
    if not size.numel():
        return delta.clone()
    keep = max(1, round((1 - rate) * size.shape[1]))
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter_(1, size.topk(keep, dim=1).indices, True)
    return delta.where(chosen.view(delta.shape), 0)


def lora_deltas(
    state: Mapping[str, Tensor], alpha: float, rank: int | None = None, *, fan_in_fan_out: bool = False
) -> dict[str, Tensor]:
    """Deltas of the weights that a LoRA adapter changes: ``D = (alpha / r) B A``.

    Parameters
    ----------
    state : mapping of str to Tensor
        The adapter's tensors as `peft` names them: ``….lora_A.weight`` (r, in) and ``….lora_B.weight`` (out, r).
    alpha : float
        `lora_alpha` of its configuration.
    rank : int, optional
        r; by default that of each A, as they are stored.
    fan_in_fan_out : bool
        The base layers keep their weight as (in, out), as GPT-2 does.

    Returns
    -------
    dict of str to Tensor
        By the name of the weight in the base model, in float32.

    Raises
    ------
    InputError
        There is no pair, or an A without its B.
    """
    deltas = {}
    for name, a in state.items():
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        if other not in state:
            raise InputError(f"state: {name!r} has no {other!r} beside it")
        b = state[other]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"state: {name!r} {tuple(a.shape)} and {other!r} {tuple(b.shape)} do not multiply")
        delta = (alpha / (rank or a.shape[0])) * (b.float() @ a.float())
        layer = name.split(".lora_A.")[0].removeprefix("base_model.model.")
        deltas[f"{layer}.weight"] = delta.T.contiguous() if fan_in_fan_out else delta
    if not deltas:
        raise InputError("state: holds no tensor with .lora_A. in its name; give an adapter's tensors")
    return deltas


def prunable(names: Iterable[str], *, decoder: bool, exclude: Sequence[str] = HEADS) -> list[str]:
    """Names of the tensors whose delta is pruned; the others stay as fine-tuned.

    Of an encoder these are all parameters but the head, of a decoder those of attention and feed-forward layers.
    Running statistics are no parameters and are left alone: a rescaled variance could be negative.

    Parameters
    ----------
    names : iterable of str
    decoder : bool
        A causal language model.
    exclude : sequence of str
        Patterns of whole names, or parts of a dotted name.
    """

    def inside(name: str) -> bool:
        parts = name.split(".")
        out = parts[-1] in BUFFERS or any(each in parts or fnmatch.fnmatchcase(name, each) for each in exclude)
        return not out and (not decoder or any(part in parts for part in _LAYERS))

    return [name for name in names if inside(name)]


def check_rates(p: float, q: float | None) -> float:
    """Check a drop rate and a divisor; gives the divisor, ``1 - p`` where there is none."""
    if not 0 <= p < 1:
        raise InputError(f"p: got {p!r}; the share to drop must be at least 0 and below 1")
    if q is None:
        return 1 - p
    if not (math.isfinite(q) and q > 0):
        raise InputError(f"q: got {q!r}; it must be positive, usually between 1 - p = {1 - p:g} and 1")
    if q < 1 - p - 1e-9:
        warnings.warn(f"q: {q:g} is below 1 - p = {1 - p:g}, which enlarges mean and spread alike", stacklevel=3)
    return q


def mask_seed(random_state: int, *use: int) -> int:
    """The seed of the masks of one use: 0 what is written, (1, n) the n-th mask that q is chosen on.

    Of a merge, model i adds its number. Seeds of different uses, and of different random states, share no mask.
    """
    if random_state < 0:
        raise InputError(f"seed: got {random_state}; it must be at least 0")
    return int(np.random.SeedSequence([random_state, *use]).generate_state(1, np.uint64)[0])


def keep_mask(
    seed: int, name: str, shape: Sequence[int], keep: float, dim: int | None = None
) -> Bool[Tensor, "*shape"]:
    """Which entries of the tensor called `name` are kept; each is drawn from (seed, name, index) alone.

    Parameters
    ----------
    seed : int
    name : str
    shape : sequence of int
    keep : float
        Probability of each entry, or of each slice along `dim`.
    """
    if dim is not None and len(shape):
        slices = keep_mask(seed, name, [shape[dim]], keep)
        sizes = [shape[dim] if axis == dim % len(shape) else 1 for axis in range(len(shape))]
        return slices.view(sizes).expand(tuple(shape))
    count = math.prod(shape)
    parts = [keep_block(seed, name, at // BLOCK, min(BLOCK, count - at), keep) for at in range(0, count, BLOCK)]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=bool)
    return torch.from_numpy(flat).view(tuple(shape))


def keep_block(seed: int, name: str, block: int, count: int, keep: float) -> Shaped[np.ndarray, " count"]:
    """The mask of the entries ``block * BLOCK`` and following, `count` of them at most BLOCK."""
    digest = xxhash.xxh3_64_intdigest(name.encode())
    stream = np.random.SFC64(np.random.SeedSequence([seed, digest, block]))
    draws = stream.random_raw(-(-count // 8)).view(np.uint8)[:count]
    # 8 bits an entry are quick to draw; the 1 in 256 that falls on the threshold itself is decided by a draw of its
    # own, so that the probability is `keep` to double precision.
    whole, rest = divmod(keep * 256, 1)
    if whole >= 256:
        return np.ones(count, dtype=bool)
    mask = draws < np.uint8(whole)
    ties = np.flatnonzero(draws == np.uint8(whole))
    mask[ties] = np.random.default_rng([seed, digest, block, 1]).random(len(ties)) < rest
    return mask
