"""Read, observe, cut, batch, fit and rewrite models."""

from salience._lazy import exports

# A file never bears the name of something exported: importing the file would put the module in its place.
_WHERE: dict[str, str] = {
    "check_directory": "safe",
    "load": "loading",
    "Loaded": "loading",
    "layer": "at",
    "run": "at",
    "logits_of": "at",
    "capture": "at",
    "replace": "at",
    "training_mode": "at",
    "eager_attention": "at",
    "Split": "split",
    "map_batches": "batches",
    "fit": "fitting",
    "History": "fitting",
    "rewrite": "shards",
    "span_log_probs": "text",
    "embed": "text",
}
__all__ = list(_WHERE)
__getattr__, __dir__ = exports(__name__, _WHERE)
