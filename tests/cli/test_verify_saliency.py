"""`salience verify saliency`: its verdicts, what it writes, exit codes, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_model

from tiny import Plain, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``net.safetensors`` of tiny:plain, ``vit`` with a processor, and ``images`` of two classes."""
    generator = np.random.default_rng(0)
    for i in range(32):
        file = tmp_path / "images" / ("cat" if i < 16 else "<dog>") / f"{i:02d}.png"
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
    def run(*arguments: str, verb: str = "verify") -> tuple[int, str, str]:
        return salience(verb, "saliency", *arguments)

    return run


NET = ["net.safetensors", "images", "--arch", "tiny:plain", "-o", "verdict"]
QUICK = ["--steps", "4", "--samples", "8", "--method", "gradient,grad-cam,normgrad"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_verdict_comes_first_and_the_folder_is_whole(run, folder):
    code, out, err = run(*NET, *QUICK)
    assert code == 0, err
    first = out.splitlines()[:3]
    assert {line.split(":")[0] for line in first} == {"gradient", "grad-cam", "normgrad"}
    assert all(line.split(": ")[1].split(".")[0] in ("yes", "with care", "no") for line in first)
    assert "on 32 images" in out and "(control)" in out
    rows = [json.loads(line) for line in open(folder / "verdict" / "scores.jsonl", encoding="utf-8")]
    assert len(rows) == 32 * 6 * 2 and {row["measure"] for row in rows} == {"insertion", "deletion"}
    page = (folder / "verdict" / "report.html").read_text(encoding="utf-8")
    assert "Verdicts" in page and "same with random weights" in page and "<dog>" not in page
    assert names(folder) == ["images", "net.safetensors", "verdict", "vit"]
    assert json.loads((folder / "verdict" / "manifest.json").read_text())["counts"] == {"images": 32}


def test_all_methods_and_all_metrics_on_a_transformers_directory(run, folder):
    metrics = "insertion,deletion,normalised-insertion,normalised-deletion,pos,neg,pic,adp,aic,sic,randomisation"
    code, out, err = run(
        "vit",
        "images",
        "-o",
        "verdict",
        "--metric",
        metrics,
        "--limit",
        "4",
        "--steps",
        "3",
        "--samples",
        "4",
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    methods = {one["method"] for one in result["methods"]}
    assert methods == {
        "gradient", "gradient x input", "integrated gradients", "gradient shap", "lime", "rise",
        "meaningful perturbation", "grad-cam",
    }  # fmt: skip
    assert any("cam is not defined" in note for note in result["notes"])
    assert {one["trust"] for one in result["methods"]} == {"unknown"}  # four images tell nothing
    assert {one["method"] for one in result["controls"]} == {"random", "centre", "edges"}
    for one in result["controls"]:
        assert one["correlation_with_random_weights"] == pytest.approx(1)
    assert len(result["methods"][0]["means"]) == 10


def test_the_same_seed_twice(run, folder):
    results = []
    for out in ("a", "b"):
        code, text, _ = run(
            "vit",
            "images",
            "-o",
            out,
            "--method",
            "lime,rise",
            "--samples",
            "8",
            "--steps",
            "3",
            "--limit",
            "5",
            "--json",
        )
        assert code == 0
        results.append(json.loads(text)["methods"])
    assert results[0] == results[1]
    assert (folder / "a" / "scores.jsonl").read_bytes() == (folder / "b" / "scores.jsonl").read_bytes()


def test_a_map_that_sees_the_model_is_told_from_one_that_does_not(run, folder):
    """A network that looks at one corner, and images that differ there."""
    from salience.features import attribution_suite, trust_report

    class Corner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2))
            with torch.no_grad():
                self.net[2].weight.zero_()
                self.net[2].weight[0, 0] = 20.0

        def forward(self, x):
            return self.net(x)

    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    images[:, 0, :4, :4] += 0.8
    model = Corner().eval()
    methods = attribution_suite(model, ["integrated gradients", "random", "centre", "edges"])
    methods["edges in disguise"] = methods["edges"]
    found = trust_report(model, images, torch.zeros(40, dtype=torch.long), methods)
    verdicts = {one.method: one for one in found.verdicts}
    assert verdicts["integrated gradients"].level == "yes"
    assert verdicts["integrated gradients"].words.startswith("better than a random map by every measure")
    assert verdicts["edges in disguise"].level == "no" and "not the model" in verdicts["edges in disguise"].words
    assert found.verdicts[0].method == "integrated gradients"


def test_an_existing_output(run, folder):
    assert run(*NET, *QUICK)[0] == 0
    code, _, err = run(*NET, *QUICK)
    assert code == 2 and "--overwrite" in err
    assert run(*NET, *QUICK, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "more, said",
    [
        (["--method", "gradcm"], "'grad-cam'"),
        (["--method", "gradient,gradient"], "different names"),
        (["--metric", "insertoin"], "'insertion'"),
        (["--metric", "randomisation"], "at least one measure"),
        (["--metric", "adp,adp"], "each once"),
        (["--method", "cam", "--layer", "conv"], "not defined"),
        (["--method", "grad-cam", "--layer", "convv"], "convv"),
        (["--target", "7"], "0..2"),
        (["--target", "best"], "--target"),
        (["--limit", "0"], "--limit"),
        (["--samples", "1"], "--samples"),
        (["--size", "ten"], "--size"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_usage(run, folder, more, said):
    code, out, err = run(*NET, *QUICK, *more)
    assert code == 2 and said in err, err
    assert len(err.strip().splitlines()) == 1 and not out
    assert names(folder) == ["images", "net.safetensors", "vit"]


def test_a_bad_picture_leaves_nothing_and_no_pictures_are_nothing_to_do(run, folder):
    (folder / "images" / "cat" / "99.png").write_bytes(b"no picture")
    code, _, err = run(*NET, *QUICK)
    assert code == 3 and "99.png" in err
    assert names(folder) == ["images", "net.safetensors", "vit"]
    (folder / "empty").mkdir()
    assert run("vit", "empty", "-o", "verdict")[0] == 4
    assert run("vit", "images/cat", "-o", "verdict", "--target", "label")[0] in (2, 3)


def test_bee_hangs_on_explain_and_learns_from_other_images(run, folder):
    options = ["--method", "bee", "--metric", "deletion", "--draws", "3", "--steps", "3", "--overlays", "0"]
    code, out, err = run(*NET, *options, "--measure", "8", "--json", verb="explain")
    assert code == 0, err
    notes = json.loads(out)["notes"]
    assert any("learned from 24 images that it is not measured on" in note for note in notes)
    assert any("the best of as many random maps" in note for note in notes)
    code, _, err = run(*NET, *options, "--measure", "20", "--overwrite", "--finetune", verb="explain")
    assert code == 0 and "too few to learn from" in err
    code, _, err = run(*NET, "--method", "gradient", "--metric", "deletion", "--overwrite", verb="explain")
    assert code == 2 and "--metric belongs to --method bee" in err
    code, _, err = run(*NET, "--method", "bee", "--metric", "delete", "--overwrite", verb="explain")
    assert code == 2 and "nearest names: 'deletion'" in err


# On real data -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.slow
def test_a_pretrained_network_on_cifar(run, folder, resnet20):
    code, out, err = run(
        *resnet20, "-o", "verdict", "--limit", "60",
        "--method", "grad-cam,rise,gradient", "--samples", "150", "--steps", "10", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = {one["method"]: one for one in json.loads(out)["methods"]}
    for method in ("grad-cam", "rise"):
        for measure in ("insertion", "deletion"):
            assert found[method]["better_than_random_by"][measure][1] > 0, (method, measure)
    assert all(abs(one["correlation_with_random_weights"]) < 0.7 for one in found.values())
    edges = next(one for one in json.loads(out)["controls"] if one["method"] == "edges")
    assert edges["correlation_with_random_weights"] == pytest.approx(1)
