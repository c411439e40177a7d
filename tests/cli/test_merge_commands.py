"""`compress delta`, `merge delta`, `merge permute`: what they print, write, refuse and leave behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from salience.model import load
from tiny import VOCABULARY, build, directory_hash, plain


@pytest.fixture
def run(salience):
    return salience


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


@pytest.fixture
def models(tmp_path, tokenizer) -> Path:
    """A base and two fine-tuned GPT-2s that know a little, and text like what they were tuned on."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{(start + i) % 40}" for i in range(20)) for start in rng.integers(0, 40, 40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, steps in (("base", 0), ("one", 30), ("two", 25)):
        model = build("gpt2").train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts[:16]])
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_compress_delta_measures_itself_and_prints_that_first(run, models):
    before = {name: directory_hash(models / name) for name in ("base", "one")}
    code, out, err = run(
        "compress", "delta", models / "base", models / "one", "--rate", "0.5", "--rescale", "global",
        "--evaluate", models / "text.jsonl", "-o", models / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "Loading weights" not in err  # bars of others, one for each model that is loaded
    first = out.splitlines()[0]
    assert first.startswith("Darex is ") and "here: bits per token" in first and "95 % interval" in first
    rows = [line.split() for line in out.splitlines() if line.split()]
    scores = {row[0]: float(row[1]) for row in rows if row[0] in ("dare", "magnitude")}
    assert f"{min(('dare', 'magnitude'), key=scores.get)} here" in first  # the strongest rival decides
    for name in ("fine-tuned", "darex", "dare", "magnitude", "base"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert "darex: one q for all layers by validation" in out
    assert {name: directory_hash(models / name) for name in before} == before
    pruned, one, base = (load(models / name).model for name in ("out", "one", "base"))
    name = "transformer.h.1.mlp.c_fc.weight"
    same = (pruned.get_parameter(name) == base.get_parameter(name)).double().mean()
    assert 0.45 < same < 0.55 and torch.equal(pruned.transformer.wte.weight, one.transformer.wte.weight)
    page = (models / "out.report.html").read_text()
    assert "The search" in page and "Recommended" in page
    assert not [path for path in models.iterdir() if path.name.startswith(".")]


def test_compress_delta_to_a_file_and_merge_from_it(run, models):
    file = models / "delta.safetensors"
    code, out, err = run(
        "compress", "delta", models / "base", models / "one", "--rate", "0.9", "--rescale", "0.2", "-o", file, "--json"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["measured"] is None and record["q"] == 0.2 and record["branch"] == "darex: q as given"
    run("compress", "delta", models / "base", models / "one", "--rate", "0.9", "--rescale", "0.2", "-o", models / "dir")
    code, out, err = run(
        "merge", "delta", file, file, "--base", models / "base", "--method", "task", "-o", models / "merged"
    )
    assert code == 0, err
    expected, merged = load(models / "dir").model, load(models / "merged").model
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, msg=name)


@pytest.mark.parametrize("options", [["--method", "dare"], ["--method", "magnitude"], ["--selection", "output"]])
def test_other_methods_of_compress_delta(run, models, options):
    code, out, err = run(
        "compress", "delta", models / "base", models / "one", "--rate", "0.5", "--evaluate", models / "text.jsonl",
        "-o", models / "out", *options, "--json",
    )  # fmt: skip
    assert code == 0, err
    measured = json.loads(out)["measured"]
    assert measured["examples"] == 20 and {"dare", "magnitude", "fine-tuned", "base"} <= set(measured["means"])


def test_a_command_chooses_and_measures(run, models):
    score = models / "score.py"
    score.write_text(
        "import sys\nimport numpy\nfrom safetensors.numpy import load_file\n"
        "w = load_file(sys.argv[1] + '/model.safetensors')['transformer.h.0.mlp.c_fc.weight']\n"
        "print('norm', float(numpy.abs(w).sum()))\n"
    )
    code, out, err = run(
        "compress", "delta", models / "base", models / "one", "--rate", "0.5", "--lower-is-better",
        "--evaluate-command", f"{sys.executable} {score} {{model}}", "-o", models / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "by the command" in out and "flatters" in err and "figure of the command" in out


def test_merge_delta_measures_each_model_and_the_mean(run, models):
    code, out, err = run(
        "merge", "delta", models / "one", models / "two", "--base", models / "base", "--method", "darex", "--rate",
        "0.5", "--evaluate", models / "text.jsonl", "-o", models / "out",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("Darex is ")
    for name in ("darex", "mean", "dare", "one", "two"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert "MB)" in out
    load(models / "out")
    code, out, err = run("merge", "delta", models / "one", models / "two", "-o", models / "plain")
    assert code == 0 and out.startswith("Not measured")


def test_a_sum_of_deltas_at_equal_weights_is_the_mean_and_is_not_compared_with_it(run, models):
    merge = (
        "merge",
        "delta",
        models / "one",
        models / "two",
        "--base",
        models / "base",
        "--evaluate",
        models / "text.jsonl",
    )
    code, out, err = run(*merge, "-o", models / "equal", "--json")
    assert code == 0, err
    assert set(json.loads(out)["measured"]["means"]) == {"task", "one", "two"} and "is the mean" in out
    code, out, err = run(*merge, "--weights", "1,1", "-o", models / "whole", "--json")
    assert code == 0, err
    assert set(json.loads(out)["measured"]["means"]) == {"task", "mean", "one", "two"}


@pytest.fixture
def networks(tmp_path) -> Path:
    """Two small CNNs as files, the second the first with its units in another order and a little noise; pictures."""
    from PIL import Image

    from salience.weights import apply_permutation, infer_spec

    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    model = build("plain")
    spec = infer_spec(model, torch.randn(2, 3, 16, 16))
    save_model(model, tmp_path / "a.safetensors")
    draw = torch.Generator().manual_seed(1)
    for name in "bc":
        orders = {each: torch.randperm(size, generator=draw) for each, size in spec.sizes.items()}
        other = plain()
        other.load_state_dict(apply_permutation(spec, orders, model.state_dict()))
        save_model(other, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("options", [[], ["--method", "activations"], ["--mode", "mean"]])
def test_merge_permute_puts_shuffled_networks_back(run, networks, options):
    files = [networks / f"{name}.safetensors" for name in "abc"]
    code, out, err = run(
        "merge", "permute", *files, "--arch", "tiny:plain", "--evaluate", networks / "pictures", "-o",
        networks / "m.safetensors", *options,
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("Permuted mean is ") and "plain mean" in out
    merged = load(networks / "m.safetensors", arch="tiny:plain").model
    for name, parameter in build("plain").named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, msg=name)


def test_merge_permute_without_data_and_with_directories(run, networks, tmp_path):
    code, out, err = run(
        "merge", "permute", networks / "a.safetensors", networks / "b.safetensors", "--arch", "tiny:plain",
        "--input-shape", "3,16,16", "-o", networks / "m.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["measured"] is None and record["R(0.3) after"] == pytest.approx(1, abs=1e-5)
    assert any("batch normalisation" in note for note in record["notes"])
    for seed, name in enumerate(("one", "two")):
        model = build("vit")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        model.save_pretrained(tmp_path / name)
    code, out, err = run(
        "merge", "permute", tmp_path / "one", tmp_path / "two", "--evaluate", networks / "pictures", "-o",
        tmp_path / "both",
    )  # fmt: skip
    assert code == 0, err
    assert "The line between" in (tmp_path / "both.report.html").read_text()
    load(tmp_path / "both")


def test_what_is_refused(run, models, networks, tmp_path):
    pair = ["compress", "delta", models / "base", models / "one"]
    for arguments, code, words in (
        ([*pair, "-o", models / "one"], 2, "exists"),
        ([*pair, "-o", models / "no" / "out"], 2, "does not exist"),
        ([*pair, "-o", models / "x"], 2, "give data or a command"),
        ([*pair, "-o", models / "x", "--method", "dare", "--rescale", "0.5"], 2, "belong to --method darex"),
        ([*pair, "-o", models / "x", "--rescale", "many"], 2, "--rescale"),
        ([*pair, "-o", models / "x", "--rate", "1", "--rescale", "1"], 2, "p: got"),
        ([*pair, "-o", models / "x", "--rescale", "1", "--lower-is-better"], 2, "goes with"),
        ([*pair, "-o", models / "x", "--evaluate", models / "none.txt"], 2, "not there"),
        ([*pair, "-o", models / "x", "--report", "page.txt", "--rescale", "1"], 2, "--report"),
        (["merge", "delta", models / "one", "-o", models / "x"], 2, "two or more"),
        (["merge", "delta", models / "one", models / "two", "-o", models / "x", "--rate", "0.5"], 2, "--rate"),
        (["merge", "delta", models / "one", models / "two", "-o", models / "x", "--weights", "a"], 2, "--weights"),
        (["merge", "delta", models / "one", models / "two", "-o", models / "x", "--method", "dare"], 2, "base"),
        (["merge", "permute", networks / "a.safetensors", networks / "b.safetensors", "--arch", "tiny:plain", "-o",
          networks / "x.safetensors"], 2, "wired"),
        (["merge", "permute", models / "one", models / "base", "-o", models / "x", "--method", "activations",
          "--mode", "mean"], 2, "--mode"),
    ):  # fmt: skip
        got, _, err = run(*arguments)
        assert got == code and words in err and "Traceback" not in err, (arguments, err)
    build("llama").save_pretrained(tmp_path / "llama")
    got, _, err = run("compress", "delta", tmp_path / "llama", models / "one", "--rescale", "1", "-o", models / "x")
    assert got == 3 and "architecture" in err
    assert not (models / "x").exists() and not [path for path in models.iterdir() if path.name.startswith(".")]


def test_overwrite_replaces(run, models):
    command = ["merge", "delta", models / "one", models / "two", "-o", models / "out"]
    assert run(*command)[0] == 0
    assert run(*command)[0] == 2
    assert run(*command, "--overwrite", "--weights", "0,1")[0] == 0
    merged, two = load(models / "out").model, load(models / "two").model
    for name, parameter in two.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter)


def test_only_an_earlier_output_is_replaced(run, models, networks, tmp_path):
    """A directory of the user's own survives --overwrite, and nothing is computed before it is refused."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    build("gpt2").save_pretrained(tmp_path / "other")  # a model, but not one that we wrote
    before = {name: directory_hash(tmp_path / name) for name in ("mine", "other")}
    for command in (
        ["compress", "delta", models / "base", models / "one", "--rescale", "1"],
        ["merge", "delta", models / "one", models / "two"],
        ["merge", "permute", models / "one", models / "two", "--input-shape", "4"],
    ):
        for name in before:
            code, _, err = run(*command, "--overwrite", "-o", tmp_path / name)
            assert code == 2 and "not replaced" in err.replace("\n", " "), (command, err)
    assert {name: directory_hash(tmp_path / name) for name in before} == before


@pytest.mark.parametrize("name", ["base", "one", "two", "one/inside", ".", "delta.safetensors"])
def test_an_input_is_never_the_output(run, models, name):
    file = models / "delta.safetensors"
    code, _, err = run(
        "compress", "delta", models / "base", models / "two", "--rate", "0", "--method", "dare", "-o", file
    )
    assert code == 0, err
    before = {each: directory_hash(models / each) for each in ("base", "one", "two")} | {"file": file.read_bytes()}
    for command in (
        ["compress", "delta", models / "base", models / "one", "--rescale", "1"],
        ["merge", "delta", models / "one", models / "two", "--base", models / "base", "--method", "task"],
        ["merge", "delta", models / "one", file, "--base", models / "base", "--method", "task"],
        ["merge", "permute", models / "one", models / "two", models / "base", "--evaluate", models / "text.jsonl"],
    ):
        if command[1] == "delta" and command[0] == "compress" and name in ("two", "delta.safetensors"):
            continue
        if command[1] == "permute" and name == "delta.safetensors":
            continue
        if file in command and name == "two":
            continue
        code, _, err = run(*command, "--overwrite", "-o", models / name)
        assert code == 2 and "Traceback" not in err, (command, err)
    assert {each: directory_hash(models / each) for each in ("base", "one", "two")} | {
        "file": file.read_bytes()
    } == before


def test_outputs_have_a_manifest_that_holds(run, models):
    from salience.io import verify_output

    assert run("merge", "delta", models / "one", models / "two", "-o", models / "out")[0] == 0
    verify_output(models / "out")
    again = ["merge", "delta", models / "out", models / "two", "-o", models / "again"]  # an output as an input
    assert run(*again)[0] == 0
    verify_output(models / "again")
    load(models / "again")
    pruned = ["compress", "delta", models / "base", models / "again", "--rescale", "1", "-o", models / "pruned"]
    assert run(*pruned, "--evaluate", models / "text.jsonl")[0] == 0
    verify_output(models / "pruned")


def test_an_input_shape_that_the_model_does_not_take(run, networks, tmp_path):
    for name in ("one", "two"):
        build("vit").save_pretrained(tmp_path / name)
    code, _, err = run(
        "merge", "permute", tmp_path / "one", tmp_path / "two", "--input-shape", "4", "-o", tmp_path / "x"
    )
    assert code == 2 and "does not take shape (2, 4)" in err.replace("\n", " ") and "Traceback" not in err


def test_a_merge_is_judged_on_other_masks_than_it_was_chosen_on(run, models, monkeypatch):
    from salience.weights.darex import measured

    seen: dict[str, set[int]] = {}
    original = measured.merge_directories

    def spy(*arguments, seed, **options):
        seen.setdefault(Path(arguments[1]).name, set()).add(seed)
        return original(*arguments, seed=seed, **options)

    monkeypatch.setattr(measured, "merge_directories", spy)
    score = models / "score.py"
    score.write_text("print(1)\n")
    for options in (
        ["--evaluate", models / "text.jsonl"],
        ["--evaluate-command", f"{sys.executable} {score} {{model}}"],
    ):
        seen.clear()
        code, _, err = run(
            "merge", "delta", models / "one", models / "two", "--base", models / "base", "--method", "darex", "--rate",
            "0.5", "--overwrite", "-o", models / "out", *options,
        )  # fmt: skip
        assert code == 0, err
        assert len(seen["candidate"]) == 1 and seen["candidate"].isdisjoint(seen["merged"] | seen["dare"])
    assert "flatters" in err


def test_a_delta_file_that_could_not_be_used_is_refused_at_once(run, tmp_path):
    """A new head, or other classes: base and delta alone would not give the model back."""
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"vocab_size": 30}
    t.BertForMaskedLM(t.BertConfig(**small)).save_pretrained(tmp_path / "base")
    t.BertForSequenceClassification(t.BertConfig(num_labels=3, **small)).save_pretrained(tmp_path / "tuned")
    classes = t.BertConfig(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}, **small)
    t.BertForSequenceClassification(classes).save_pretrained(tmp_path / "named")
    options = ["--rescale", "1", "-o", tmp_path / "delta.safetensors"]
    for base, tuned, words in (("base", "tuned", "new head"), ("tuned", "named", "id2label")):
        code, _, err = run("compress", "delta", tmp_path / base, tmp_path / tuned, *options)
        assert code == 2 and words in err and "name a directory" in err.replace("\n", " "), err
    code, _, err = run(
        "compress", "delta", tmp_path / "base", tmp_path / "tuned", "--rescale", "1", "-o", tmp_path / "dir"
    )
    assert code == 0 and "classifier" in err and "kept as fine-tuned" in err.replace("\n", " "), err
    load(tmp_path / "dir")


def test_a_dry_run_checks_and_writes_nothing(run, models):
    before = sorted(path.name for path in models.iterdir())
    size = (models / "one" / "model.safetensors").stat().st_size
    code, out, err = run(
        "compress",
        "delta",
        models / "base",
        models / "one",
        "--rescale",
        "1",
        "--dry-run",
        "--json",
        "-o",
        models / "x",
    )
    assert code == 0, err
    assert json.loads(out)["bytes to read"] == 2 * size and json.loads(out)["tensors to prune"] > 6
    code, out, err = run("merge", "delta", models / "one", models / "two", "--dry-run", "-o", models / "x")
    assert code == 0 and "nothing written" in out, err
    (models / "two" / "config.json").write_text('{"model_type": "llama"}')
    for command in (["merge", "delta", models / "one"], ["compress", "delta", models / "base", "--rescale", "1"]):
        code, _, err = run(*command, models / "two", "--dry-run", "-o", models / "x")
        assert code == 3 and "architecture" in err
    assert sorted(path.name for path in models.iterdir()) == before


def test_pictures_are_prepared_as_told_for_deltas_too(run, networks, tmp_path):
    for seed, name in enumerate(("base", "one", "two")):
        model = build("vit")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    0.01 * seed * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                )
        model.save_pretrained(tmp_path / name)
    options = ["--evaluate", networks / "pictures", "--image-size", "16", "--image-mean", "0.5,0.5,0.5", "--image-std"]
    for number, command in enumerate(
        (
            ["compress", "delta", tmp_path / "base", tmp_path / "one", "--method", "dare", "--rate", "0.5"],
            ["merge", "delta", tmp_path / "one", tmp_path / "two"],
        )
    ):
        assert run(*command, *options, "a", "-o", tmp_path / f"out{number}")[0] == 2
        code, out, err = run(*command, *options, "0.5,0.5,0.5", "-o", tmp_path / f"out{number}")
        assert code == 0 and "accuracy" in out, err


def test_an_interrupted_run_leaves_nothing(run, models, monkeypatch):
    from salience.weights.darex import measured

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    before = sorted(path.name for path in models.iterdir())
    monkeypatch.setattr(measured, "compare", interrupt)
    command = [
        "merge",
        "delta",
        models / "one",
        models / "two",
        "--evaluate",
        models / "text.jsonl",
        "-o",
        models / "x",
    ]
    assert run(*command)[0] == 130
    assert sorted(path.name for path in models.iterdir()) == before
    monkeypatch.undo()
