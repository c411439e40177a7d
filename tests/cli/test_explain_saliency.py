"""`salience explain saliency`: what it writes and says, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_model

from tiny import Plain, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``net.safetensors`` of tiny:plain, ``vit`` with a processor, and ``images`` of two classes."""
    generator = np.random.default_rng(0)
    for i in range(6):
        file = tmp_path / "images" / ("cat" if i < 3 else "<dog>") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    torch.manual_seed(0)
    save_model(Plain(), str(tmp_path / "net.safetensors"))
    save("vit", tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "explain", "saliency")


NET = ["net.safetensors", "images", "--arch", "tiny:plain", "-o", "maps"]
QUICK = ["--measure", "4", "--steps", "4"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_verdict_comes_first_and_the_folder_is_whole(run, folder):
    code, out, err = run(*NET, *QUICK, "--method", "normgrad,gradcam", "--overlays", "2")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("normgrad: ") and "random" in lines[0]
    assert lines[1].startswith("gradcam: ")
    assert "on 4 images" in out and "normgrad looked at" in out
    maps = load_file(folder / "maps" / "maps.safetensors")
    assert {name: tuple(one.shape) for name, one in maps.items()} == dict.fromkeys(("normgrad", "gradcam"), (6, 16, 16))
    rows = [json.loads(line) for line in open(folder / "maps" / "images.jsonl", encoding="utf-8")]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows) and len(rows) == 6
    assert {row["label"] for row in rows} == {0, 1} and sum(row["measured"] for row in rows) == 4
    assert names(folder / "maps" / "overlays") == [f"{i:06d}-{m}.png" for i in (0, 5) for m in ("gradcam", "normgrad")]
    with Image.open(folder / "maps" / "overlays" / "000000-gradcam.png") as overlay:
        assert overlay.size == (256, 256)
    page = (folder / "maps" / "report.html").read_text(encoding="utf-8")
    assert "Which map can be trusted here" in page and "<dog>" not in page
    manifest = json.loads((folder / "maps" / "manifest.json").read_text())
    assert manifest["layers"]["gradcam"] and "report.html" in manifest["files"]
    assert names(folder) == ["images", "maps", "net.safetensors", "vit"]


def test_a_transformers_directory_and_json(run, folder):
    code, out, err = run("vit", "images", "-o", "maps", *QUICK, "--json", "--limit", "4", "--target", "label")
    assert code == 0, err
    result = json.loads(out)
    assert result["images"] == result["measured"] == 4
    (method,) = result["methods"]
    assert method["method"] == "normgrad" and len(method["over_random"]) == 3 and method["verdict"]
    assert load_file(folder / "maps" / "maps.safetensors")["normgrad"].shape == (4, 16, 16)


def test_the_same_seed_twice(run, folder):
    texts = []
    for out in ("a", "b"):
        code, text, _ = run("vit", "images", "-o", out, *QUICK, "--seed", "3", "--json")
        assert code == 0
        texts.append(json.loads(text)["methods"])
    assert texts[0] == texts[1]
    assert (folder / "a" / "maps.safetensors").read_bytes() == (folder / "b" / "maps.safetensors").read_bytes()


def test_nothing_measured_is_said(run, folder):
    code, out, _ = run(*NET, "--measure", "0", "--overlays", "0", "--method", "gradient")
    assert code == 0 and out.startswith("Not measured")
    assert "overlays" not in names(folder / "maps")


def test_a_dry_run_writes_nothing(run, folder):
    code, out, _ = run(*NET, "--method", "normgrad,gradient", "--dry-run")
    assert code == 0 and "6 of 3 x 16 x 16" in out and "the image itself" in out
    assert "maps" not in names(folder)
    code, out, _ = run(*NET, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["images"] == 6


def test_an_existing_output(run, folder):
    assert run(*NET, *QUICK, "--method", "gradient")[0] == 0
    code, _, err = run(*NET, *QUICK, "--method", "gradient")
    assert code == 2 and "--overwrite" in err
    assert run(*NET, *QUICK, "--method", "gradcam", "--overwrite")[0] == 0
    assert list(load_file(folder / "maps" / "maps.safetensors")) == ["gradcam"]
    code, _, err = run("vit", "images", "-o", "images", *QUICK, "--overwrite")
    assert code == 2 and (folder / "images" / "cat" / "0.png").exists()


def test_a_report_elsewhere(run, folder):
    code, _, err = run(*NET, *QUICK, "--method", "gradient", "--report", "page.html")
    assert code == 0, err
    assert (folder / "page.html").exists() and not (folder / "maps" / "report.html").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--method", "gradcamm"], "'gradcam'"),
        (["--method", "gradient,gradient"], "different names"),
        (["--method", "gradcam", "--selective"], "belongs to --method normgrad"),
        (["--method", "gradcam", "--meta-lr", "0.1"], "--meta-lr belongs to --method normgrad"),
        (["--method", "gradient", "--layer", "conv"], "--layer means nothing"),
        (["--layer", "convv"], "nearest names: 'conv"),
        (["--layer", "head"], "no map of the image"),
        (["--target", "best"], "--target"),
        (["--target", "7"], "0..2"),
        (["--fuse", "sum"], "fuse"),
        (["--meta-lr", "-1"], "lr"),
        (["--size", "ten"], "--size"),
        (["--mean", "a,b", "--std", "1"], "--mean"),
        (["--mean", "0.5"], "mean and std"),
        (["--steps", "1"], "--steps"),
        (["--device", "cuda:99"], "--device"),
        (["--limit", "0"], "limit"),
        (["--report", "page.txt"], ".html"),
    ],
)
def test_usage(run, folder, more, said):
    code, out, err = run(*NET, *QUICK, *more)
    assert code == 2 and said in err, err
    assert len(err.strip().splitlines()) == 1 and not out
    assert names(folder) == ["images", "net.safetensors", "vit"]


def test_a_bad_picture_leaves_nothing(run, folder):
    (folder / "images" / "cat" / "9.png").write_bytes(b"no picture")
    code, _, err = run(*NET, *QUICK)
    assert code == 3 and "9.png" in err
    assert names(folder) == ["images", "net.safetensors", "vit"]


def test_no_pictures(run, folder):
    (folder / "empty").mkdir()
    assert run("vit", "empty", "-o", "maps")[0] == 4
    code, _, err = run("vit", "nowhere", "-o", "maps")
    assert code == 2 and "nowhere" in err


def test_labels_that_are_not_there(run, folder):
    code, _, err = run("vit", "images/cat", "-o", "maps", "--target", "label", *QUICK)
    assert code == 2 and "no labels" in err


# On real data -------------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("SALIENCE_DATA", "nowhere"))
EXAMPLES = Path(__file__).parents[2] / "examples"
realdata = [
    pytest.mark.realdata,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "resnet20-cifar10" / "model.safetensors").exists(),
        reason="SALIENCE_DATA names no folder with resnet20-cifar10/model.safetensors and cifar10/test.parquet",
    ),
]
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


class TestOnRealData:
    """A pretrained ResNet-20 on CIFAR-10."""

    pytestmark = realdata

    def test_maps_beat_random_ones(self, run, folder, monkeypatch):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        code, out, err = run(
            str(DATA / "resnet20-cifar10" / "model.safetensors"), str(DATA / "cifar10" / "test.parquet"), "-o", "maps",
            "--arch", "cifar_resnet20:resnet20", "--mean", MEAN, "--std", STD, "--limit", "60", "--measure", "60",
            "--method", "normgrad,gradcam,linear", "--json",
        )  # fmt: skip
        assert code == 0, err
        for method in json.loads(out)["methods"]:
            assert method["over_random"][1] > 0, method  # the lower end of the interval

    def test_random_weights_tell_the_gradient_from_edges(self, folder, monkeypatch):
        from salience.features import Gradient, LinearApproximation, randomization_check, weight_layers
        from salience.features.baselines import EdgeMap
        from salience.model import load, read_images

        monkeypatch.syspath_prepend(str(EXAMPLES))
        model = load(DATA / "resnet20-cifar10" / "model.safetensors", arch="cifar_resnet20:resnet20").model
        images = read_images(
            DATA / "cifar10" / "test.parquet", mean=[float(v) for v in MEAN.split(",")],
            std=[float(v) for v in STD.split(",")], limit=40,
        )  # fmt: skip
        last, half, whole = "linear", weight_layers(model)[20], weight_layers(model)[0]
        found = {
            type(one).__name__: randomization_check(
                one, images, layers=[last, half, whole], generator=torch.Generator().manual_seed(0)
            )
            for one in (Gradient(model), LinearApproximation(model, "layer3"), EdgeMap(model))
        }
        for values in zip(*(one.values() for one in found.values()), strict=True):
            gradient, linear, edges = (one.spearman for one in values)
            assert edges == pytest.approx(1)
            assert abs(linear) < 0.9
            assert gradient < 0.95
        assert abs(found["Gradient"][whole].spearman) < 0.5
