"""How a changed model is written: through the one writer, with room beside it for models that are only measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from salience.io import Output
from salience.io.manifest import IN_FOLDER
from salience.model.narrowing import shapes_file
from salience.weights.evaluation import Evaluation


def model_output(
    out: str | os.PathLike, overwrite: bool, inputs: Sequence[str | os.PathLike], evaluation: Evaluation | None
) -> Output:
    """The output for a model: a file where `out` ends in ``.safetensors``, else a directory; use as a context manager.

    Whether `out` may be taken is checked here, before anything is read: it must lie apart from all inputs and from the
    data of the evaluation, and only an earlier output is ever replaced.
    """
    read = [*inputs, *([evaluation.data] if evaluation is not None and evaluation.data is not None else [])]
    return Output(out, overwrite, read, folder=Path(out).suffix != ".safetensors")


def work_folder(output: Output) -> Path:
    """A folder on the output's own disk (the system's may be small), removed with the output's temporaries."""
    work = output.folder.parent / "work"
    work.mkdir()
    return work


def put_model(output: Output, model: Path) -> None:
    """Make a model of the work folder the output: a directory, or a file with the list of its shapes if it has one."""
    if model.is_dir():
        put_directory(output, model)
        return
    if shapes_file(model).exists():
        os.replace(shapes_file(model), shapes_file(output.file()))
    os.replace(model, output.file())


def put_directory(output: Output, model: Path) -> None:
    """Make a model directory of the work folder the output."""
    (model / IN_FOLDER).unlink(missing_ok=True)  # copied along from an input that is an output itself
    output.folder.rmdir()
    os.rename(model, output.folder)
