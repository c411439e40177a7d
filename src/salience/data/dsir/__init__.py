"""DSIR, the paper of three ideas: hashed features, importance weights, resampling."""

from salience._lazy import exports

_WHERE = {
    "DSIR": "weights", "kl_reduction": "weights",
    "HashedNgrams": "features", "tokenize": "features", "bucket": "features",
    "gumbel_topk": "resample",
}  # fmt: skip
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
