"""The shared worlds: the same for the same seed, true in what they say of their contents, safe caches."""

import functools
import sys
import types

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from sklearn.metrics import mutual_info_score
from torch import nn

from salience.errors import InputError
from salience.reproductions.worlds import canvas, digits, nets, tables, text, zoo

# ---- digits ----------------------------------------------------------------------------------------------


def test_digits_split():
    split, again, other = digits.split(11), digits.split(11), digits.split(12)
    assert split.train_x.shape == (1257, 1, 8, 8) and split.test_x.shape == (540, 1, 8, 8)
    assert split.train_x.dtype == np.float32 and split.train_y.dtype == np.int64
    assert split.train_x.mean() == pytest.approx(0, abs=1e-5) and split.train_x.std() == pytest.approx(1, abs=1e-5)
    assert abs(split.test_x.mean()) < 0.05  # standardised by the training part, so not exactly 0
    assert split.test_x.mean() != pytest.approx(0, abs=1e-5)
    shares = np.bincount(split.train_y) / len(split.train_y) - np.bincount(split.test_y) / len(split.test_y)
    assert np.abs(shares).max() < 0.003  # stratified
    np.testing.assert_array_equal(split.train_x, again.train_x)
    assert (split.train_y != other.train_y).any()


# ---- canvas ----------------------------------------------------------------------------------------------


def test_scenes_are_what_they_say():
    scenes = canvas.scenes(200, 3, noise=0.0)
    split = digits.ink(3)
    known = {image.tobytes(): label for image, label in zip(split.train_x, split.train_y)}
    for image, labels, boxes in zip(scenes.images[:, 0], scenes.labels, scenes.boxes):
        rest = image.copy()
        for label, (x0, y0, x1, y1) in zip(labels, boxes):
            assert known[np.ascontiguousarray(image[y0:y1, x0:x1]).tobytes()] == label
            rest[y0:y1, x0:x1] = 0
        assert not rest.any()
    assert (scenes.labels[:, 0] != scenes.labels[:, 1]).all()
    np.testing.assert_array_equal(scenes.images[:, 0] >= 0.25, scenes.masks.any(axis=1))


def test_scenes_know_boxes_parts_and_targets():
    scenes = canvas.scenes(50, 0, size=40)
    boxes = scenes.box_masks()
    assert (boxes.sum(axis=(2, 3)) == 64).all()
    assert not (boxes[:, 0] & boxes[:, 1]).any() and (scenes.masks <= boxes).all()
    x0, y0, x1, y1 = scenes.boxes[0, 0]
    assert boxes[0, 0, y0, x0] and boxes[0, 0, y1 - 1, x1 - 1] and not boxes[0, 0, y0, x0 - 1 if x0 else x1]
    wide = scenes.box_masks(margin=2).sum(axis=(2, 3))
    assert wide.max() == 12 * 12 and (wide < 12 * 12).any()  # cut at the border
    parts = scenes.part_masks()
    np.testing.assert_array_equal(parts.sum(axis=2), scenes.masks)  # each stroke pixel in exactly one part
    top_left = np.argwhere(parts[0, 0, 0])
    assert (top_left >= [y0, x0]).all() and (top_left < [y0 + 4, x0 + 4]).all()
    targets = scenes.multi_hot()
    assert (targets.sum(axis=1) == 2).all() and (np.take_along_axis(targets, scenes.labels, 1) == 1).all()


def test_captions_tell_the_truth():
    scenes = canvas.scenes(300, 5)
    for caption, labels, boxes in zip(scenes.captions, scenes.labels, scenes.boxes):
        first, second = (canvas.WORDS[label] for label in labels)
        assert caption.split()[1] == first and caption.split()[-1] == second
        relation = next(r for r in canvas.RELATIONS if r in caption)
        dx, dy = boxes[1, :2] - boxes[0, :2]
        assert {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}[relation]
    assert len(np.unique(scenes.relations)) == 4
    assert any("an eight" in caption for caption in scenes.captions)


def test_scenes_by_seed_and_part():
    train, again = canvas.scenes(100, 1), canvas.scenes(100, 1)
    test = canvas.scenes(100, 1, part="test", noise=0.0)
    np.testing.assert_array_equal(train.images, again.images)
    assert (train.labels != canvas.scenes(100, 2).labels).any() and (train.labels != test.labels).any()
    held_out = {image.tobytes() for image in digits.ink(1).test_x}
    x0, y0, x1, y1 = test.boxes[0, 0]
    assert np.ascontiguousarray(test.images[0, 0, y0:y1, x0:x1]).tobytes() in held_out
    clean = canvas.scenes(100, 1, noise=0.0).images
    assert (train.images - clean).std() == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("options", [{"part": "valid"}, {"size": 14}, {"size": 33}, {"noise": -1.0}, {"count": 0}])
def test_scenes_bad_input(options):
    with pytest.raises(InputError, match=next(iter(options))):
        canvas.scenes(**{"count": 1, "seed": 0, **options})


# ---- text ------------------------------------------------------------------------------------------------


def test_chunks_by_hand():
    assert text.chunks("a b\n  c d e", words=2, at_least=1) == ["a b", "c d", "e"]
    assert text.chunks("a  b\n  c d e", words=3, at_least=2) == ["a  b\n  c", "d e"]
    assert text.chunks("a b c d e", words=2, at_least=2) == ["a b", "c d"]
    assert text.chunks("", words=2) == text.chunks(" \n", words=2) == []
    long = " ".join(map(str, range(1000)))
    assert [len(piece.split()) for piece in text.chunks(long)] == [128] * 7 + [104]
    assert " ".join(text.chunks(long)) == long


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on disk that must be read and never imported."""
    root = tmp_path / "toy_package"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text('"""Module text."""\nraise SystemExit("imported")\n')
    (root / "b.py").write_text('class A:\n    """Class text."""\n    def f(self):\n        r"""Say \\d."""\n')
    (root / "c.py").write_text('async def g():\n    """Class text."""\n\ndef h():\n    x = "\\d"\n')
    (root / "broken.py").write_text('def f(:\n    """Lost."""\n')
    (root / "nul.py").write_bytes(b'"""Lost."""\0')
    (root / "latin.py").write_bytes('# -*- coding: latin-1 -*-\n"""Größe."""\n'.encode("latin-1"))
    (root / "undecodable.py").write_bytes(b'"""\xff\xfe"""\n')
    (root / "tests" / "test_a.py").write_text('"""Test text."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_docstrings(package):
    found = text.docstrings("toy_package")
    assert found == [
        ("Module text.", "toy_package", "__init__.py"),
        ("Class text.", "toy_package", "b.py"),
        ("Say \\d.", "toy_package", "b.py"),
        ("Größe.", "toy_package", "latin.py"),
    ]
    assert "toy_package" not in sys.modules


def test_package_corpus_and_passages(package):
    words = [document.text.split() for document in text.package_corpus(["toy_package"], words=2)]
    assert words == [["Module", "text."], ["Class", "text."], ["Say", "\\d."]]  # "Größe." is one word of two
    passages = text.source_passages(package, words=3)
    assert {p.path for p in passages} == {"__init__.py", "b.py", "broken.py", "c.py", "latin.py"}
    assert all(p.source == "stdlib" and len(p.text.split()) == 3 for p in passages)


@pytest.mark.parametrize("name", ["no_such_package", "../evil", "abc.py", ""])
def test_missing_package(name):
    with pytest.raises(InputError, match=f"package {name!r} is not installed"):
        text.docstrings(name)


def test_pool_hides_half_of_the_target(monkeypatch):
    corpus = {"aim": [text.Document(f"aim {i}", "aim", "a.py") for i in range(40)]}
    corpus["other"] = [text.Document(f"other {i}", "other", "o.py") for i in range(30)]
    monkeypatch.setattr(
        text, "package_corpus", lambda names, single_spaces=False: [d for name in names for d in corpus[name]]
    )
    monkeypatch.setattr(text, "source_passages", lambda single_spaces=False: [text.Document("code", "stdlib", "s.py")])
    pool = text.pool(11, "aim", ["aim", "other"])
    assert (len(pool.target), len(pool.held_out), len(pool.raw)) == (10, 10, 20 + 30 + 1)
    hidden = [document for document in pool.raw if document.source == "aim"]
    assert sorted(pool.target + pool.held_out + hidden) == sorted(corpus["aim"])
    assert pool == text.pool(11, "aim", ["aim", "other"])
    assert pool.raw != text.pool(12, "aim", ["aim", "other"]).raw
    assert [d.source for d in pool.raw] != sorted(d.source for d in pool.raw)


def test_real_text_is_there():
    """The kinds of text differ as they must for selection: word use in numpy's docstrings against code."""
    passages, prose = text.source_passages(), text.package_corpus(["numpy"])
    assert len(passages) > 5000 and len(prose) > 1000
    assert any(passage.path == "json/decoder.py" for passage in passages)
    assert not any("/test" in passage.path for passage in passages)

    def share(documents, word):
        return np.mean([word in document.text.split() for document in documents])

    assert share(prose, "Parameters") > 10 * share(passages, "Parameters")
    assert share(passages, "self") > 5 * share(prose, "self")


# ---- tables ----------------------------------------------------------------------------------------------


def columns_of(table):
    return dict(zip(table.names, table.codes.T))


def test_planted_signals():
    table = tables.planted(50_000, 11)
    columns, label = columns_of(table), table.label
    assert table.codes.dtype == np.int32 and table.kinds.count("signal") == 4
    np.testing.assert_array_equal(columns["xor_a"] ^ columns["xor_b"], label)
    assert mutual_info_score(columns["xor_a"], label) < 1e-4
    assert mutual_info_score(2 * columns["xor_a"] + columns["xor_b"], label) == pytest.approx(np.log(2), abs=1e-3)
    assert np.mean(columns["near_copy"] == label) == pytest.approx(0.95, abs=0.005)
    assert np.mean(columns["weak"] == label) == pytest.approx(0.55, abs=0.01)
    information = rel_entr([0.55, 0.45], 0.5).sum()
    assert mutual_info_score(columns["weak"], label) == pytest.approx(information, abs=0.002)
    # the trap: plain mutual information puts a column of 1000 random values above the weak signal
    assert mutual_info_score(columns["noise4_1000"], label) > mutual_info_score(columns["weak"], label)
    assert columns["noise4_1000"].max() == 999


@pytest.mark.parametrize("name", ["breast_cancer", "digits", "wine"])
def test_real_tables(name):
    table, again = tables.real(name, 11), tables.real(name, 11)
    rows = len(table.label)
    np.testing.assert_array_equal(table.codes, again.codes)
    assert table.names == again.names and len(set(table.names)) == len(table.names)
    assert table.kinds.count("noise") == 30
    for column, kind in zip(table.codes.T, table.kinds):
        if kind == "real":
            assert column.min() == 0
            assert 2 <= column.max() + 1 <= 16
            assert len(np.unique(column)) == column.max() + 1
    cardinalities = sorted(int(n.rsplit("_", 1)[1]) for n, k in zip(table.names, table.kinds) if k == "noise")
    assert cardinalities[0] == 2 and cardinalities[-1] == rows // 2
    best = {"real": 0.0, "noise": 0.0}
    for column, kind in zip(table.codes.T, table.kinds):
        best[kind] = max(best[kind], mutual_info_score(column, table.label))
    assert best["real"] > 0.2
    assert best["noise"] > 0.2  # noise of many values looks informative, too
    assert (np.diff(table.label) != 0).mean() > 0.2  # rows are shuffled


def test_quantile_bins_by_hand():
    codes = tables._quantile_codes(np.array([5.0, 1.0, 1.0, 1.0, 9.0, 7.0]), 3)
    np.testing.assert_array_equal(codes, [1, 0, 0, 0, 2, 2])
    for rare in ([0.0] * 999 + [1.0], [1.0] * 999 + [0.0]):  # quantile edges would merge one of the two
        np.testing.assert_array_equal(tables._quantile_codes(np.array(rare), 16), rare)


def test_tables_bad_input():
    with pytest.raises(InputError, match="nearest names: 'wine'"):
        tables.real("wines", 0)
    with pytest.raises(InputError, match="bins must be at least 2"):
        tables.real("wine", 0, bins=1)
    with pytest.raises(InputError, match="rows must be at least 2"):
        tables.planted(1, 0)


# ---- nets ------------------------------------------------------------------------------------------------

BUILDERS = {
    "mlp": lambda seed: nets.mlp([64, 32, 10], seed),
    "small_cnn": nets.small_cnn,
    "tiny_vit": nets.tiny_vit,
    "tiny_gpt2": nets.tiny_gpt2,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_nets_follow_their_seed_and_nothing_else(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = BUILDERS[name](11)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    same, other = BUILDERS[name](11), BUILDERS[name](12)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values()))
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values()))


def test_nets_shapes():
    assert nets.mlp([64, 32, 10], 0)(torch.zeros(2, 64)).shape == (2, 10)
    assert isinstance(nets.mlp([4, 2], 0)[-1], nn.Linear)
    assert nets.small_cnn(0)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert nets.small_cnn(0, width=8).c4(torch.zeros(2, 32, 8, 8)).shape == (2, 32, 8, 8)
    seen = nets.tiny_vit(0)(torch.zeros(2, 1, 32, 32), output_attentions=True)
    assert seen.logits.shape == (2, 10) and seen.attentions[0].shape == (2, 4, 65, 65)
    assert nets.tiny_gpt2(0)(torch.zeros(2, 9, dtype=torch.long)).logits.shape == (2, 9, 256)
    with pytest.raises(InputError, match="sizes must hold"):
        nets.mlp([3], 0)


# ---- zoo -------------------------------------------------------------------------------------------------

CALLS = []
STEPS = 3


def build(seed):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def batch():
    return torch.randn(16, 4)


def train(model, seed):
    CALLS.append(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()


def train_gpt2(model, seed):
    CALLS.append(seed)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)


RECIPE = zoo.Recipe(build, train)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALIENCE_HOME", str(tmp_path / "home"))
    CALLS.clear()
    return tmp_path / "home" / "worlds"


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_trained_once(cache):
    before = torch.get_rng_state()
    first = zoo.trained(RECIPE, 11)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = zoo.trained(RECIPE, 11)
    assert CALLS == [11] and same(first, second)
    assert not first.training and not second.training
    assert not same(first, zoo.trained(RECIPE, 12))
    assert sorted(path.suffix for path in cache.iterdir()) == [".safetensors"] * 2  # no temporaries left


def test_training_is_the_same_without_a_cache(cache):
    first = zoo.trained(RECIPE, 11)
    next(cache.iterdir()).unlink()
    assert same(first, zoo.trained(RECIPE, 11)) and CALLS == [11, 11]


def cut_short(data):
    return data[: len(data) // 2]


def flip_a_bit(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lambda data: b"", lambda data: b"no tensors here"])
def test_damaged_file_is_trained_anew(cache, damage):
    first = zoo.trained(RECIPE, 11)
    path = next(cache.iterdir())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(first, zoo.trained(RECIPE, 11))
    assert CALLS == [11, 11] and path.read_bytes() == whole


def test_file_of_another_network_is_trained_anew(cache):
    first = zoo.trained(RECIPE, 11)
    path = next(cache.iterdir())
    zoo._save(nn.Linear(3, 3), path)
    assert same(first, zoo.trained(RECIPE, 11)) and CALLS == [11, 11]


def test_tied_weights_stay_tied(cache):
    recipe = zoo.Recipe(nets.tiny_gpt2, train_gpt2)
    first, second = zoo.trained(recipe, 11), zoo.trained(recipe, 11)
    assert CALLS == [11] and same(first, second)
    assert second.lm_head.weight.data_ptr() == second.transformer.wte.weight.data_ptr()
    assert not same(second, nets.tiny_gpt2(11))


def test_failed_training_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(zoo, "save_model", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        zoo.trained(RECIPE, 11)
    assert list(cache.iterdir()) == []


def test_key_follows_source_constants_seed_and_versions(monkeypatch):
    key = zoo.key(RECIPE, 11)
    assert key == zoo.key(RECIPE, 11) and key != zoo.key(RECIPE, 12)
    assert key != zoo.key(zoo.Recipe(build, train_gpt2), 11)
    monkeypatch.setitem(globals(), "STEPS", 4)
    assert zoo.key(RECIPE, 11) != key
    monkeypatch.setitem(globals(), "STEPS", 3)
    assert zoo.key(RECIPE, 11) == key
    monkeypatch.setitem(globals(), "batch", cut_short)  # a helper that `train` uses
    assert zoo.key(RECIPE, 11) != key
    monkeypatch.undo()
    monkeypatch.setattr(zoo.salience, "__version__", "9.9")
    assert zoo.key(RECIPE, 11) != key


def test_recipes_that_cannot_be_keyed():
    width = 3

    def closure(seed):
        return nn.Linear(width, width)

    typed = types.FunctionType(build.__code__.replace(co_filename="<stdin>"), globals())
    for bad in (lambda seed: None, closure, functools.partial(nets.mlp, [2, 2]), nn.Linear):
        with pytest.raises(InputError, match="defined at the top of a module"):
            zoo.key(zoo.Recipe(bad, train), 0)
    with pytest.raises(InputError, match="source of build cannot be read"):
        zoo.key(zoo.Recipe(typed, train), 0)


def test_checked_functions_count_as_their_own_source():
    @functools.wraps(build)
    def checked(seed):
        return build(seed)

    assert zoo.key(zoo.Recipe(checked, train), 0) == zoo.key(RECIPE, 0)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SALIENCE_HOME", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert zoo.home() == tmp_path / "here"
    monkeypatch.delenv("SALIENCE_HOME")
    assert zoo.home() == tmp_path / "cache" / "salience"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.home() == tmp_path / ".cache" / "salience"


def test_chunks_at_single_spaces_count_empty_words():
    assert text.chunks("a  b c d", words=3, at_least=2, single_spaces=True) == ["a  b", "c d"]
    assert text.chunks("a b", words=3, at_least=3, single_spaces=True) == []
