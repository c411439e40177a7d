"""What the pages of `explain concepts` share, whatever the method: strips of crops, the verdict of classes, bare axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from salience.concepts.craft.explain import ConceptProof


def save_strip(path: Path, cuts: Sequence[np.ndarray], side: int = 64, *, smooth: bool = True) -> None:
    """Write crops (height, width, 1 or 3) side by side, each `side` pixels wide and high."""
    from PIL import Image

    strip = Image.new("RGB", (len(cuts) * (side + 2) - 2, side), "white")
    for place, cut in enumerate(cuts):
        tile = Image.fromarray(cut.repeat(3, 2) if cut.shape[2] == 1 else cut)
        how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        strip.paste(tile.resize((side, side), how), (place * (side + 2), 0))
    strip.save(path)


def class_verdict(report: Any, proofs: Mapping[str, ConceptProof]) -> Any:
    """The block that comes first: in how many classes the order of concepts is better than random ones."""
    better = [name for name, proof in proofs.items() if proof.better]
    good = bool(better) if better or all(proof.better is False for proof in proofs.values()) else None
    label = f"better than random orders in {len(better)} of {len(proofs)} classes"
    if len(proofs) == 1:
        label = {True: "better than random orders", None: "not decided"}.get(good, "no better than random orders here")
    return report.verdict(label, "; ".join(f"{name}: {proof.words}" for name, proof in proofs.items()), good)


def bare(figure: Figure) -> Figure:
    """Take ticks and frames off all axes: they hold pictures."""
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return figure
