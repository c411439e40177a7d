"""Read, observe, cut, batch, fit and rewrite models."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.model.at import capture, eager_attention, layer, logits_of, replace, run, training_mode
    from salience.model.batches import map_batches
    from salience.model.fitting import History, fit
    from salience.model.images import ImageSet, read_images
    from salience.model.loading import Loaded, load
    from salience.model.safe import check_directory
    from salience.model.shards import rewrite
    from salience.model.split import Split
    from salience.model.text import embed, span_log_probs

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
    "read_images": "images",
    "ImageSet": "images",
    "fit": "fitting",
    "History": "fitting",
    "rewrite": "shards",
    "span_log_probs": "text",
    "embed": "text",
}
__all__ = [
    "History",
    "ImageSet",
    "Loaded",
    "Split",
    "capture",
    "check_directory",
    "eager_attention",
    "embed",
    "fit",
    "layer",
    "load",
    "logits_of",
    "map_batches",
    "read_images",
    "replace",
    "rewrite",
    "run",
    "span_log_probs",
    "training_mode",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
