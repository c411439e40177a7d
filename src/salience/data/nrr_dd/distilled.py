"""The result: images as files of 8 bits a channel, and beside them what the teacher says of their views."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from salience.data.nrr_dd.labels import DBRLabels, HardLabels, SoftLabels
from salience.data.nrr_dd.views import Views
from salience.errors import DataError, InputError

Labels = DBRLabels | SoftLabels | HardLabels
_KINDS: dict[type, Literal["dbr", "soft", "hard"]] = {DBRLabels: "dbr", SoftLabels: "soft", HardLabels: "hard"}


@dataclass(frozen=True)
class DistilledSet:
    """Distilled images with their labels: all that a student needs.

    Parameters
    ----------
    x : (n, channel, height, width) Tensor
        Normalised by `mean` and `std`, and one of the 256 values of a file in every channel.
    y : (n,) int Tensor
    labels : DBRLabels, SoftLabels or HardLabels
        Pass them to `train_student`.
    mean, std : tuple of float
        Per channel, of values in 0..1.
    class_names : tuple of str
        Of the labels 0, 1, …
    """

    x: Float[Tensor, "n channel height width"]
    y: Int[Tensor, " n"]
    labels: Labels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``images/CLASS/NUMBER.png``, ``labels.safetensors`` and ``set.json`` into a folder that is there.

        `read_images` reads the pictures and their classes by itself; `load` reads everything.
        """
        root, files = Path(folder), self.files()
        for name, picture in zip(files, pictures(self.x, self.mean, self.std), strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(root / name)
        labels, tensors = self.labels, {}
        settings: dict[str, Any] = {"kind": _KINDS[type(labels)]}
        if isinstance(labels, DBRLabels):
            tensors = {"d_org": labels.d_org, "d_aug": labels.d_aug}
            settings |= {"classes": labels.classes, "alpha": labels.alpha, "p": labels.p}
        elif isinstance(labels, SoftLabels):
            tensors, settings = {"q": labels.q}, settings | {"temperature": labels.temperature}
        else:
            settings |= {"classes": labels.classes}
        save_file({name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()},
                  root / "labels.safetensors")  # fmt: skip
        record = {
            "mean": self.mean, "std": self.std, "class_names": self.class_names, "labels": settings,
            "views": asdict(labels.views), "files": files, "y": self.y.tolist(),
        }  # fmt: skip
        (root / "set.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> DistilledSet:
        """Read what `save` wrote; the images come back bit for bit.

        Raises
        ------
        InputError
            No such folder.
        DataError
            A file is missing or not what `save` writes; it is named.
        """
        root = Path(folder)
        if not (root / "set.json").is_file():
            raise InputError(f"distilled set: {root} holds no set.json")
        try:
            record = json.loads((root / "set.json").read_text(encoding="utf-8"))
            names = [root / name for name in record["files"]]
            if any(root.resolve() not in name.resolve().parents for name in names):
                raise ValueError("a name in `files` leads out of the folder")
            mean, std = tuple(record["mean"]), tuple(record["std"])
            stored = load_file(root / "labels.safetensors")
            settings = dict(record["labels"])
            views = Views(**record["views"] | {"seeds": tuple(record["views"]["seeds"])})
            kind = {name: one for one, name in _KINDS.items()}[settings.pop("kind")]
            labels = kind(views=views, **stored, **settings)
            x = normalised(np.stack([_pixels(name) for name in names]), mean, std)
            y = torch.tensor(record["y"])
            if any(len(one) != len(x) for one in (y, *stored.values())):
                raise ValueError("labels and images differ in number")
            return cls(x, y, labels, mean, std, tuple(record["class_names"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{root} is no distilled set that can be read: {error}") from error

    def files(self) -> list[str]:
        """Name of each image: its class, and its number among those of the class."""
        seen: dict[int, int] = {}
        names = []
        for label in self.y.tolist():
            seen[label] = seen.get(label, -1) + 1
            names.append(f"images/{_folder(self.class_names[label])}/{seen[label]:04d}.png")
        return names


def on_grid(
    x: Float[Tensor, "n channel height width"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "n channel height width"]:
    """The nearest images that a file of 8 bits a channel holds."""
    return normalised(pictures(x, mean, std), mean, std).to(x)


def pictures(
    x: Float[Tensor, "n channel height width"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "n height width channel"]:
    """Pixels from 0 to 255 of normalised images."""
    shift, scale = (torch.tensor(values)[:, None, None].to(x) for values in (mean, std))
    raw = ((x * scale + shift) * 255).round().clamp(0, 255)
    return raw.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def normalised(
    pixels: UInt8[np.ndarray, "n height width channel"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "n channel height width"]:
    """Images as a network takes them, by the formula of `read_images`."""
    raw = torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)
    return ((raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()


def _pixels(file: Path) -> UInt8[np.ndarray, "height width channel"]:
    with Image.open(file) as image:
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"{file} has mode {image.mode}")
        pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _folder(name: str) -> str:
    """A class's name as that of a folder."""
    return "".join(c if c.isalnum() or c in " -_.,()" else "_" for c in name).strip(" .") or "_"
