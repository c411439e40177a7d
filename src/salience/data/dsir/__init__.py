"""DSIR, the paper of three ideas: hashed features, importance weights, resampling."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.data.dsir.features import HashedNgrams, bucket, tokenize
    from salience.data.dsir.resample import gumbel_topk
    from salience.data.dsir.weights import DSIR, kl_reduction

_WHERE = {
    "DSIR": "weights", "kl_reduction": "weights",
    "HashedNgrams": "features", "tokenize": "features", "bucket": "features",
    "gumbel_topk": "resample",
}  # fmt: skip
__all__ = ["DSIR", "HashedNgrams", "bucket", "gumbel_topk", "kl_reduction", "tokenize"]
__getattr__, __dir__ = exports(__name__, _WHERE)
