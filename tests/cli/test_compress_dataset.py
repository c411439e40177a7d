"""`salience compress dataset`: measured first, whole or not at all, one sentence for each failure."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model
from torch.nn.functional import cross_entropy

from salience.cli._students import StudentComparison, fresh
from salience.data import DistilledSet
from salience.errors import InputError
from salience.io import verify_output
from salience.model import read_images
from tiny import build, plain

NORMAL = ["--image-mean", "0.3,0.3,0.3", "--image-std", "0.3,0.3,0.3"]
BASE = ["photos", "--teacher", "net.safetensors", "--arch", "tiny:plain", *NORMAL, "--ipc", "2"]
QUICK = ["--steps", "3", "--views", "3", "--students", "2", "--epochs", "3", "--no-flip"]
ARMS = {"distilled", "random images", "without refinement", "class labels alone", "teacher"}


def colours(folder: Path, each: int, seed: int) -> None:
    """Images with a square in the colour of their class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 80, (8, 8, 3), dtype=np.uint8)
            row, column = rng.integers(5, size=2)
            pixels[row : row + 3, column : column + 3, 2 - label] = 255
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a teacher that knows them."""
    root = tmp_path_factory.mktemp("world")
    colours(root / "photos", 20, 0)
    colours(root / "held", 4, 1)
    images = read_images(root / "photos", mean=[0.3] * 3, std=[0.3] * 3)
    x, y = torch.stack([images[i][0] for i in range(len(images))]), images.labels
    torch.manual_seed(0)
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    save_model(model, str(root / "net.safetensors"))
    return root


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("photos", "held", "net.safetensors"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "compress", "dataset")


def test_it_is_measured_first_and_what_it_writes_can_be_trained_on(run, folder: Path) -> None:
    code, out, err = run(*BASE, *QUICK, "-o", "small")
    assert code == 0, err
    (
        first,
        *_,
    ) = out.splitlines()
    assert first.startswith("Distilled is") and "random images here: accuracy" in first and "95 % interval" in first
    assert "without refinement here: accuracy" in out and all(name in out for name in ARMS)
    assert "images  48 -> 6 (2 for each of 3 classes)" in out and "labels  dbr, 3 views:" in out
    assert sorted(os.listdir(folder / "small" / "images")) == ["blue", "green", "red"]
    small = DistilledSet.load("small")
    assert small.y.tolist() == [0, 1, 2] * 2 and small.class_names == ("blue", "green", "red")
    assert small.labels.d_org.shape == (6, 3) and small.labels.views.flip is False
    verify_output("small")
    page = (folder / "small.report.html").read_text()
    assert "Measured on your data" in page and "How to train on it" in page and page.count("<img") >= 2


def test_in_json_with_images_to_measure_on_and_the_same_again(run, folder: Path) -> None:
    arguments = [*BASE, *QUICK, "--evaluate", "held", "--json", "--seed", "3"]
    code, out, err = run(*arguments, "-o", "one", "--report", "one.html")
    assert code == 0, err
    result = json.loads(out)
    assert set(result["evaluation"]["means"]) == ARMS and result["evaluation"]["examples"] == 12
    assert result["read"] == 60 and result["images"] == 6 and result["bytes_labels"] < result["bytes_soft_labels"]
    assert set(result["evaluation"]["gains"]) == ARMS - {"distilled"}
    code, out, _ = run(*arguments, "-o", "two")
    assert json.loads(out)["evaluation"] == result["evaluation"]
    assert torch.equal(DistilledSet.load("one").x, DistilledSet.load("two").x)
    assert run(*arguments, "-o", "one")[0] == 2
    assert (
        run(*arguments, "-o", "one", "--report", "one.html", "--overwrite", "--labels", "hard", "--steps", "0")[0] == 0
    )


def test_a_model_directory_with_its_processor(run, folder: Path) -> None:
    from transformers import ViTImageProcessor

    model = build("resnet")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    images = read_images(folder / "photos", processor)
    x = torch.stack([images[i][0] for i in range(len(images))])
    with torch.no_grad():  # classes as the random model sees them, so that it is as good as a trained one
        model.classifier[-1].bias -= model(x).logits.mean(0)
        labels = model(x).logits.argmax(1).tolist()
    assert min(map(labels.count, set(labels))) > 1 and len(set(labels)) > 1
    model.save_pretrained(folder / "net")
    processor.save_pretrained(folder / "net")
    for i, label in enumerate(labels):
        (folder / "own" / f"LABEL_{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.picture(i)).save(folder / "own" / f"LABEL_{label}" / f"{i}.png")
    code, _, err = run("own", "--teacher", "net", "--ipc", "1", *QUICK, "--factor", "2", "-o", "small", "--json")
    assert code == 0, err
    small = DistilledSet.load("small")
    assert small.mean == (0.5, 0.5, 0.5) and small.labels.views.tiles == 2
    assert {small.class_names[label] for label in small.y.tolist()} == {f"LABEL_{label}" for label in set(labels)}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*BASE[:-2], "--ipc", "0"], 2, "ipc"),
        (
            ["photos", "--teacher", "net.safetensors", "--arch", "tiny:plain", "--ipc", "1"],
            2,
            "--image-mean and --image-std",
        ),
        (["nothing", *BASE[1:]], 2, "nothing does not exist"),
        ([*BASE, "--hold-out", "1.5"], 2, "--hold-out must lie between 0 and 1"),
        ([*BASE, "--factor", "9"], 2, "9 patches do not fit into images of 8 x 8"),
        ([*BASE, "--eps", "2"], 2, "eps: got 2.0"),
        ([*BASE, "--student", "tiny:missing"], 2, "tiny has no function 'missing'"),
        ([*BASE, "--student", "tiny:VOCABULARY"], 2, "tiny has no function"),
        (["flat", *BASE[1:]], 3, "has no labels"),
        (["alone", *BASE[1:]], 4, "holds one class only"),
        (["single", *BASE[1:]], 3, "a class has one image only"),
    ],
)
def test_failures_are_one_sentence_and_leave_nothing(arguments, code: int, message: str, run, folder: Path) -> None:
    picture = Image.new("RGB", (8, 8), (200, 10, 10))
    for name in (
        "flat/a.png",
        "flat/b.png",
        "alone/one/a.png",
        "alone/one/b.png",
        "single/one/a.png",
        "single/two/b.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    before = sorted(os.listdir(folder))
    found, out, err = run(*arguments, *QUICK, "-o", "small")
    assert found == code and message in err and out == "", (found, err)
    assert sorted(os.listdir(folder)) == before


def test_a_blind_teacher_is_refused(run, folder: Path) -> None:
    torch.manual_seed(1)
    model = plain()
    torch.nn.init.zeros_(model.head.weight)
    save_model(model, str(folder / "blind.safetensors"))
    code, _, err = run("photos", "--teacher", "blind.safetensors", *BASE[3:], *QUICK, "-o", "small")
    assert code == 2 and "where chance is 33%" in err and not (folder / "small").exists()


def test_students_are_drawn_anew_and_their_spread_widens_intervals() -> None:
    teacher = plain()
    one, two = fresh(teacher, 1), fresh(teacher, 2)
    again = fresh(teacher, 1)
    assert torch.equal(one.conv.weight, again.conv.weight)
    for other in (teacher, two):
        assert not torch.equal(one.conv.weight, other.conv.weight) and not torch.equal(one.head.bias, other.head.bias)
    with torch.no_grad():
        teacher.norm.running_mean.fill_(3)
    assert not fresh(teacher, 1).norm.running_mean.any()  # statistics are the teacher's knowledge, too
    teacher.register_parameter("token", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(InputError, match="cannot be drawn anew"):
        fresh(teacher, 0)
    a, b = np.tile([1.0, 1.0, 0.0, 1.0], 25), np.tile([1.0, 0.0, 0.0, 0.0], 25)
    even = StudentComparison("accuracy", True, {"a": a, "b": b}, 0, draws={"a": [a, a], "b": [b, b]})
    spread = StudentComparison("accuracy", True, {"a": a, "b": b}, 0, draws={"a": [a, b], "b": [b, b]})
    assert even.gain("a", "b").mean == spread.gain("a", "b").mean == 0.5 and even.verdict("a", "b") is True
    # Two pairs that differ by 0.5 and 0: t_1 x 0.354 / sqrt(2) = 3.18 to either side, and more by the images.
    assert spread.gain("a", "b").low == pytest.approx(0.5 - np.hypot(3.177, 0.5 - even.gain("a", "b").low), abs=0.01)
    assert spread.verdict("a", "b") is None
