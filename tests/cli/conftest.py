"""The command line as a user calls it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from salience.cli import main

DATA = Path(os.environ.get("SALIENCE_DATA", "nowhere")).absolute()


@pytest.fixture
def salience(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``salience(*arguments)`` runs the command and gives its exit code, output and messages."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["salience", *map(str, arguments)])
        capsys.readouterr()  # what the test itself has printed
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def resnet20(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that name a pretrained ResNet-20 and the test images of CIFAR-10; skips where they are not."""
    model, images = DATA / "resnet20-cifar10" / "model.safetensors", DATA / "cifar10" / "test.parquet"
    if not model.exists() or not images.exists():
        pytest.skip("SALIENCE_DATA names no folder with resnet20-cifar10/model.safetensors and cifar10/test.parquet")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return [str(model), str(images), "--arch", "cifar_resnet20:resnet20", "--mean", "0.485,0.456,0.406", "--std",
            "0.229,0.224,0.225"]  # fmt: skip
