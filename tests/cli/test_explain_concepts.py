"""`salience explain concepts`: what it writes and says, exit codes, and nothing half-written."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_model

from tiny import Plain


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``net.safetensors`` of tiny:plain that predicts both of two classes, and ``images`` of them."""
    generator = np.random.default_rng(0)
    for i in range(48):
        file = tmp_path / "images" / ("cat" if i < 24 else "<dog>") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3))
        pixels[..., 0 if i < 24 else 2] //= 4
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    torch.manual_seed(0)
    net = Plain().eval()
    with torch.no_grad():  # class 1 is what the other channel of the last map speaks for
        pictures = [np.asarray(Image.open(f)) for f in sorted((tmp_path / "images").rglob("*.png"))]
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        features = net.relu2(net.conv2(net.relu(net.norm(net.conv(x))))).mean((2, 3))
        apart = features[24:].mean(0) - features[:24].mean(0)  # "<dog>" comes first
        net.head.weight.copy_(torch.stack([-apart, apart, 0 * apart]) * 200)
        middle = (features.mean(0) @ apart) * 200
        net.head.bias.copy_(torch.stack([middle, -middle, torch.tensor(-50.0)]))
    save_model(net, str(tmp_path / "net.safetensors"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "explain", "concepts")


NET = ["net.safetensors", "images", "--arch", "tiny:plain", "-o", "found", "--layer", "relu2"]
QUICK = ["--concepts", "3", "--patch-size", "8", "--design", "8", "--refine", "0", "--measure", "6"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_verdict_comes_first_and_the_folder_is_whole(run, folder):
    code, out, err = run(*NET, *QUICK, "--class", "cat", "--class", "0", "--refine", "1", "--earlier-layer", "relu")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("cat: ") and "random orders" in lines[0]
    assert lines[1].startswith("<dog>: ") and "importance" in out
    tensors = load_file(folder / "found" / "concepts.safetensors")
    assert tensors["class1.dictionary"].shape == (3, 6) and float(tensors["class1.codes"].min()) >= 0
    assert any(name.startswith("class0.concept") for name in tensors)
    boxes = tensors["class1.boxes"]
    assert boxes.shape[1] == 3 and len(boxes) == len(tensors["class1.codes"]) and int(boxes[:, 0].max()) < 48
    rows = [json.loads(line) for line in open(folder / "found" / "concepts.jsonl", encoding="utf-8")]
    assert [row["place"] for row in rows] == [1, 2, 3, 1, 2, 3] and rows[0]["name"] == "cat"
    assert all(row["low"] <= row["importance"] <= row["high"] for row in rows)
    values = [row["importance"] for row in rows[:3]]
    assert values == sorted(values, reverse=True) and rows[0]["top_crops"][0]["id"].endswith(".png")
    assert {name.split("-")[0] for name in names(folder / "found" / "crops")} == {"class0", "class1"}
    page = (folder / "found" / "report.html").read_text(encoding="utf-8")
    assert "Concepts out, the most important first" in page and "<dog>" not in page and "What concept" in page
    manifest = json.loads((folder / "found" / "manifest.json").read_text())
    assert manifest["layer"] == "relu2" and manifest["classes"] == [1, 0] and "report.html" in manifest["files"]
    assert names(folder) == ["found", "images", "net.safetensors"]


def test_json_and_the_same_seed_twice(run, folder):
    texts = []
    for out in ("a", "b"):
        code, text, _ = run(*NET[:-4], "-o", out, "--layer", "relu2", *QUICK, "--class", "1", "--seed", "3", "--json")
        assert code == 0
        texts.append(json.loads(text)["classes"])
    assert texts[0] == texts[1]
    (one,) = texts[0]
    assert (one["images"], one["learned_from"], one["measured"]) == (24, 17, 6)  # of 7 held out
    assert len(one["over_random"]) == 3 and set(one["areas"]) > {"Sobol", "random", "TCAV"}
    assert [len(concept["importance"]) for concept in one["concepts"]] == [3, 3, 3]
    assert (folder / "a" / "concepts.safetensors").read_bytes() == (folder / "b" / "concepts.safetensors").read_bytes()


def test_a_dry_run_writes_nothing(run, folder):
    code, out, _ = run(*NET, *QUICK, "--class", "cat", "--dry-run")
    assert code == 0 and "48 of 3 x 16 x 16" in out and "40 passes" in out
    code, out, _ = run(*NET[:-2], *QUICK, "--class", "cat", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["layer"] == "relu2" and json.loads(out)["patch_size"] == 8
    assert names(folder) == ["images", "net.safetensors"]


def test_an_existing_output(run, folder):
    arguments = [*NET, *QUICK, "--class", "1"]
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments)
    assert code == 2 and "--overwrite" in err
    assert run(*arguments, "--overwrite", "--report", "page.html")[0] == 0
    assert (folder / "page.html").exists() and "report.html" not in names(folder / "found")


def test_a_concept_that_cannot_be_taken_apart_is_told(run, folder):
    code, _, err = run(*NET, *QUICK, "--class", "1", "--refine", "1")
    assert code == 0 and "was not taken apart" in err and "finer resolution" in err


@pytest.mark.parametrize(
    "more, said",
    [
        (["--class", "cow"], "'cat'"),
        (["--class", "cat", "--method", "kraft"], "'craft'"),
        (["--class", "cat", "--concepts", "0"], "--concepts"),
        (["--class", "cat", "--concepts", "7"], "1..6"),
        (["--class", "cat", "--patch-size", "17"], "patch_size"),
        (["--class", "cat", "--crops", "round"], "crops"),
        (["--class", "cat", "--design", "1"], "--design"),
        (["--class", "cat", "--measure", "1"], "--measure"),
        (["--class", "cat", "--layer", "rellu2"], "'relu2'"),
        (["--class", "cat", "--refine", "1", "--earlier-layer", "relu3"], "'relu2'"),
        (["--class", "cat", "--size", "ten"], "--size"),
        (["--class", "cat", "--device", "cuda:99"], "--device"),
        (["--class", "cat", "--report", "page.txt"], ".html"),
    ],
)
def test_usage(run, folder, more, said):
    code, out, err = run(*NET, *QUICK, *more)
    assert code == 2 and said in err, err
    assert len(err.strip().splitlines()) == 1 and not out
    assert names(folder) == ["images", "net.safetensors"]


def test_a_layer_with_negative_values_and_a_bad_picture(run, folder):
    code, _, err = run(*NET, *QUICK, "--class", "cat", "--layer", "norm")
    assert code == 3 and "ReLU" in err
    (folder / "images" / "cat" / "99.png").write_bytes(b"no picture")
    code, _, err = run(*NET, *QUICK, "--class", "cat")
    assert code == 3 and "99.png" in err
    assert names(folder) == ["images", "net.safetensors"]


def test_a_class_that_is_never_predicted(run, folder):
    code, _, err = run(*NET, *QUICK, "--class", "2")
    assert code == 4 and "class 2" in err and "10 at least" in err
    assert names(folder) == ["images", "net.safetensors"]


# Holistic concepts --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder that hardly learns, as it is fitted five times in every comparison."""
    from salience.concepts import SAEConcepts
    from salience.concepts.holistic import explain

    monkeypatch.setitem(explain.EXTRACTORS, "sae", functools.partial(SAEConcepts, steps=30))


HOLISTIC = [*NET, "--method", "holistic-concepts", "--concepts", "3", "--measure", "6"]


def test_holistic_concepts_of_a_pair(run, folder, quick):
    code, out, err = run(*HOLISTIC, "--class", "cat", "--class", "<dog>", "--clusters", "3")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("cat: ") and "random orders" in lines[0] and lines[1].startswith("<dog>: ")
    assert "strategies of 48 images" in out and "strategy 3" in out
    tensors = load_file(folder / "found" / "concepts.safetensors")
    assert tensors["dictionary"].shape == (3, 6) and tensors["importance"].shape == (48, 3)
    assert sorted(tensors["rows"].tolist()) == list(range(48)) and set(tensors["strategy"].tolist()) == {0, 1, 2}
    rows = [json.loads(line) for line in open(folder / "found" / "concepts.jsonl", encoding="utf-8")]
    assert [row["place"] for row in rows] == [1, 2, 3, 1, 2, 3] and rows[0]["name"] == "cat"
    assert all(row["low"] <= row["importance"] <= row["high"] for row in rows)
    strategies = [json.loads(line) for line in open(folder / "found" / "strategies.jsonl", encoding="utf-8")]
    assert sum(each["images"] for each in strategies) == 48 == sum(len(each["ids"]) for each in strategies)
    assert sum(each["labelled"]["cat"] for each in strategies) == 24
    measures = json.loads((folder / "found" / "measures.json").read_text())
    assert measures["extractors"]["k-means"]["sparsity"] == pytest.approx(2 / 3) and not measures["notes"]
    faithful = measures["classes"][0]["faithfulness"]
    assert faithful["gradient_input"]["mu_fidelity"] > 0.99  # what follows "relu2" is linear
    assert faithful["gradient_input"]["deletion"] <= min(each["deletion"] for each in faithful.values()) + 1e-4
    page = (folder / "found" / "report.html").read_text(encoding="utf-8")
    assert "Strategies behind" in page and "Extractors" in page and "labelled cat" in page and "<dog>" not in page
    manifest = json.loads((folder / "found" / "manifest.json").read_text())
    assert manifest["extractor"] == "nmf" and manifest["layer"] == "relu2" and "strategies.jsonl" in manifest["files"]
    assert any(name.startswith("class1-concept") for name in names(folder / "found" / "crops"))


@pytest.mark.parametrize("extractor, importance", [
    ("k-means", "occlusion"), ("pca", "kernelshap"), ("semi-nmf", "rise"), ("sae", "sobol"), ("random", "integrated_gradients"),
])  # fmt: skip
def test_any_extractor_and_any_importance_and_the_same_seed_twice(run, folder, quick, extractor, importance):
    texts = []
    for out in ("a", "b"):
        code, text, err = run(*NET[:-4], "-o", out, "--layer", "relu2", *HOLISTIC[6:], "--class", "1", "--extractor",
                              extractor, "--importance", importance, "--seed", "3", "--json")  # fmt: skip
        assert code == 0, err
        texts.append(json.loads(text))
    assert {**texts[0], "out": "", "report": ""} == {**texts[1], "out": "", "report": ""}
    assert (texts[0]["extractor"], texts[0]["importance"], texts[0]["layer"]) == (extractor, importance, "relu2")
    assert len(texts[0]["strategies"]) == 5 and importance in texts[0]["classes"][0]["faithfulness"]
    assert (folder / "a" / "concepts.safetensors").read_bytes() == (folder / "b" / "concepts.safetensors").read_bytes()


def test_a_layer_with_negative_values_leaves_nmf_out(run, folder, quick):
    code, out, err = run(*HOLISTIC, "--class", "1", "--layer", "norm", "--extractor", "pca", "--json")
    assert code == 0, err
    assert json.loads(out)["extractors"]["nmf"] is None and "ReLU" in json.loads(out)["notes"][0]
    code, _, err = run(*HOLISTIC, "--class", "1", "--layer", "norm", "--overwrite")
    assert code == 3 and "ReLU" in err


def test_a_layer_of_vectors_has_no_maps_and_alike_importances_one_strategy(run, folder, quick):
    code, out, err = run(*HOLISTIC, "--class", "1", "--layer", "head", "--extractor", "pca", "--importance", "saliency")
    assert code == 0 and "one strategy" in err and "strategy 1" in out and "strategy 2" not in out, err


def test_a_dry_run_of_holistic_concepts(run, folder):
    code, out, _ = run(*HOLISTIC, "--class", "cat", "--dry-run")
    assert code == 0 and "nmf, 3 concepts" in out and "nothing was written" in out
    code, out, _ = run(*HOLISTIC, "--class", "cat", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["importance"] == "gradient_input"
    assert names(folder) == ["images", "net.safetensors"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--extractor", "ica"], "'pca'"),
        (["--importance", "lime"], "'rise'"),
        (["--clusters", "0"], "--clusters"),
        (["--clusters", "99"], "n_clusters"),
        (["--concepts", "7"], "1..6"),
        (["--patch-size", "8"], "belongs to --method craft"),
        (["--method", "craft", "--extractor", "nmf"], "belongs to --method holistic-concepts"),
    ],
)
def test_usage_of_holistic_concepts(run, folder, quick, more, said):
    code, out, err = run(*HOLISTIC, "--class", "cat", *more)
    assert code == 2 and said in err, err
    assert len(err.strip().splitlines()) == 1 and not out
    assert names(folder) == ["images", "net.safetensors"]


# On real data -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.slow
def test_concepts_of_a_pretrained_network_carry_its_classes(run, folder, resnet20):
    code, out, err = run(
        *resnet20, "-o", "found",         "--limit", "2000", "--measure", "40", "--class", "3", "--class", "7", "--json",
    )  # fmt: skip
    assert code == 0, err
    for one in json.loads(out)["classes"]:
        assert one["over_random"][1] > 0 and one["random_orders_beaten"] >= 0.8, one
        assert one["prediction_kept"] > 0.5 and one["concepts"][0]["effect"] > 0
        assert one["layer"] == "layer3" and list(one["parts"].values()) == ["layer2"]


@pytest.mark.realdata
@pytest.mark.slow
def test_strategies_of_a_confused_pair(run, folder, resnet20):
    code, out, err = run(
        *resnet20, "-o", "found",         "--limit", "1500", "--measure", "30", "--class", "3", "--class", "5", "--method", "holistic-concepts", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["layer"] == "layer3" and found["extractors"]["nmf"]["agreement"] > 0.9
    assert found["extractors"]["random"]["relative_l2"] > found["extractors"]["nmf"]["relative_l2"]
    for one in found["classes"]:
        assert one["better_than_random"] and one["faithfulness"]["gradient_input"]["mu_fidelity"] > 0.99
    right = [each["correct"] for each in found["strategies"]]
    assert max(right) - min(right) > 0.1  # some strategies are worth more than others
