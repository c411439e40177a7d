"""`salience compress quantize` on directories as users have them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from salience.cli import app
from salience.errors import DataError, InputError, NothingToDo
from salience.io import verify_output
from salience.scores import Scores
from salience.weights import load_packed
from tiny import directory_hash

LETTERS = "abcdefghijklmnopqrstuvwxyz "
LINES = [
    "the cat sat on the mat and saw a dog",
    "a dog ran to the cat",
    "birds sing in the old tree",
    "we read and write",
]


def run(*arguments):
    result = CliRunner().invoke(app, ["compress", "quantize", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def write(path, tokenizer=True):
    """A tiny Llama that reads letters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(path)
    if tokenizer:
        words = {letter: number for number, letter in enumerate(LETTERS)} | {"[UNK]": len(LETTERS)}
        fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    write(folder / "model")
    (folder / "text.txt").write_text("\n".join(LINES * 6) + "\n")
    return folder


FAST = ("--no-clip", "--length", "16")


def test_it_measures_first_and_loads_with_from_pretrained(place, tmp_path) -> None:
    before = directory_hash(place / "model")
    result = run(place / "model", "-c", place / "text.txt", "--bits", 3, "-o", tmp_path / "out", *FAST)
    first = result.output.splitlines()[0]
    assert first.startswith("After is") and "tokens alike" in first and "bits per token" in first
    for word in ("perplexity", "rounding", "random weights", "bits each"):
        assert word in result.output
    assert directory_hash(place / "model") == before
    out = tmp_path / "out"
    _, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    assert (out / "codes.safetensors").is_file() and (out / "tokenizer.json").is_file()
    assert verify_output(out).ok
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["quantizer"]["bits"] == 3 and manifest["quantizer"]["importance"] == "attncon"
    page = (tmp_path / "out.report.html").read_text()
    assert "Quantised model" in page and "perplexity" in page and "<script" not in page
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.report.html"}
    with pytest.raises(InputError, match="exists"):
        run(place / "model", "-c", place / "text.txt", "-o", out)


def test_packed_and_online_and_json(place, tmp_path) -> None:
    result = run(
        place / "model", "-c", place / "text.txt", "-o", tmp_path / "out", "--packed", "--online", "--group-size", 16,
        "--evaluate", place / "text.txt", "--no-baselines", "--json", *FAST,
    )  # fmt: skip
    told = json.loads(result.stdout)
    assert told["packed"] and told["weights"] == 2 * (4 * 16 * 16 + 3 * 16 * 32)
    assert told["evaluation"]["means"].keys() == {"before", "after"} and told["mean_error_over_rounding"] <= 1
    assert told["perplexity"]["after"] == pytest.approx(2 ** told["evaluation"]["means"]["after"])
    assert load_packed(tmp_path / "out").config.vocab_size == 32


def test_token_scores_choose_what_is_fitted(place, tmp_path) -> None:
    ids = [f"{row}:{place}" for row, line in enumerate(LINES * 6) for place in range(len(line))]
    values = torch.rand(len(ids), generator=torch.Generator().manual_seed(0)).double().numpy()
    Scores(values, ids, "token").save(tmp_path / "weights.parquet")
    options = (place / "model", "-c", place / "text.txt", "--no-baselines", "--evaluate", place / "text.txt", *FAST)
    run(*options, "-o", tmp_path / "one", "--token-weights", tmp_path / "weights.parquet")
    Scores([1.0] * len(ids), ids, "token").save(tmp_path / "alike.parquet")
    run(*options, "-o", tmp_path / "two", "--token-weights", tmp_path / "alike.parquet")
    run(*options, "-o", tmp_path / "three", "--importance", "uniform")
    told = [json.loads((tmp_path / name / "manifest.json").read_text())["quantizer"] for name in ("one", "three")]
    assert [each["importance"] for each in told] == ["given", "uniform"]
    codes = [(tmp_path / name / "codes.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert codes[0] != codes[1] and codes[1] == codes[2]
    with pytest.raises(InputError, match="has no score"):
        Scores([1.0], ["0:0"], "token").save(tmp_path / "few.parquet")
        run(*options, "-o", tmp_path / "four", "--token-weights", tmp_path / "few.parquet")


def test_a_dry_run_writes_nothing(place, tmp_path) -> None:
    result = run(place / "model", "-c", place / "text.txt", "-o", tmp_path / "out", "--dry-run", *FAST)
    assert "calibration tokens" in result.output and "nothing written" in result.output
    assert not list(tmp_path.iterdir())


def test_bad_usage_leaves_nothing(place, tmp_path) -> None:
    write(tmp_path / "mute", tokenizer=False)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("one\n")
    there = {path.name for path in tmp_path.iterdir()}
    text = place / "text.txt"
    for arguments, error, match in (
        ((place / "model", "-c", text, "--bits", 9), InputError, "bits"),
        ((place / "model", "-c", text, "--online"), InputError, "--packed"),
        ((place / "model", "-c", tmp_path / "none.txt"), InputError, "not there"),
        ((place / "model", "-c", tmp_path / "empty.txt"), NothingToDo, "no text"),
        ((place / "model", "-c", tmp_path / "short.txt"), NothingToDo, "fewer than 5"),
        ((tmp_path / "mute", "-c", text), InputError, "without a tokenizer"),
        ((place / "model", "-c", text, "--exclude", "*"), InputError, "nothing to quantise"),
        ((place / "model", "-c", text, "--exclude", "up_prj"), InputError, "'up_proj'"),
        ((place / "model", "-c", text, "--exclude", "up_prj", "--dry-run"), InputError, "'up_proj'"),
        ((place / "model", "-c", text, "--importance", "attncon", "--token-weights", text), InputError, "leave one"),
        ((place / "model", "-c", text, "--length", 1), InputError, "--length"),
        ((place, "-c", text), DataError, "config"),
    ):
        with pytest.raises(error, match=match):
            run(*arguments, "-o", tmp_path / "out", *(FAST if "--length" not in arguments else ()))
    assert {path.name for path in tmp_path.iterdir()} == there
