"""`salience compress channels` and `sparsify`: measured first, whole or not at all, one sentence for each failure."""

from __future__ import annotations

import io
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file, save_model

from model.conftest import tokenizer as tokenizer
from salience.io import verify_output
from salience.model import load
from salience.scores import Scores
from salience.weights import prunable, synflow_masks
from tiny import directory_hash, plain, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "compress")


def pictures(path: Path, model, rows: int = 24) -> None:
    """Images with the classes that `model` gives them, so that the model before is right on all of them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
    with torch.no_grad():
        output = model((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25)
    labels = getattr(output, "logits", output).argmax(1).tolist()
    encoded = []
    for each in pixels:
        stream = io.BytesIO()
        Image.fromarray(each).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(encoded, kind), "label": labels}), path)


@pytest.fixture
def resnet(folder: Path):
    model = save("resnet", folder / "net")
    pictures(folder / "test.parquet", model)
    return model


NORMAL = ["--image-mean", "0.5,0.5,0.5", "--image-std", "0.25,0.25,0.25"]
MEASURED = ["--evaluate", "test.parquet", *NORMAL]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Channels


def test_channels_are_merged_and_measured_first(run, folder: Path, resnet) -> None:
    before = directory_hash(folder / "net")
    code, out, err = run("channels", "net", "--keep", "0.75", *MEASURED, "-o", "out")
    assert code == 0 and err == ""
    assert out.startswith("After is") and "L1 norm here: accuracy" in out.splitlines()[0]
    assert "before" in out and "random" in out and "channels   48 -> 36 in 4 hidden widths (1 left" in out
    assert "load it with salience.model.load" in out
    assert (
        names(folder) == ["net", "out", "out.report.html", "test.parquet"] and directory_hash(folder / "net") == before
    )
    narrow = load(folder / "out").model
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in resnet.parameters())
    page = (folder / "out.report.html").read_text()
    assert "Measured on your data" in page and "Left as they are" in page


@pytest.mark.slow
def test_channels_in_json_with_every_method(run, folder: Path, resnet) -> None:
    for method, others in (("ifm", {"L1 norm", "random"}), ("l1", {"ifm", "random"}), ("random", {"ifm", "L1 norm"})):
        code, out, _ = run("channels", "net", "--keep", "0.5", "--method", method, *MEASURED, "-o", method, "--json")
        result = json.loads(out)
        assert (
            code == 0
            and result["method"] == method
            and set(result["evaluation"]["means"]) == {"before", "after", *others}
        )
        assert result["evaluation"]["means"]["before"] == 1.0 and result["params"][1] < result["params"][0]
        assert all(after == before // 2 for before, after in result["widths"].values())


@pytest.mark.parametrize("family", ["qwen2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gpt2"))])
def test_a_language_model_stays_one_that_from_pretrained_loads(family: str, run, folder: Path, tokenizer) -> None:
    import transformers

    save(family, folder / "lm", tokenizer)
    (folder / "text.txt").write_text("what counts\nis what counts here\nand nothing else counts\n" * 3)
    code, out, err = run("channels", "lm", "--keep", "0.5", "--evaluate", "text.txt", "-o", "out")
    assert code == 0, err
    assert "bits per token" in out and "salience.model.load" not in out
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert min(model.config.to_dict().get(key) or 999 for key in ("intermediate_size", "n_inner")) in (24, 64)
    assert (folder / "out" / "tokenizer.json").read_bytes() == (folder / "lm" / "tokenizer.json").read_bytes()


def test_a_file_with_its_architecture(run, folder: Path) -> None:
    model = plain().eval()
    save_model(model, str(folder / "net.safetensors"))
    pictures(folder / "test.parquet", model)
    base = ["net.safetensors", "--arch", "tiny:plain", *MEASURED]
    code, _, err = run("channels", *base, "--keep", "0.5", "-o", "out.safetensors")
    assert code == 0, err
    assert names(folder) == [
        "net.safetensors", "out.safetensors", "out.safetensors.manifest.json", "out.safetensors.report.html",
        "out.safetensors.shapes.json", "test.parquet",
    ]  # fmt: skip
    # What was narrowed can be narrowed again, and made sparse.
    again = ["out.safetensors", "--arch", "tiny:plain", *MEASURED]
    assert run("channels", *again, "--keep", "0.5", "-o", "less.safetensors")[0] == 0
    assert run("sparsify", *again, "--density", "0.5", "-o", "sparse.safetensors")[0] == 0
    assert load(folder / "less.safetensors", arch="tiny:plain").model.conv.out_channels == 1
    sparse = load(folder / "sparse.safetensors", arch="tiny:plain").model
    assert sparse.conv.out_channels == 2 and (sparse.conv2.weight == 0).any()


def test_a_command_measures(run, folder: Path, resnet) -> None:
    script = "import os,sys; print(os.path.getsize(sys.argv[1] + '/model.safetensors'))"
    (folder / "size.py").write_text(script)
    command = f"{sys.executable} size.py {{model}}"
    code, out, err = run(
        "channels", "net", "--keep", "0.5", "--evaluate-command", command, "--lower-is-better", "-o", "out"
    )
    assert code == 0, err
    assert out.startswith("After is") and "figure of the command" in out
    assert names(folder) == ["net", "out", "out.report.html", "size.py", "test.parquet"]


def test_thresholds_and_nothing_to_do(run, folder: Path, resnet) -> None:
    code, out, err = run("channels", "net", "--beta", "0.0", "-o", "out")
    assert code == 4 and "no two channels are within --beta 0.0" in err and names(folder) == ["net", "test.parquet"]
    code, out, _ = run("channels", "net", "--beta", "0.9", "--groups", "*stages.1*", "-o", "out")
    assert code == 0 and out.startswith("Not measured") and "not asked for" in (folder / "out.report.html").read_text()


@pytest.mark.parametrize(
    ("what", "arguments", "code", "text"),
    [
        ("channels", ["--keep", "0"], 2, "--keep"), ("channels", ["--keep", "0.5", "--beta", "0.1"], 2, "either"),
        ("channels", ["--beta", "1"], 2, "--beta"), ("channels", ["--method", "l1"], 2, "needs --keep"),
        ("channels", ["--method", "l1", "--keep", "0.5", "--beta", "0.2"], 2, "belong to --method ifm"),
        ("channels", ["--method", "random", "--keep", "0.5", "--rule", "sum_in"], 2, "belong to --method ifm"),
        ("channels", ["--keep", "0.5", "--groups", "nowhere"], 2, "nearest|there are"),
        ("channels", ["--keep", "0.5", "--input-shape", "3,x"], 2, "--input-shape"),
        ("channels", ["--keep", "0.5", "--input-shape", "1,16,16"], 2, "does not take an input of shape 1,16,16"),
        ("sparsify", ["-d", "0.5", "--input-shape", "1,16,16"], 2, "does not take an input of shape 1,16,16"),
        ("channels", ["--keep", "0.5", "--rule", "sum_in", "--keep-norm"], 2, "sum_in"),
        ("sparsify", [], 2, "--density"), ("sparsify", ["-d", "0.5", "--n-m", "2:4"], 2, "--density"),
        ("sparsify", ["-d", "1.5"], 2, "--density"), ("sparsify", ["--n-m", "two"], 2, "N:M"),
        ("sparsify", ["--n-m", "2:4", "--scope", "row"], 2, "--n-m"), ("sparsify", ["--n-m", "2:7"], 2, "multiple of 7"),
        ("sparsify", ["-d", "0.5", "--method", "wanda"], 2, "needs --data"),
        ("sparsify", ["-d", "0.5", "--data", "test.parquet"], 2, "means nothing"),
        ("sparsify", ["-d", "0.5", "--allocation", "erk", "--scope", "global"], 2, "--scope layer"),
        ("sparsify", ["-d", "0.5", "--allocation", "erk", "--layer-scores", "x.parquet"], 2, "either"),
        ("sparsify", ["-d", "0.5", "--exclude", "nothing.*"], 2, "exclude"),
        ("sparsify", ["-d", "0.5", "--layer-scores", "absent.parquet"], 3, "absent"),
        ("sparsify", ["-d", "0.5", "--evaluate", "absent.parquet"], 2, "absent"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_leaves_nothing(what, arguments, code, text, run, folder: Path, resnet) -> None:
    import re

    ended, out, err = run(what, "net", *arguments, "-o", "out")
    assert ended == code and out == "" and re.search(text, err) and err.count("\n") == 1
    assert names(folder) == ["net", "test.parquet"]


@pytest.mark.parametrize("what", [["channels", "--keep", "0.5"], ["sparsify", "-d", "0.5"]])
def test_outputs_are_not_replaced_unless_told(what, run, folder: Path, resnet) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("x")
    for extra in ([], ["--overwrite"]):
        code, _, err = run(what[0], "net", *what[1:], "-o", "out", *extra)
        assert code == 2 and "out" in err and (folder / "out" / "thesis.txt").exists()
    assert run(what[0], "net", *what[1:], "-o", "new")[0] == 0
    first = directory_hash(folder / "new")
    assert run(what[0], "net", *what[1:], "-o", "new")[0] == 2
    assert run(what[0], "net", *what[1:], "-o", "new", "--overwrite")[0] == 0
    assert directory_hash(folder / "new") == first
    assert run(what[0], "net", *what[1:], "-o", "net", "--overwrite", "--report", "r.html")[0] == 2
    assert run(what[0], "net", *what[1:], "-o", "nowhere/out")[0] == 2
    assert run(what[0], "absent", *what[1:], "-o", "other")[0] == 2
    assert names(folder) == ["net", "new", "new.report.html", "out", "test.parquet"]


def test_a_damaged_model_leaves_nothing(run, folder: Path, resnet) -> None:
    tensors = load_file(folder / "net" / "model.safetensors")
    tensors["classifier.1.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "net" / "model.safetensors", {"format": "pt"})
    for what in (["channels", "--keep", "0.5"], ["sparsify", "-d", "0.5"]):
        code, _, err = run(what[0], "net", *what[1:], "-o", "out")
        assert code in (2, 3) and "classifier.1.weight" in err
    assert names(folder) == ["net", "test.parquet"]


@pytest.mark.parametrize("what", [["channels", "--keep", "0.5"], ["sparsify", "-d", "0.5"]])
def test_an_interrupted_run_leaves_nothing(what, run, folder: Path, resnet, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    for module in ("shards", "saving"):
        monkeypatch.setattr(f"salience.model.{module}.copy_rest", interrupt)
    code, _, err = run(what[0], "net", *what[1:], "-o", "out")
    assert code == 130 and "interrupted" in err and names(folder) == ["net", "test.parquet"]


# Sparsify


def test_weights_are_masked_and_measured_first(run, folder: Path, resnet) -> None:
    before = directory_hash(folder / "net")
    code, out, err = run("sparsify", "net", "--density", "0.5", *MEASURED, "-o", "out", "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and set(result["evaluation"]["means"]) == {"before", "after", "random"}
    sparse = load(folder / "out").model
    entries = prunable(sparse)
    kept = sum(int((e.weight != 0).sum()) for e in entries.values())
    assert kept == result["kept"] == round(0.5 * result["weights"])
    original = prunable(load(folder / "net").model)
    assert all(torch.equal(e.weight[e.weight != 0], original[n].weight[e.weight != 0]) for n, e in entries.items())
    assert directory_hash(folder / "net") == before
    assert {p.name for p in (folder / "out").iterdir()} == {p.name for p in (folder / "net").iterdir()} | {
        "manifest.json"
    }
    assert verify_output(folder / "out").ok
    code, out, _ = run("sparsify", "net", "--density", "0.5", *MEASURED, "-o", "out", "--overwrite")
    assert out.startswith("After is") and "random here" in out.splitlines()[0] and "with or without zeros" in out


@pytest.mark.parametrize(
    "method", ["wanda", *(pytest.param(m, marks=pytest.mark.slow) for m in ("snip", "grasp", "synflow", "random"))]
)
def test_every_method_against_magnitude_and_random(method: str, run, folder: Path, resnet) -> None:
    data = ["--data", "test.parquet"] if method in ("wanda", "snip", "grasp") else []
    code, out, err = run("sparsify", "net", "-d", "0.4", "--method", method, *data, *MEASURED, "-o", "out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert list(result["evaluation"]["means"]) == ["before", "after", "magnitude", "random"]
    assert abs(result["density"] - 0.4) < 0.01


@pytest.mark.slow
def test_synflow_within_layers_ranks_all_of_a_layer(run, folder: Path, resnet) -> None:
    """Within layers masks come from rounds of their own: weights are not filled up by position."""
    code, _, err = run("sparsify", "net", "-d", "0.3", "--method", "synflow", "--scope", "layer",
                       "--input-shape", "3,16,16", "-o", "out")  # fmt: skip
    assert code == 0, err
    expected = synflow_masks(resnet, torch.zeros(1, 3, 16, 16), 0.3, scope="layer")
    after = load(folder / "out").model
    for name, mask in expected.items():
        assert torch.equal(after.get_parameter(name) != 0, mask & (resnet.get_parameter(name) != 0)), name


@pytest.mark.parametrize("family", ["qwen2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gpt2"))])
def test_a_language_model_by_two_of_four(family: str, run, folder: Path, tokenizer) -> None:
    import transformers

    save(family, folder / "lm", tokenizer, shard_size="60KB")
    (folder / "text.txt").write_text("what counts\nis what counts here\nand nothing else counts\n" * 3)
    base = ["sparsify", "lm", "--n-m", "2:4", "--method", "wanda", "--data", "text.txt", "--evaluate", "text.txt"]
    code, out, err = run(*base, "-o", "out")
    assert code == 0, err
    assert "magnitude" in out and "bits per token" in out and "the output head was cut as well" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    for name, entry in prunable(model).items():
        moved = entry.weight.movedim(entry.in_axis, -1).reshape(-1, 4)
        assert ((moved != 0).sum(1) <= 2).all(), name
    if family == "qwen2":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list((folder / "out").glob("*.safetensors"))) == len(list((folder / "lm").glob("*.safetensors"))) > 1


def test_a_model_whose_file_has_other_names(run, folder: Path) -> None:
    save("vit", folder / "net")
    code, out, err = run("sparsify", "net", "-d", "0.3", "-o", "out", "--json")
    assert code == 0, err
    entries = prunable(load(folder / "out").model)
    assert sum(int((e.weight != 0).sum()) for e in entries.values()) == json.loads(out)["kept"]


def test_scores_of_layers_share_out_the_density(run, folder: Path, resnet) -> None:
    layers = [entry.layer for entry in prunable(resnet).values()]
    Scores(np.arange(1.0, len(layers) + 1), layers, "layer").save(folder / "layers.parquet")
    code, out, err = run("sparsify", "net", "-d", "0.2", "--layer-scores", "layers.parquet", "-o", "out", "--json")
    assert code == 0, err
    shares = list(json.loads(out)["layers"].values())
    assert shares == sorted(shares) and shares[-1] > 3 * shares[0]
    code, out, _ = run(
        "sparsify", "net", "-d", "0.5", "--allocation", "erk", "--grain", "kernel", "-o", "erk", "--json"
    )
    assert code == 0 and json.loads(out)["layers"]["classifier.1.weight"] == 1.0


def test_a_cut_network_is_told(run, folder: Path, resnet) -> None:
    code, _, err = run("sparsify", "net", "-d", "0.001", "-o", "out")
    assert code == 0 and "cuts the network" in err and err.count("\n") == 1


@pytest.mark.parametrize("what", [["channels", "--keep", "0.5"], ["sparsify", "--density", "0.5"]])
def test_only_an_earlier_output_is_replaced(run, folder: Path, resnet, what: list[str]) -> None:
    """Neither a folder of notes nor a model that another program wrote."""
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("mine")
    save("resnet", folder / "precious")
    before = directory_hash(folder / "precious")
    for out in ("notes", "precious"):
        code, _, err = run(what[0], "net", *what[1:], "-o", out, "--overwrite")
        assert code == 2 and "not replaced" in err
    assert (folder / "notes" / "thesis.txt").read_text() == "mine" and directory_hash(folder / "precious") == before
