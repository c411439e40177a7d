"""Insertion and deletion on images, baselines, and the measured explanation of a folder of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from salience.errors import InputError
from salience.features.baselines import CentreMap, EdgeMap, RandomSmoothMap
from salience.features.explain import BASELINES, explain
from salience.features.faithfulness import RANDOM, blurred, insertion_deletion, map_proofs, record
from salience.features.methods import METHODS, method
from salience.model import read_images
from tiny import build, state_hash


class Corner(nn.Module):
    """Looks at the brightness of the top left quarter alone."""

    def __init__(self):
        super().__init__()
        self.quarter = nn.AvgPool2d(8)
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        corner = self.quarter(x)[:, :, 0, 0].mean(1) * self.scale
        return torch.stack([corner, -corner], 1)


def squares(rows: int = 12) -> torch.Tensor:
    """A bright spot in the top left quarter, and one that does not count."""
    x = torch.zeros(rows, 3, 16, 16)
    for i in range(rows):
        a, b = i % 5, i // 5
        x[i, :, a : a + 3, b : b + 3] = 1
        x[i, :, 11:14, 10 - b : 13 - b] = 1
    return x


def test_the_true_map_beats_the_others():
    x, model = squares(), Corner()
    classes = torch.zeros(len(x), dtype=torch.long)
    true = torch.zeros(len(x), 16, 16)
    true[:, :8, :8] = x[:, 0, :8, :8]
    run = insertion_deletion(model, x, true, classes, steps=16)
    worst = insertion_deletion(model, x, -true, classes, steps=16)
    assert (run.score > worst.score).all() and (run.score > 0).all()
    # Both curves run between the picture and its blur.
    with torch.no_grad():
        whole, blank = (model(values).softmax(1)[:, 0].numpy() for values in (x, blurred(x)))
    for part, start, end in ((run.insertion, blank, whole), (run.deletion, whole, blank)):
        np.testing.assert_allclose(part.scores[:, 0], start, atol=1e-6)
        np.testing.assert_allclose(part.scores[:, -1], end, atol=1e-6)
    small = insertion_deletion(model, x, true, classes, steps=16, batch_size=5)
    np.testing.assert_allclose(small.score, run.score, atol=1e-7)


def test_proofs_tell_good_from_bad_maps():
    x, model = squares(40), Corner()
    classes = torch.zeros(len(x), dtype=torch.long)
    true = torch.zeros(len(x), 16, 16)
    true[:, :8, :8] = x[:, 0, :8, :8]
    maps = {"true": true, "wrong": -true, "random": RandomSmoothMap(model, random_state=5).attribute(x)[:, 0]}
    baselines = {RANDOM: RandomSmoothMap(model).attribute(x)[:, 0], "the centre": CentreMap(model).attribute(x)[:, 0]}
    runs, others = (
        {name: insertion_deletion(model, x, one, classes, steps=16) for name, one in some.items()}
        for some in (maps, baselines)
    )
    proofs = map_proofs(runs, others, {"true": 0.1, "wrong": 0.99}, random_state=0)
    assert proofs["true"].better and "better than random and than the centre" in proofs["true"].words
    assert proofs["wrong"].words == "worse than random here; hardly changes when the weights are drawn anew"
    assert proofs["random"].words == "no better than random here"
    assert record(proofs["true"])["better_than_random"] is True
    assert proofs == map_proofs(runs, others, {"true": 0.1, "wrong": 0.99}, random_state=0)


def test_bad_maps():
    x, model = squares(3), Corner()
    classes = torch.zeros(3, dtype=torch.long)
    with pytest.raises(InputError, match="shape"):
        insertion_deletion(model, x, torch.zeros(3, 8, 8), classes)
    with pytest.raises(InputError, match="NaN"):
        insertion_deletion(model, x, torch.full((3, 16, 16), float("nan")), classes)
    with pytest.raises(InputError, match="target"):
        insertion_deletion(model, x, torch.zeros(3, 16, 16), classes + 2)


def test_baselines():
    x = squares(4)
    random = RandomSmoothMap(None, random_state=1)
    whole = random.attribute(x)
    assert torch.equal(random.attribute(x[2:3]), whole[2:3])  # of the image, not of the batch
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(RandomSmoothMap(None, random_state=2).attribute(x), whole)
    steps = (whole[..., 1:] - whole[..., :-1]).abs().mean()
    assert float(steps) < 0.5 * float(whole.std())  # smooth
    centre = CentreMap(None).attribute(x[:, :, :15, :15])
    assert int(centre[0].argmax()) == 7 * 15 + 7
    flat = torch.ones(1, 3, 16, 16)
    assert bool((EdgeMap(None).attribute(flat) == 0).all())
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1
    assert EdgeMap(None).attribute(step)[0, 0, 5].nonzero().flatten().tolist() == [7, 8]
    with pytest.raises(InputError, match="blob"):
        RandomSmoothMap(None, blob=0)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(6):
        file = tmp_path / "images" / ("cat" if i < 3 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"


def test_explain_a_folder(folder):
    model, images = build("plain"), read_images(folder)
    before = state_hash(model)
    stages = []
    result = explain(
        model, images, {name: METHODS[name] for name in ("normgrad", "gradcam", "gradient")}, measure=4, steps=5,
        target="label", progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert {name: tuple(maps.shape) for name, maps in result.maps.items()} == dict.fromkeys(
        ("normgrad", "gradcam", "gradient"), (6, 16, 16)
    )
    assert result.classes.tolist() == images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.measured == [0, 2, 3, 5] and result.proofs["normgrad"].score.n == 4
    assert set(result.runs) == {"normgrad", "gradcam", "gradient", *BASELINES}
    assert result.layers["gradcam"] == result.layers["normgrad"][-1:] and result.layers["gradient"] == []
    assert all(proof.randomised is not None for proof in result.proofs.values())
    assert {"predictions", "normgrad", "measuring", "random weights"} <= set(stages)
    assert state_hash(model) == before
    nothing = explain(model, images, {"gradient": METHODS["gradient"]}, measure=0)
    assert not nothing.proofs and not nothing.runs


def test_options_reach_their_method(folder):
    model, images = build("plain"), read_images(folder)
    plain, own = (
        explain(model, images, {"normgrad": METHODS["normgrad"]}, layers=["conv"], options=options, measure=0, target=1)
        for options in ({}, {"selective": True, "meta_lr": 0.1})
    )
    assert plain.layers == {"normgrad": ["conv"]}
    assert not torch.allclose(plain.maps["normgrad"], own.maps["normgrad"])


def test_bad_explanations(folder):
    model, images = build("plain"), read_images(folder)
    some = {"gradient": METHODS["gradient"]}
    with pytest.raises(InputError, match="target"):
        explain(model, images, some, target=7)
    with pytest.raises(InputError, match="no labels"):
        explain(model, read_images(folder / "cat"), some, target="label")
    with pytest.raises(InputError, match="two classes"):
        explain(nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), images, some)
    with pytest.raises(InputError, match="steps"):
        explain(model, images, some, steps=1)
    with pytest.raises(InputError, match="'gradcam'"):
        method("gradcamm")
