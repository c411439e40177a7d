"""`salience explain complexity`: what it writes and says, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_model

from salience.cli import main
from tiny import Plain


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``net.safetensors`` of tiny:plain, the same at an earlier time, and 180 images of two classes."""
    generator = np.random.default_rng(0)
    for i in range(180):
        file = tmp_path / "images" / ("cat" if i < 90 else "<dog>") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3)) * generator.random((1, 1, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    torch.manual_seed(0)
    net = Plain().eval()
    save_model(net, str(tmp_path / "net.safetensors"))
    with torch.no_grad():
        net.conv2.weight.mul_(torch.rand(6, 1, 1, 1) * 3 - 1)
    save_model(net, str(tmp_path / "early.safetensors"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["salience", "explain", "complexity", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


NET = ["net.safetensors", "images", "--arch", "tiny:plain", "-o", "found"]
OWN = ["early.safetensors", "images", "net.safetensors"]  # what the folder holds before a run


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_verdict_and_the_control_come_first_and_the_folder_is_whole(run, folder):
    code, out, err = run(*NET, "--checkpoints", "early.safetensors", "-k", "8")
    assert code == 0, err
    lines = out.splitlines()
    assert "importance" in lines[0] and "rank correlation" in lines[0] and lines[1].startswith("Shuffled features")
    assert "time to decode: " in out and "Not measured" not in out
    tensors = load_file(folder / "found" / "features.safetensors")
    assert tensors["dictionary"].shape == (8, 6) and tensors["information"].shape == (4, 8)
    assert tensors["train_features"].shape == (120, 8) and tensors["features"].shape == (60, 8)
    rows = [json.loads(line) for line in open(folder / "found" / "features.jsonl", encoding="utf-8")]
    live = [row for row in rows if row["complexity"] is not None]
    assert len(rows) == 8 and [row["complexity"] for row in live] == sorted(row["complexity"] for row in live)
    for row in live:
        assert row["complexity"] == pytest.approx(1 - np.mean(list(row["decoded"].values())))
        assert row["importance"] >= abs(row["signed"]) and 0 <= row["time to decode"] <= 1
        assert list(row["decoded"]) == ["input", "relu", "relu2", "penultimate"]
    assert live[0]["top_images"][0].endswith(".png")
    page = (folder / "found" / "report.html").read_text(encoding="utf-8")
    assert "read from the last layer of each checkpoint" in page and "no residual blocks" in page
    manifest = json.loads((folder / "found" / "manifest.json").read_text())
    assert manifest["checkpoints"] == ["early.safetensors", "net.safetensors"] and "report.html" in manifest["files"]
    assert names(folder) == sorted(["found", *OWN])


def test_without_checkpoints_nothing_is_said_of_training(run, folder):
    code, out, _ = run(*NET, "--features", "5", "--noise", "0.1", "--json")
    result = json.loads(out)
    assert code == 0 and "checkpoints" not in result and set(result["correlations"]) == {
        "importance", "importance, readable features", "importance, shuffled features"}  # fmt: skip
    assert list(result["layers"]) == ["input", "relu", "relu2", "penultimate"] and result["shuffled_complexity"] > 0.8
    rows = [json.loads(line) for line in open(folder / "found" / "features.jsonl", encoding="utf-8")]
    assert all("time to decode" not in row and "shaken by noise of 0.1" in row for row in rows)
    page = (folder / "found" / "report.html").read_text(encoding="utf-8")
    assert "when features are learned was not measured" in page and "learned anew" not in page
    code, out, _ = run(*NET, "--features", "5", "--overwrite", "--report", "page.html")
    assert code == 0 and "Not measured: when features are learned" in out
    assert (folder / "page.html").exists() and "report.html" not in names(folder / "found")


def test_the_same_seed_twice_and_chosen_layers(run, folder):
    texts = []
    for out in ("a", "b"):
        code, text, _ = run(*NET[:-1], out, "--layers", "relu2,input", "--seed", "3", "--json")
        assert code == 0
        texts.append({key: value for key, value in json.loads(text).items() if key not in ("out", "report")})
    assert texts[0] == texts[1] and list(texts[0]["layers"]) == ["relu2", "input"] and texts[0]["features"] == 12
    assert (folder / "a" / "features.safetensors").read_bytes() == (folder / "b" / "features.safetensors").read_bytes()


def test_a_dry_run_writes_nothing(run, folder):
    code, out, _ = run(*NET, "--dry-run", "--checkpoints", "early.safetensors")
    assert code == 0 and "180 of 3 x 16 x 16; 60 to measure on" in out and "input: 48 columns" in out
    code, out, _ = run(*NET, "--dry-run", "--json", "--grid", "2")
    plan = json.loads(out)
    assert code == 0 and plan["layers"] == {"input": 12, "relu": 16, "relu2": 24, "penultimate": 6}
    assert plan["features"] == 12 and plan["activation_bytes"] == 4 * 180 * 58
    assert names(folder) == sorted(OWN)


@pytest.mark.parametrize(
    "more, code, said",
    [
        (["--features", "0"], 2, "--features"),
        (["--grid", "0"], 2, "--grid"),
        (["--scope", "local"], 2, "per_class"),
        (["--scope", "per_class", "-k", "1000"], 2, "class"),
        (["--layers", "rellu2"], 2, "'relu2'"),
        (["--layers", "relu2,relu2"], 2, "once"),
        (["--noise", "loud"], 2, "--noise"),
        (["--noise", "-1"], 2, "sigma"),
        (["--size", "ten"], 2, "--size"),
        (["--device", "cuda:99"], 2, "--device"),
        (["--report", "page.txt"], 2, ".html"),
        (["--checkpoints", "nowhere.safetensors"], 2, "nowhere"),
        (["--checkpoints", "early.safetensors", "--checkpoints", "early.safetensors"], 2, "twice"),
        (["--limit", "60"], 4, "50"),
        (["--limit", "2"], 4, "too few"),
    ],
)
def test_what_is_refused_leaves_nothing(run, folder, more, code, said):
    found, out, err = run(*NET, *more)
    assert found == code and said in err, err
    assert len(err.strip().splitlines()) == 1 and not out
    assert names(folder) == sorted(OWN)


def test_an_existing_output_and_a_bad_picture(run, folder):
    (folder / "found").mkdir()
    code, _, err = run(*NET)
    assert code == 2 and "--overwrite" in err
    (folder / "images" / "cat" / "999.png").write_bytes(b"no picture")
    code, _, err = run(*NET[:-1], "other")
    assert code == 3 and "999.png" in err and "other" not in names(folder)


# On real data -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.slow
def test_complex_features_of_a_pretrained_network_matter_less(run, folder, resnet20):
    code, out, err = run(
        *resnet20, "-o", "found",         "--limit", "1500", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["shuffled_complexity"] > 0.95 and result["mean_complexity"] < 0.8
    assert list(result["layers"])[:3] == ["input", "bn1", "layer1.0"] and len(result["layers"]) == 12
    told = list(result["layers"].values())
    assert told[-1] > 0.6 > told[0] and result["prediction_kept"] > 0.95
    assert result["correlations"]["importance, readable features"]["high"] < 0
