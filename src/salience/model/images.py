"""Pictures as a model takes them: from a folder, from files, or from Parquet in the Hugging Face image layout."""

from __future__ import annotations

import glob as globbing
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from salience.errors import DataError, InputError, NothingToDo

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NO_LABEL = -1


class _Entry(NamedTuple):
    """A picture: a file of its own, or (group, row) of a Parquet file."""

    file: Path
    group: int | None = None
    row: int = 0
    number: int = 0  # of the row in its file

    def __str__(self) -> str:
        return str(self.file) if self.group is None else f"{self.file}, row {self.number}"


class ImageSet(Dataset):
    """Pictures that are decoded when they are asked for; made by `read_images`.

    An item is ``(pixel_values, label)``: a float32 tensor (channel, height, width) ready for the model, and the
    class, -1 where there are none.

    Attributes
    ----------
    ids : list of str
        A name for each picture: its path within the folder, or its path or row in the Parquet file.
    labels : Tensor of int64 (n,) or None
    class_names : list of str or None
        Name of each class, where the source tells them.
    """

    def __init__(
        self,
        entries: Sequence[_Entry],
        ids: list[str],
        labels: Int[Tensor, " n"] | None,
        class_names: list[str] | None,
        processor: Any,
        size: tuple[int, int] | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> None:
        self._entries = entries
        self.ids, self.labels, self.class_names = ids, labels, class_names
        self._processor, self._size, self._mean, self._std = processor, size, mean, std
        self._held: tuple[tuple[Path, int], pa.ChunkedArray] | None = None  # the row group read last

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> tuple[Float[Tensor, "channel height width"], int]:
        label = NO_LABEL if self.labels is None else int(self.labels[i])
        if self._processor is not None:
            return self._processed(i), label
        return self.pixel_values(self.picture(i)), label

    def pixel_values(self, picture: UInt8[np.ndarray, "height width channel"]) -> Float[Tensor, "channel height width"]:
        """What the model takes, of a picture as `picture` gives it, that may have been changed meanwhile."""
        if self._processor is not None:
            image = Image.fromarray(picture)
            return self._processor(images=image, return_tensors="pt", do_resize=False,
                                   do_center_crop=False)["pixel_values"][0].float()  # fmt: skip
        pixels = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)
        if self._mean is not None and self._std is not None:
            pixels = (pixels - torch.tensor(self._mean)[:, None, None]) / torch.tensor(self._std)[:, None, None]
        return pixels.contiguous()

    def picture(self, i: int) -> UInt8[np.ndarray, "height width channel"]:
        """Picture `i` as the model sees it, resized and cropped but not normalised: to look at."""
        if self._processor is not None:
            raw = self._processed(i, do_normalize=False, do_rescale=False)
            return raw.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
        image = self._decoded(i)
        if self._size is not None:
            height, width = self._size
            if image.size != (width, height):
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        elif image.size != (first := self._first_size()):
            raise DataError(
                f"{self._entries[i]}: is {image.width} x {image.height} pixels, the first picture {first[0]} x "
                f"{first[1]}; give the size that the model takes"
            )
        pixels = np.array(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _first_size(self) -> tuple[int, int]:
        if not hasattr(self, "_first"):
            self._first = self._decoded(0).size
        return self._first

    def _processed(self, i: int, **changes: Any) -> Tensor:
        pixels = self._processor(images=self._decoded(i), return_tensors="pt", **changes)["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            raise InputError(
                f"processor: {type(self._processor).__name__} gives shape {tuple(pixels.shape)} for one picture; "
                "it must be one of classification models, (1, channel, height, width)"
            )
        return pixels[0].float()

    def _decoded(self, i: int) -> Image.Image:
        entry = self._entries[i]
        mode = "L" if self._mean is not None and len(self._mean) == 1 else "RGB"
        try:
            with warnings.catch_warnings():  # a picture past Pillow's limit of pixels may be made to exhaust memory
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(entry.file if entry.group is None else io.BytesIO(self._bytes(entry))) as image:
                    if image.mode.startswith(("I", "F")):
                        raise ValueError(f"has pixels of mode {image.mode}; save it with 8 bits a channel")
                    return ImageOps.exif_transpose(image).convert(mode)
        except DataError:
            raise
        except Exception as error:  # what a broken file raises is up to each decoder
            raise DataError(f"{entry}: no readable picture: {error}") from error

    def _bytes(self, entry: _Entry) -> bytes:
        key = (entry.file, entry.group or 0)
        if self._held is None or self._held[0] != key:
            group = _opened(entry.file).read_row_group(key[1], columns=["image.bytes"])
            self._held = key, pa.chunked_array([chunk.field("bytes") for chunk in group.column("image").chunks])
        content = self._held[1][entry.row].as_py()
        if content is None:
            raise DataError(f"{entry}: has no bytes in column 'image'; pictures that stand elsewhere are not fetched")
        return content


def read_images(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    processor: Any = None,
    *,
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Open pictures for a model; they are decoded one by one, when they are asked for.

    Parameters
    ----------
    source : path, glob, or a list of them
        A folder, whose sub-folders are classes if it has any; image files; or ``.parquet`` files in the Hugging
        Face image layout: a column `image` with the fields `bytes` and `path`, and perhaps a column `label`.
    processor : transformers image processor, optional
        As `salience.model.load` returns it: it resizes, crops and normalises.
    size : int or (height, width), optional
        Without a processor: pictures are scaled to cover this size and cut to it around the centre. By default
        they are taken as they are, and must be equal in size.
    mean, std : sequence of float, optional
        Without a processor: per channel of values in 0..1; ``(pixel - mean) / std``. With a single number the
        pictures are read in grey, else in RGB.
    limit : int, optional
        Take at most this many, evenly spread over the source (and so over its classes).

    Returns
    -------
    ImageSet

    Raises
    ------
    InputError
        A path that does not exist, files of different kinds, or an option out of range.
    DataError
        A Parquet file without the columns, or a label missing. A picture that cannot be read is named, with file
        and row, when it is asked for.
    NothingToDo
        There is no picture.
    """
    if processor is not None:
        if size is not None or mean is not None or std is not None:
            raise InputError("processor: it brings size, mean and std of its own; leave them out")
        processor = getattr(processor, "image_processor", processor)
        if not callable(processor):
            raise InputError(f"processor: got {type(processor).__name__}; give a transformers image processor")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit: got {limit!r}; it must be an integer of at least 1")
    sizes, means, deviations = _size(size), *_normalisation(mean, std)
    files, root = _files(source)
    if not files:
        raise NothingToDo(f"images: {source} holds no picture ({', '.join(ENDINGS)}) and no .parquet file")
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if tables and len(tables) < len(files):
        other = next(file for file in files if file not in tables)
        raise InputError(f"images: give pictures or Parquet files, not both; got {tables[0]} and {other}")
    entries, ids, labels, names = _from_parquet(tables, root) if tables else _from_files(files, root)
    if not entries:
        raise NothingToDo(f"images: there is no row in {tables[0]}")
    if limit is not None and limit < len(entries):
        chosen = np.linspace(0, len(entries) - 1, limit).round().astype(int)
        entries, ids = [entries[i] for i in chosen], [ids[i] for i in chosen]
        labels = None if labels is None else labels[chosen]
    tensor = None if labels is None else torch.from_numpy(labels)
    return ImageSet(entries, ids, tensor, names, processor, sizes, means, deviations)


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise InputError(f"size: got {size!r}; it must be a number of pixels or (height, width)")
    return pair


def _normalisation(mean: Any, std: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None or len(mean) != len(std) or len(mean) not in (1, 3):
        raise InputError(f"mean and std: give both, with 1 number (grey) or 3 (RGB) each; got {mean!r} and {std!r}")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and min(std) > 0):
        raise InputError(f"mean and std: must be finite and std above 0; got {mean!r} and {std!r}")
    return tuple(map(float, mean)), tuple(map(float, std))


def _files(source: Any) -> tuple[list[Path], Path]:
    """Files of a source, and the folder that their names are relative to."""
    items = list(source) if isinstance(source, list | tuple) else [source]
    files: list[Path] = []
    for item in items:
        path = Path(os.path.abspath(os.fspath(item)))
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if _wanted(file, path))
        elif path.exists():
            if path.suffix.lower() not in (*ENDINGS, ".parquet"):
                raise InputError(f"images: {item} has an unknown ending; known: {', '.join(ENDINGS)}, .parquet")
            files.append(path)
        else:
            found = sorted(Path(os.path.abspath(match)) for match in globbing.glob(os.fspath(item), recursive=True))
            if not found:
                raise InputError(
                    f"images: {item} {'matches no file' if globbing.has_magic(os.fspath(item)) else 'does not exist'}"
                )
            files += [file for file in found if file.is_file() and _wanted(file, file.parent)]
    files = list(dict.fromkeys(files))
    if len(items) == 1 and os.path.isdir(items[0]):
        return files, Path(os.path.abspath(items[0]))
    return files, Path(os.path.commonpath([file.parent for file in files])) if files else Path()


def _wanted(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.suffix.lower() in (*ENDINGS, ".parquet") and file.is_file()


_Read = tuple[list[_Entry], list[str], "np.ndarray | None", "list[str] | None"]


def _from_files(files: list[Path], root: Path) -> _Read:
    relative = [file.relative_to(root) for file in files]
    entries, ids = [_Entry(file) for file in files], [path.as_posix() for path in relative]
    loose = [path for path in relative if len(path.parts) == 1]
    if len(loose) == len(files):
        return entries, ids, None, None
    if loose:
        raise InputError(f"images: {root} holds pictures beside its sub-folders, such as {loose[0]}; sub-folders are "
                         "classes, so put each picture in one, or none")  # fmt: skip
    names, labels = np.unique([path.parts[0] for path in relative], return_inverse=True)
    return entries, ids, labels.astype(np.int64), names.tolist()


def _from_parquet(files: list[Path], root: Path) -> _Read:
    entries: list[_Entry] = []
    paths: list[str | None] = []
    labels: list[np.ndarray] = []
    names: list[str] | None = None
    for file in files:
        opened = _opened(file)
        schema = opened.schema_arrow
        kind = schema.field("image").type if "image" in schema.names else None
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise DataError(f"{file}: needs a column 'image' with a field 'bytes' (Hugging Face image layout); "
                            f"it has {', '.join(f'{f.name}: {f.type}' for f in schema)}")  # fmt: skip
        number = 0
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            entries += [_Entry(file, group, row, number + row) for row in range(rows)]
            number += rows
        if kind.get_field_index("path") >= 0:
            column = opened.read(columns=["image.path"]).column("image").combine_chunks()
            paths += column.field("path").to_pylist()
        if "label" in schema.names:
            labels.append(_labels(file, opened.read(columns=["label"]).column("label")))
            names = names or _names(schema)
    if labels and sum(map(len, labels)) != len(entries):
        raise DataError(f"{files[0].parent}: some of the Parquet files have a column 'label' and some have none")
    if len(paths) == len(entries) == len(set(paths)) and None not in paths:
        ids = [str(path) for path in paths]
    else:
        ids = [f"{entry.file.relative_to(root).as_posix()}:{entry.number}" for entry in entries]
    return entries, ids, np.concatenate(labels) if labels else None, names


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {error}") from error


def _labels(file: Path, column: pa.ChunkedArray) -> np.ndarray:
    if not pa.types.is_integer(column.type):
        raise DataError(f"{file}: column 'label' holds {column.type}; it must hold whole numbers")
    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise DataError(f"{file}, row {row}: has no label; {column.null_count} rows have none")
    return column.to_numpy().astype(np.int64)


def _names(schema: pa.Schema) -> list[str] | None:
    """Class names as `datasets` writes them into the schema."""
    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])
        names = written["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
