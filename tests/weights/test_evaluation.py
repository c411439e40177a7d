"""The shared measuring of changed weights: text, commands, images, and paired comparison."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from salience.errors import DataError, InputError, NothingToDo
from salience.model import Loaded, load
from salience.weights.evaluation import Comparison, Evaluation, compare
from tiny import VOCABULARY, build, save, state_hash


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w3 w3"]  # the second has one token: nothing to predict
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_bits_per_token_are_those_of_each_document_alone(tokenizer, documents):
    model = build("llama")
    before = state_hash(model)
    scores = Evaluation(documents).score(Loaded(model, tokenizer))
    expected = []
    for text in ["w1 w2 w3", "w5 w6 w7 w8 w9", "w3 w3"]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        expected.append(float(loss) / math.log(2))
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert state_hash(model) == before


def test_a_sample_of_the_documents_is_the_same_for_every_model(tokenizer, tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"w{i} w{i + 1} w{i + 2}\n" for i in range(50)))
    model = Loaded(build("gpt2"), tokenizer)
    whole, part = Evaluation(path).score(model), Evaluation(path, limit=7).score(model)
    assert len(whole) == 50 and len(part) == 7 and set(part.round(4)) <= set(whole.round(4))
    np.testing.assert_array_equal(part, Evaluation(path, limit=7).score(model))
    assert not np.array_equal(part, Evaluation(path, limit=7, seed=1).score(model))


def test_long_documents_are_cut(tokenizer, tmp_path):
    short, long = tmp_path / "a.txt", tmp_path / "b.txt"
    words = [f"w{i % 300}" for i in range(400)]
    short.write_text(" ".join(words[:128]))
    long.write_text(" ".join(words))
    model = Loaded(build("qwen2"), tokenizer)  # takes 128 tokens
    np.testing.assert_allclose(Evaluation(long).score(model), Evaluation(short).score(model), rtol=1e-6)


def test_models_that_are_no_language_models_are_refused_for_text(tokenizer, documents):
    with pytest.raises(DataError, match="without a tokenizer"):
        Evaluation(documents).score(Loaded(build("gpt2"), None))
    for family in ("vit", "t5"):
        with pytest.raises(DataError, match="no causal language model"):
            Evaluation(documents).score(Loaded(build(family), tokenizer))


def test_scores_that_are_not_finite_are_refused(tokenizer, documents):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(DataError, match="not finite"):
        Evaluation(documents).score(Loaded(model, tokenizer))


def test_text_without_two_tokens_is_nothing_to_do(tokenizer, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("w1\nw2\n")
    with pytest.raises(NothingToDo, match="two tokens"):
        Evaluation(path).score(Loaded(build("gpt2"), tokenizer))


def test_a_command_is_run_with_the_model_path_and_without_a_shell(tmp_path):
    script = "import sys; print('noise 3'); print('accuracy:', len(sys.argv[1]))"
    evaluation = Evaluation(command=f'{sys.executable} -c "{script}" {{model}}')
    assert evaluation.score("/a b;c") == [6.0]  # one argument, whatever is in it
    assert evaluation.higher_is_better and evaluation.measure == "figure of the command"
    assert not Evaluation(command="x {model}", lower_is_better=True).higher_is_better


@pytest.mark.parametrize(
    ("command", "error", "match"),
    [
        ("/no/such/program {model}", InputError, "cannot be started"),
        (f"{sys.executable} -c 'raise SystemExit(7)' {{model}}", DataError, "ended with 7"),
        (f"{sys.executable} -c 'print(\"good\")' {{model}}", DataError, "must print a number last"),
        (f"{sys.executable} -c '' {{model}}", DataError, "must print a number last"),
        (f"{sys.executable} -c 'print(\"nan\")' {{model}}", DataError, "printed nan"),
    ],
)
def test_commands_that_fail(command, error, match):
    with pytest.raises(error, match=match):
        Evaluation(command=command).score("m")


def test_what_an_evaluation_takes(tmp_path, documents):
    for arguments in ({}, {"data": documents, "command": "x {model}"}):
        with pytest.raises(InputError, match="either data or a command"):
            Evaluation(**arguments)
    with pytest.raises(InputError, match="must hold"):
        Evaluation(command="python eval.py")
    with pytest.raises(InputError, match="not there"):
        Evaluation(tmp_path / "missing.txt")
    (tmp_path / "a.docx").touch()
    with pytest.raises(InputError, match="must be a folder"):
        Evaluation(tmp_path / "a.docx")
    with pytest.raises(InputError, match="limit"):
        Evaluation(documents, limit=0)
    with pytest.raises(InputError, match="lower_is_better"):
        Evaluation(documents, lower_is_better=True)
    with pytest.raises(InputError, match="save it first"):
        Evaluation(command="x {model}").score(Loaded(build("plain"), None))


def test_gains_are_positive_where_the_model_is_better():
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    scores = {"before": base, "after": base - 1 + 0.1 * rng.normal(size=200)}
    lower = Comparison("bits per token", False, scores)
    gain = lower.gain("after", "before")
    assert 0.95 < gain.low < gain.mean < gain.high < 1.05  # paired: far narrower than the spread of the scores
    assert lower.verdict("after", "before") is True and lower.verdict("before", "after") is False
    assert Comparison("accuracy", True, scores).verdict("after", "before") is False
    record = lower.as_dict("after")
    assert record["examples"] == 200 and record["gains"]["before"]["mean"] == pytest.approx(gain.mean)
    json.dumps(record, allow_nan=False)


def test_a_single_figure_decides_nothing():
    one = Comparison("figure of the command", True, {"before": np.array([0.5]), "after": np.array([0.9])})
    assert one.verdict("after", "before") is None and one.verdict("before", "after") is False
    assert one.as_dict("after")["gains"]["before"]["low"] is None


def test_compare_loads_directories(tokenizer, documents, tmp_path):
    save("llama", tmp_path / "one", tokenizer)
    save("gpt2", tmp_path / "two", tokenizer)
    result = compare(Evaluation(documents), {"one": tmp_path / "one", "two": load(tmp_path / "two")})
    assert list(result.scores) == ["one", "two"] and result.examples == 3
    with pytest.raises(DataError, match="not the same examples"):
        compare(Evaluation(documents), {"one": tmp_path / "one", "two": _other(tokenizer)})


def _other(tokenizer):
    """A model whose tokenizer makes two tokens of every document."""

    class Two:
        convert_ids_to_tokens = None

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2] for _ in texts]}

    return Loaded(build("llama"), Two())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures in three classes; the tiny networks give 3 logits."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_accuracy_counts_each_picture(pictures):
    from salience.model import read_images

    model = build("plain")
    images = read_images(pictures)
    with torch.no_grad():
        predicted = torch.stack([model(images[i][0][None])[0].argmax() for i in range(len(images))])
    evaluation = Evaluation(pictures, batch_size=5)
    assert evaluation.kind == "images" and evaluation.higher_is_better
    scores = evaluation.score(Loaded(model, None))
    np.testing.assert_array_equal(scores, (predicted == images.labels).double().numpy())
    assert 0 < scores.mean() < 1


def test_classes_are_matched_by_name_where_the_model_knows_them(pictures):
    model = build("vit")
    plain = Evaluation(pictures).score(Loaded(model, None))
    model.config.label2id = {"cat": 0, "bee": 1, "ant": 2}
    named = Evaluation(pictures).score(Loaded(model, None))
    predicted = plain.astype(bool)
    assert (named[4:8] == predicted[4:8]).all() and not np.array_equal(named, plain)


def test_images_in_parquet_are_told_from_text(tmp_path, tokenizer):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 2, 0, 1, 2]}), tmp_path / "i.parquet")
    pq.write_table(pa.table({"text": ["w1 w2 w3", "w2 w4"]}), tmp_path / "t.parquet")
    assert Evaluation(tmp_path / "i.parquet").kind == "images" and Evaluation(tmp_path / "t.parquet").kind == "text"
    assert len(Evaluation(tmp_path / "i.parquet", limit=4).score(Loaded(build("plain"), None))) == 4
    assert len(Evaluation(tmp_path / "t.parquet").score(Loaded(build("gpt2"), tokenizer))) == 2
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 2, 0, 1, 7]}), tmp_path / "l.parquet")
    with pytest.raises(DataError, match="label 7"):
        Evaluation(tmp_path / "l.parquet").score(Loaded(build("plain"), None))
    pq.write_table(pa.table({"image": rows}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="no labels"):
        Evaluation(tmp_path / "n.parquet").score(Loaded(build("plain"), None))


def test_halves_share_no_example_and_make_the_whole(tokenizer, documents, pictures):
    for data, model in ((documents, build("gpt2")), (pictures, build("plain"))):
        loaded = Loaded(model, tokenizer)
        if data is pictures:
            loaded = Loaded(model, None)
        whole, first, second = (Evaluation(data, half=half).score(loaded) for half in (None, 0, 1))
        assert len(first) + len(second) == len(whole) and len(second) > 0
        assert sorted([*first.round(5), *second.round(5)]) == sorted(whole.round(5))


def test_inputs_are_what_the_models_take(tokenizer, documents, pictures):
    text = Evaluation(documents, batch_size=2).inputs(Loaded(build("llama"), tokenizer))
    assert [len(batch["input_ids"]) for batch in text] == [2, 1] and text[0]["attention_mask"].sum() == 8
    assert [len(b) for b in Evaluation(pictures, batch_size=8).inputs(Loaded(build("plain"), None), rows=10)] == [8, 2]
    assert list(Evaluation(pictures).inputs(Loaded(build("vit"), None))[0]) == ["pixel_values"]
    with pytest.raises(InputError, match="no inputs"):
        Evaluation(command="x {model}").inputs(Loaded(build("plain"), None))


def test_five_of_five_is_not_beyond_doubt():
    """A bootstrap over 5 equal signs never crosses zero; by a sign test that happens once in 16."""
    rng = np.random.default_rng(0)
    scores = {"before": np.zeros(5), "after": 0.1 + 0.01 * rng.random(5)}
    few = Comparison("accuracy", True, scores)
    assert few.gain("after", "before").low > 0 and few.gain("after", "before").p_value > 0.05
    assert few.verdict("after", "before") is None
    many = Comparison("accuracy", True, {name: np.tile(value, 4) for name, value in scores.items()})
    assert many.verdict("after", "before") is True
