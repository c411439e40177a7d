"""`salience explain concepts --method pace`: what it writes and says, exit codes, and nothing half-written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_model
from torch.nn.functional import cross_entropy
from transformers import ViTImageProcessor

from salience.model import fit
from tiny import Plain, build, save

NAMES = ["<red>", "blue", "none"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny transformer that tells red from blue tiles on grey, with its processor, and such images."""
    home = tmp_path_factory.mktemp("made")
    rng, pixels = np.random.default_rng(0), []
    for i in range(60):
        picture = np.full((16, 16, 3), 128.0)
        top, left = rng.integers(0, 2, 2) * 8
        picture[top : top + 8, left : left + 8] = (230, 30, 30) if i < 30 else (30, 30, 230)
        picture = (picture + rng.normal(size=picture.shape) * 12).clip(0, 255).astype(np.uint8)
        file = home / "images" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(file)
        pixels.append(torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
    model = build("vit")
    model.config.id2label = dict(enumerate(NAMES))
    fit(model, torch.stack(pixels), torch.arange(60) // 30, loss=lambda out, y: cross_entropy(out.logits, y), epochs=20,
        optimizer=torch.optim.Adam(model.parameters(), 1e-3), batch_size=20, generator=torch.Generator().manual_seed(0))  # fmt: skip
    model.eval().save_pretrained(home / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(home / "vit")
    return home


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("vit", "images"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "explain", "concepts", "vit", "images", "--method", "pace", "-k", "3")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_verdict_comes_first_and_the_folder_is_whole(run, folder):
    code, out, err = run("-o", "found")
    assert code == 0, err
    assert out.splitlines()[0].startswith("from its concepts alone, 100% of the model's predictions can be told")
    assert "faithfulness (higher is better)" in out and "speaks for <red>" in out and "speaks for blue" in out
    tensors = load_file(folder / "found" / "concepts.safetensors")
    assert tensors["means"].shape == (3, 32) and tensors["phi"].shape == (18, 4, 3)
    torch.testing.assert_close(tensors["theta"], tensors["gamma"] / tensors["gamma"].sum(1, keepdim=True))
    rows = [json.loads(line) for line in open(folder / "found" / "concepts.jsonl", encoding="utf-8")]
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1) and len(rows[0]["nearest_patches"]) == 8
    images = [json.loads(line) for line in open(folder / "found" / "images.jsonl", encoding="utf-8")]
    assert len(images) == 18 and {image["predicted"] for image in images} == {"<red>", "blue"}
    learned = {patch["id"] for row in rows for patch in row["nearest_patches"]}
    assert not learned & {image["id"] for image in images}
    assert names(folder / "found" / "crops") == [f"concept{k:02d}.png" for k in range(3)]
    page = (folder / "found" / "report.html").read_text(encoding="utf-8")
    assert page.index("held-out images") < page.index("The data set: concepts") < page.index("Images and their patches")
    assert "<red>" not in page and "&lt;red&gt;" in page
    manifest = json.loads((folder / "found" / "manifest.json").read_text())
    assert manifest["method"] == "pace" and manifest["counts"]["learned_from"] == 42
    assert names(folder) == ["found", "images", "vit"]


def test_crops_are_the_patches_that_the_transformer_saw(run, folder):
    assert run("-o", "found")[0] == 0
    shown = {}
    for row in map(json.loads, open(folder / "found" / "concepts.jsonl", encoding="utf-8")):
        with Image.open(folder / "found" / "crops" / f"concept{row['concept']:02d}.png") as strip:
            first = np.asarray(strip)[:48, :48].mean((0, 1))
        place = row["nearest_patches"][0]
        with Image.open(folder / "images" / place["id"]) as picture:
            top, left = place["patch"] // 2 * 8, place["patch"] % 2 * 8
            expected = np.asarray(picture)[top : top + 8, left : left + 8].mean((0, 1))
        np.testing.assert_allclose(first, expected, atol=1.5)
        shown[row["concept"]] = expected[0] - expected[2]
    assert max(map(abs, shown.values())) > 50  # not all of them are grey


def test_json_and_the_same_seed_twice(run, folder):
    texts = []
    for out in ("a", "b"):
        code, text, _ = run("-o", out, "--seed", "3", "--json", "--measure", "10")
        assert code == 0
        texts.append({key: value for key, value in json.loads(text).items() if key not in ("out", "report")})
    assert texts[0] == texts[1] and texts[0]["measured"] == 10 and texts[0]["better_than_random"]
    assert set(texts[0]["measures"]) == {"PACE", "k-means", "random"}
    assert (folder / "a" / "concepts.safetensors").read_bytes() == (folder / "b" / "concepts.safetensors").read_bytes()


def test_a_dry_run_writes_nothing(run, folder):
    code, out, _ = run("-o", "found", "--dry-run", "--reduce-dim", "4")
    assert code == 0 and "60 of 3 x 16 x 16" in out and "120 through the model" in out and "in 4 dimensions" in out
    code, out, _ = run("-o", "found", "--dry-run", "--json", "--layer=-2")
    assert code == 0 and json.loads(out)["block"] == -2 and json.loads(out)["reduce_dim"] is None
    assert names(folder) == ["images", "vit"]


@pytest.mark.parametrize(
    "more, code, said",
    [
        (["--class", "blue"], 3, "class 1 throughout"),
        (["--class", "none"], 4, "20 at least"),
        (["--class", "green"], 2, "'blue'"),
        (["--layer", "relu2"], 2, "number of a block"),
        (["--layer", "3"], 2, "blocks -3..2"),
        (["--reduce-dim", "33"], 2, "reduce_dim"),
        (["--patch-size", "8"], 2, "--patch-size belongs to --method craft"),
        (["--limit", "12"], 4, "20 at least"),
        (["-k", "500"], 2, "only 168 patches"),
        (["--report", "page.txt"], 2, ".html"),
    ],
)
def test_what_is_refused(run, folder, more, code, said):
    found, out, err = run("-o", "found", *more)
    assert found == code and said in err, err
    assert not out and names(folder) == ["images", "vit"]


def test_a_network_that_is_no_transformer(salience, folder):
    save("resnet", folder / "resnet")
    code, _, err = salience(
        "explain", "concepts", "resnet", "images", "--size", "16", "--method", "pace", "-o", "found"
    )
    assert code == 2 and "ResNet" in err and "found" not in names(folder)


def test_a_network_of_your_own(salience, folder):
    save_model(Plain(), str(folder / "net.safetensors"))
    code, _, err = salience(
        "explain", "concepts", "net.safetensors", "images", "--arch", "tiny:plain", "--method", "pace", "-o", "found"
    )
    assert code == 2 and "Plain" in err and "craft" in err and "found" not in names(folder)


def test_craft_still_asks_for_a_class(salience, folder):
    code, _, err = salience("explain", "concepts", "vit", "images", "-o", "found")
    assert code == 2 and "--class" in err
