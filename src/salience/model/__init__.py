"""Read, observe, cut, batch, fit and rewrite models."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.model.at import capture, eager_attention, layer, logits_of, replace, run, training_mode
    from salience.model.batches import map_batches
    from salience.model.channels import ChannelGroup, ChannelMap, channel_groups
    from salience.model.fitting import History, fit
    from salience.model.flops import layer_flops
    from salience.model.images import ImageSet, read_images
    from salience.model.loading import Loaded, load
    from salience.model.safe import check_directory
    from salience.model.saving import save_narrowed
    from salience.model.shards import TensorStore, rewrite
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
    "ChannelGroup": "channels",
    "ChannelMap": "channels",
    "channel_groups": "channels",
    "layer_flops": "flops",
    "save_narrowed": "saving",
    "rewrite": "shards",
    "TensorStore": "shards",
    "span_log_probs": "text",
    "embed": "text",
}
__all__ = [
    "ChannelGroup",
    "ChannelMap",
    "History",
    "ImageSet",
    "Loaded",
    "Split",
    "TensorStore",
    "capture",
    "channel_groups",
    "check_directory",
    "eager_attention",
    "embed",
    "fit",
    "layer",
    "layer_flops",
    "load",
    "logits_of",
    "map_batches",
    "read_images",
    "replace",
    "rewrite",
    "run",
    "save_narrowed",
    "span_log_probs",
    "training_mode",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
