"""Pictures from folders, files and Parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from salience.errors import DataError, InputError, NothingToDo
from salience.model import map_batches, read_images


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, rows: list, labels=None, names=None, **options) -> Path:
    columns = {"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, **options)
    return path


@pytest.fixture
def classes(tmp_path):
    for i, name in enumerate(["cat/a.png", "cat/b.png", "dog/deep/c.png", "dog/d.png"]):
        save(tmp_path / "set" / name, pixels(i))
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no picture")
    save(tmp_path / "set" / ".cache" / "e.png", pixels(9))
    return tmp_path / "set"


def test_sub_folders_are_classes(classes):
    images = read_images(classes)
    assert images.ids == ["cat/a.png", "cat/b.png", "dog/d.png", "dog/deep/c.png"]
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    values, label = images[3]
    assert label == 1
    assert torch.equal(values, torch.from_numpy(pixels(2)).permute(2, 0, 1) / 255)
    assert np.array_equal(images.picture(3), pixels(2))


def test_mean_and_std_are_per_channel(classes):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    values, _ = read_images(classes, mean=mean, std=std)[0]
    for channel in range(3):
        wanted = (pixels(0)[..., channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(values[channel], wanted, atol=1e-6)


def test_one_mean_reads_grey(classes):
    images = read_images(classes, mean=[0.0], std=[1.0])
    assert images[0][0].shape == (1, 8, 8)
    assert images.picture(0).shape == (8, 8, 1)


def test_size_covers_and_cuts_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the middle third
    images = read_images(save(tmp_path / "wide.png", wide), size=8)
    assert (images.picture(0) == 255).all()
    assert read_images(tmp_path / "wide.png", size=(4, 6))[0][0].shape == (3, 4, 6)
    assert images.labels is None and images[0][1] == -1


def test_the_camera_turned(tmp_path):
    image = Image.fromarray(pixels(0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to look right
    image.save(tmp_path / "a.png", exif=exif)
    assert read_images(tmp_path / "a.png")[0][0].shape == (3, 4, 8)


def test_a_processor_resizes_and_normalises(classes):
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    images = read_images(classes, processor)
    values, _ = images[1]
    own = processor(images=Image.open(classes / "cat" / "b.png"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(values, own)
    seen = images.picture(1)
    assert seen.shape == (16, 16, 3) and seen.dtype == np.uint8
    np.testing.assert_allclose((torch.from_numpy(seen) / 255 - 0.5).permute(2, 0, 1) / 0.5, values, atol=0.01)


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet(tmp_path, group):
    rows = [{"bytes": png(pixels(i)), "path": f"{i}.png"} for i in range(7)]
    file = parquet(tmp_path / "a.parquet", rows, list(range(7)), [f"c{i}" for i in range(7)], row_group_size=group)
    images = read_images(file)
    assert images.ids == [f"{i}.png" for i in range(7)]
    assert images.class_names == [f"c{i}" for i in range(7)]
    for i in (6, 0, 3):
        assert np.array_equal(images.picture(i), pixels(i)) and images[i][1] == i


def test_several_parquet_files_and_no_paths(tmp_path):
    for k in range(2):
        parquet(tmp_path / f"{k}.parquet", [{"bytes": png(pixels(10 * k + i)), "path": None} for i in range(2)])
    images = read_images(str(tmp_path / "*.parquet"))
    assert images.ids == ["0.parquet:0", "0.parquet:1", "1.parquet:0", "1.parquet:1"]
    assert images.labels is None and images.class_names is None
    assert np.array_equal(images.picture(3), pixels(11))


def test_limit_is_spread_over_the_classes(classes):
    images = read_images(classes, limit=2)
    assert images.ids == ["cat/a.png", "dog/deep/c.png"] and images.labels.tolist() == [0, 1]
    assert len(read_images(classes, limit=99)) == 4


def test_in_batches_and_in_other_processes(classes):
    images = read_images(classes)
    means = map_batches(lambda batch: batch[0].mean((1, 2, 3)), images, batch_size=3)
    again = torch.cat([values.mean((1, 2, 3)) for values, _ in DataLoader(images, batch_size=2, num_workers=1)])
    assert torch.equal(means, again)


def test_a_bad_picture_is_named(tmp_path):
    save(tmp_path / "a.png", pixels(0))
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.png").write_bytes(png(pixels(1, 64, 64))[:-3000])
    images = read_images(tmp_path)
    assert images[0][0].shape == (3, 8, 8)
    for i, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(DataError, match=name):
            images[i]


def test_a_bad_row_is_named(tmp_path):
    rows = [{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}]
    images = read_images(parquet(tmp_path / "p.parquet", rows, row_group_size=1))
    with pytest.raises(DataError, match=r"p\.parquet, row 0"):
        images[0]
    with pytest.raises(DataError, match=r"row 1.*no bytes"):
        images[1]


def test_the_limit_on_pixels_stays(tmp_path, monkeypatch):
    save(tmp_path / "a.png", pixels(0, 20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(DataError, match="decompression bomb"):
        read_images(tmp_path)[0]


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="8 bits"):
        read_images(tmp_path)[0]


def test_unequal_sizes_are_refused_without_size(tmp_path):
    save(tmp_path / "a.png", pixels(0))
    save(tmp_path / "b.png", pixels(1, 9, 8))
    with pytest.raises(DataError, match=r"b\.png.*8 x 9.*give the size"):
        read_images(tmp_path)[1]
    assert read_images(tmp_path, size=8)[1][0].shape == (3, 8, 8)


def test_bad_sources(tmp_path, classes):
    with pytest.raises(InputError, match="does not exist"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="matches no file"):
        read_images(str(tmp_path / "*.bmp"))
    with pytest.raises(InputError, match="unknown ending"):
        read_images(classes / "cat" / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToDo):
        read_images(tmp_path / "empty")
    table = parquet(tmp_path / "p.parquet", [{"bytes": b"", "path": "a"}])
    with pytest.raises(InputError, match="not both"):
        read_images([table, classes / "cat" / "a.png"])
    with pytest.raises(NothingToDo):
        read_images(parquet(tmp_path / "none.parquet", []))
    save(classes / "loose.png", pixels(0))
    with pytest.raises(InputError, match=r"loose\.png"):
        read_images(classes)


def test_bad_tables(tmp_path):
    pq.write_table(pa.table({"img": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'image'"):
        read_images(tmp_path / "a.parquet")
    row = {"bytes": png(pixels(0)), "path": "a"}
    with pytest.raises(DataError, match="row 1: has no label"):
        read_images(parquet(tmp_path / "b.parquet", [row, row], [1, None]))
    with pytest.raises(DataError, match="whole numbers"):
        read_images(parquet(tmp_path / "c.parquet", [row], ["cat"]))
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable"):
        read_images(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0}, {"size": (4,)}, {"size": 2.5}, {"limit": 0}, {"limit": True}, {"mean": [0.5]},
        {"mean": [0.5, 0.5], "std": [1, 1]}, {"mean": [0.5], "std": [0.0]}, {"mean": [float("nan")], "std": [1.0]},
    ],
)  # fmt: skip
def test_bad_options(classes, options):
    with pytest.raises(InputError):
        read_images(classes, **options)
    if "limit" not in options:
        with pytest.raises(InputError, match="brings size"):
            read_images(classes, transformers.ViTImageProcessor(), **options)
