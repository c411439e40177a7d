"""`salience verify concepts`: what it says first, what it writes, the study page, exit codes, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from salience.concepts import UserStudyKit
from tiny import Plain

CONCEPTS = ("reddish", "dark left", "bright <b>", "striped")


def pictures(n: int, seed: int, contrast: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with four things in it, each in half of the pictures; and which."""
    rng = np.random.default_rng(seed)
    has = rng.random((n, 4)) < 0.5
    x = rng.integers(60, 160, (n, 16, 16, 3)).astype(float)
    x[has[:, 0], :, :, 2] *= 0.3
    x[~has[:, 0], :, :, 0] *= 0.3
    x[has[:, 1], :, :8] *= 0.6
    x[has[:, 2]] += 70
    x[has[:, 3], ::2] *= 0.6
    return np.clip(128 + (x - 128) * contrast, 0, 255).astype(np.uint8), has


def write_folder(folder: Path, n: int, seed: int) -> None:
    x, has = pictures(n, seed)
    lines = ["file,caption," + ",".join(f'"{name}"' for name in CONCEPTS)]
    for i in range(n):
        name = f"{'<red>' if has[i, 0] else 'blue'}/{i:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(folder / name)
        lines.append(f"{name},some text," + ",".join(str(int(v)) for v in has[i]))
    (folder / "concepts.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n", encoding="utf-8")


def write_parquet(file: Path, n: int, seed: int, contrast: float, **more) -> None:
    x, has = pictures(n, seed, contrast)
    images = []
    for one in x:
        Image.fromarray(one).save(file.with_suffix(".png"))
        images.append({"bytes": file.with_suffix(".png").read_bytes(), "path": None})
    file.with_suffix(".png").unlink()
    table = {"image": pa.array(images), **{name: pa.array(has[:, i]) for i, name in enumerate(CONCEPTS)}, **more}
    pq.write_table(pa.table(table), file, row_group_size=50)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network that tells reddish pictures, another one, and two probe sets."""
    write_folder(tmp_path / "own", 120, 0)
    write_parquet(tmp_path / "scans.parquet", 130, 1, 0.3)
    torch.manual_seed(0)
    net, other = Plain().eval(), Plain().eval()
    x, has = pictures(200, 2)
    with torch.no_grad():
        inputs = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
        features = net.relu2(net.conv2(net.relu(net.norm(net.conv(inputs))))).mean((2, 3))
        apart = features[has[:, 0]].mean(0) - features[~has[:, 0]].mean(0)
        net.head.weight.copy_(torch.stack([-apart, apart, 0 * apart]) * 100)
        middle = features.mean(0) @ apart * 100
        net.head.bias.copy_(torch.stack([middle, -middle, torch.tensor(-1e4)]))
    save_model(net, str(tmp_path / "net.safetensors"))
    save_model(other, str(tmp_path / "other.safetensors"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    def run(*arguments: str) -> tuple[int, str, str]:
        return salience("verify", "concepts", *arguments)

    return run


NETS = ["--arch", "tiny:plain", "--generic", "other.safetensors", "--generic-arch", "tiny:plain"]
BOTH = ["net.safetensors", "own", "scans.parquet", *NETS, "-o", "audit"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


BEFORE = ["net.safetensors", "other.safetensors", "own", "scans.parquet"]


def test_findings_come_first_and_the_folder_is_whole(run, folder):
    code, out, err = run(*BOTH)
    assert code == 0, err
    first = out.splitlines()
    assert first[0].startswith("own (half 1) and scans ") and "than sampling explains" in first[0].replace("more ", "")
    assert "of 4 concepts are learnable" in first[1] and "against 32" in first[2]
    assert names(folder) == sorted([*BEFORE, "audit"])
    assert names(folder / "audit") == [
        "concepts.jsonl", "manifest.json", "report.html", "report.md", "study-key.json", "study.html",
    ]  # fmt: skip
    rows = {row["concept"]: row for row in map(json.loads, open(folder / "audit" / "concepts.jsonl", encoding="utf-8"))}
    assert set(CONCEPTS) <= set(rows) and set(rows["reddish"]["cosines"]) == {"own (half 2)", "scans"}
    assert 0 < rows["reddish"]["nap"] <= 1 and rows["class 2"]["left_out"] == "no image of it"
    page = (folder / "audit" / "report.html").read_text(encoding="utf-8")
    assert "Would another probe set say the same?" in page and "bright <b>" not in page and "&lt;b&gt;" in page
    assert "never predicts on own: 2" in page
    text = (folder / "audit" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Can the concept explanation be trusted?") and "<b>" not in text.replace("\\<b\\>", "")
    manifest = json.loads((folder / "audit" / "manifest.json").read_text())
    assert manifest["counts"] == {"own": 120, "scans": 130} and "study.html" in manifest["files"]


def test_the_study_page_and_its_key(run, folder):
    code, _, err = run(*BOTH, "--study-concepts", "3", "--study-tasks", "6")
    assert code == 0, err
    page = (folder / "audit" / "study.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6 and "<red>" not in page
    kit = UserStudyKit.load(folder / "audit" / "study-key.json")
    assert 1 <= len(kit.key_["concepts"]) <= 3 and kit.key_["classes"] == [0, 1]
    right = {"study": kit.key_["study"], "preferred": 8, "tasks": [
        {"task": i, "marked": task["present"], "class": task["class"], "seconds": 1.5}
        for i, task in enumerate(kit.key_["tasks"])]}  # fmt: skip
    found = kit.score(right)
    assert (found["recall"], found["precision"], found["simulation_accuracy"], found["seconds"]) == (1, 1, 1, 1.5)
    # What is present is what the table says of that picture.
    has = pictures(120, 0)[1]
    files = sorted(f.relative_to(folder / "own").as_posix() for f in (folder / "own").rglob("*.png"))
    for task in kit.key_["tasks"]:
        labels = has[int(files[task["row"]][-7:-4])]
        assert task["present"] == [n for n in kit.key_["concepts"] if labels[CONCEPTS.index(n)]]


def test_json_options_and_the_same_seed_twice(run, folder):
    arguments = [*BOTH[:-2], "--seed", "5", "--limit", "100", "--threshold", "0.2", "--concept", "reddish",
                 "--concept", "dark left", "--concept", "striped", "--json"]  # fmt: skip
    results = []
    for out in ("a", "b"):
        code, text, err = run(*arguments, "-o", out)
        assert code == 0, err
        results.append({k: v for k, v in json.loads(text).items() if k not in ("out", "report", "study")})
    assert results[0] == results[1]
    one = results[0]
    assert one["rows"] == {"own (half 1)": 50, "own (half 2)": 50, "scans": 50} and one["threshold"] == 0.2
    assert one["concepts"] == 3 and len(one["gap"]["scans"]) == 3
    for file in ("study.html", "concepts.jsonl"):
        assert (folder / "a" / file).read_bytes() == (folder / "b" / file).read_bytes()
    code, text, err = run(*arguments, "-o", "c", "--control", "scans")
    assert code == 0 and json.loads(text)["reference"] == "own", err


def test_without_a_second_set_the_noise_is_told(run, folder):
    code, out, err = run("net.safetensors", "photos=own", *NETS, "-o", "audit", "--study-arm", "examples")
    assert code == 0, err
    assert out.startswith("One probe set alone") and "photos (half 1)" in out
    assert UserStudyKit.load(folder / "audit" / "study-key.json").arm == "examples"
    code, _, err = run("net.safetensors", "scans.parquet", *NETS, "-o", "unlabelled", "--threshold", "0.5")
    assert code == 0 and "without true labels" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["net.safetensors", "own", "own", *NETS, "-o", "x"], 2, "'own'"),
        (["net.safetensors", "nowhere", *NETS, "-o", "x"], 2, "nowhere"),
        ([*BOTH, "--control", "third"], 2, "'third'"),
        ([*BOTH, "--study-arm", "both"], 2, "'both'"),
        ([*BOTH, "--limit", "0"], 2, "--limit"),
        ([*BOTH, "--concept", "reddisch"], 3, "'reddish'"),
        ([*BOTH, "--layer", "conv9"], 2, "conv9"),
        (["net.safetensors", "own", "--arch", "tiny:plain", "--generic", "net.safetensors", "--generic-arch",
          "tiny:plain", "-o", "x"], 2, "circle"),
        (["net.safetensors", "bare", *NETS, "-o", "x"], 2, "concepts.csv"),
        (["net.safetensors", "half.parquet", *NETS, "-o", "x"], 3, "row 3, column 'share'"),
        (["net.safetensors", "none.parquet", *NETS, "-o", "x"], 3, "could be a concept"),
        (["net.safetensors", "short", *NETS, "-o", "x"], 3, "no row for the picture"),
        (["net.safetensors", "own", "other.parquet", *NETS, "-o", "x"], 3, "no concept in common"),
    ],
)  # fmt: skip
def test_bad_input_says_what_would_be_right_and_leaves_nothing(run, folder, arguments, code, said):
    (folder / "bare").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "bare" / "a.png")
    write_folder(folder / "short", 12, 3)
    table = (folder / "short" / "concepts.csv").read_text().splitlines()
    (folder / "short" / "concepts.csv").write_text("\n".join(table[:-1]) + "\n")
    write_parquet(folder / "half.parquet", 12, 4, 1.0, share=pa.array([0, 1, 1, 0.5] * 3))
    pq.write_table(pq.read_table(folder / "half.parquet").select(["image"]), folder / "none.parquet")
    renamed = pq.read_table(folder / "scans.parquet").rename_columns(["image", "a", "b", "c", "d"])
    pq.write_table(renamed, folder / "other.parquet")
    before = names(folder)
    got, out, err = run(*arguments)
    assert (got, out) == (code, "") and said in err, err
    assert names(folder) == before


def test_an_existing_output_is_kept(run, folder):
    assert run(*BOTH)[0] == 0
    code, _, err = run(*BOTH)
    assert code == 2 and "--overwrite" in err
    assert run(*BOTH, "--overwrite")[0] == 0
    assert os.listdir(folder / "audit")
