"""What `compress delta` and `merge delta` say with ``--dry-run``: the checks of a run, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salience.weights.evaluation import Evaluation


def compress_plan(
    base: Path, tuned: Path, out: Path, evaluation: Evaluation | None, exclude: Sequence[str], overwrite: bool
) -> dict[str, object]:
    """Check output and models as a run would; gives what would be pruned and written."""
    from salience.weights import check_pair
    from salience.weights.model_output import model_output

    with model_output(out, overwrite, [base, tuned], evaluation):
        pair = check_pair(base, tuned, exclude=exclude, look=False)
    return {
        "tensors to prune": len(pair.names),
        "kept as fine-tuned, of the fine-tuned model alone": ", ".join(pair.added) or "none",
        "bytes to read": _bytes(base) + _bytes(tuned),
        "bytes on disk beside the output, at most": _bytes(tuned) * (4 if evaluation is not None else 1),
        "output": str(out),
    }


def merge_plan(
    models: Sequence[Path], out: Path, evaluation: Evaluation | None, base: Path | None, overwrite: bool
) -> dict[str, object]:
    """Check output and models as a run would; gives what would be read and written."""
    from salience.weights import check_pair
    from salience.weights.model_output import model_output

    inputs = [*models, *([base] if base is not None else [])]
    with model_output(out, overwrite, inputs, evaluation):
        directories = [model for model in models if model.is_dir()]
        for other in directories[1:]:
            check_pair(directories[0], other, exclude=(), look=False)
        if base is not None and directories:
            check_pair(base, directories[0], look=False)
    whole = _bytes(directories[0]) if directories else _bytes(inputs[-1])
    return {
        "models": len(models),
        "bytes to read": sum(map(_bytes, inputs)),
        "bytes on disk beside the output, at most": whole * (4 if evaluation is not None else 1),
        "output": str(out),
    }


def _bytes(model: Path) -> int:
    """Size of the weights of a directory, or of a delta file."""
    return sum(file.stat().st_size for file in ([model] if model.is_file() else model.glob("*.safetensors")))
