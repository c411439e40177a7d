"""The safe reader: refuse a model directory that could run code, before any loader opens it.

Weights in safetensors are parsed, never executed. What has let code in, again and again, is *configuration*:
a field that names a hub repository, a nested config that sets its own trust flag, a module list that names
a file next to it. So every JSON file of the directory is read here first, with nothing but the `json` module.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from salience.errors import DataError, InputError

MAX_DEPTH = 64
MAX_JSON_BYTES = 100_000_000
MAX_HEADER_BYTES = 100_000_000
PICKLES = frozenset({".bin", ".pt", ".pth", ".pt2", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".joblib"})
ATTENTION = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}
)
# Keys of these files are tokens of a vocabulary, any text at all, and no loader reads them as settings.
VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
# The dotted names in these files of sentence-transformers are imported by name.
MODULE_LISTS = frozenset({"modules.json", "router_config.json"})


def check_directory(path: str | os.PathLike) -> Path:
    """Check that loading the model directory `path` runs no code from it, and return its real path.

    Refused, at any nesting depth of any JSON file: ``auto_map``, ``trust_remote_code``, an attention
    implementation that is not built in, ``custom_pipeline`` and modules from outside the installed packages.
    Refused too: weights only in a pickle format, adapters (they name a second model), links that leave the
    directory (except the blobs of a Hugging Face cache), and headers or JSON made to exhaust memory.

    Parameters
    ----------
    path : path-like
        A directory as `transformers`, `diffusers` or `sentence-transformers` write it.

    Raises
    ------
    InputError
        `path` is not a directory.
    DataError
        The directory holds one of the above; the message names file and place.

    References
    ----------
    CVE-2026-4372 (attention field names a hub kernel), CVE-2026-5241 (nested trust flag), CVE-2026-44513
    (custom diffusers components), CVE-2026-68770 (sentence-transformers modules from a local directory).
    """
    if not os.path.isdir(path):
        raise InputError(
            f"model: {os.fspath(path)!r} is not a directory. salience downloads nothing by itself: "
            "get the model first, for instance with `hf download OWNER/NAME --local-dir DIR`, then give DIR"
        )
    root = Path(path).resolve()
    files = list(_files(root))
    suffixes = {file.suffix.lower() for file in files}
    for file in files:
        if file.suffix.lower() == ".json":
            _check_json(file)
        elif file.suffix.lower() == ".safetensors":
            check_header(file)
    if "model_index.json" in {file.name for file in files} and ".py" in suffixes:
        raise DataError(f"{root}: a pipeline with Python files would run them; remove the *.py files")
    if ".safetensors" not in suffixes and suffixes & PICKLES:
        raise DataError(
            f"{root}: its weights are in a pickle format ({', '.join(sorted(suffixes & PICKLES))}), which "
            "runs code when it is read. Convert them where you trust the file: load the model there with "
            "transformers and call model.save_pretrained(DIR), which writes safetensors"
        )
    return root


def check_header(file: Path) -> None:
    """Check that the safetensors `file` announces a header of sane length.

    Raises
    ------
    DataError
        The file is too short to be safetensors, or its header exceeds 100 MB or the file itself.
    """
    with open(file, "rb") as stream:
        head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length + 8 > file.stat().st_size:
        raise DataError(f"{file}: not a whole safetensors file (cut off, or another format)")
    if length > MAX_HEADER_BYTES:
        raise DataError(f"{file}: its header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")


def _files(root: Path) -> Iterator[Path]:
    """Every regular file below `root`; links that leave it and special files are refused."""
    for folder, folders, names in os.walk(root):  # does not follow links to folders
        for name in sorted(folders + names):
            file = Path(folder, name)
            if file.is_symlink():
                _check_link(file, root)
            elif name in names and not stat.S_ISREG(file.stat().st_mode):
                raise DataError(f"{file}: neither a file nor a folder (a device, pipe or socket)")
            if name in names:
                yield file


def _check_link(link: Path, root: Path) -> None:
    target = link.resolve()
    # A Hugging Face cache keeps contents in models--OWNER--NAME/blobs and links from snapshots/REVISION.
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (target.is_relative_to(root) or in_cache):
        raise DataError(f"{link}: a link to {target}, outside the model directory; copy the file in its place")
    if not (target.is_dir() or target.is_file()):
        raise DataError(f"{link}: a link to {target}, which is not there or is no file")


def _check_json(file: Path) -> None:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{file}: JSON of more than {MAX_JSON_BYTES} bytes; no model configuration is that large")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise DataError(f"{file}: JSON nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{file}: not valid JSON ({error})") from None
    # A stack instead of recursion: depth is the file's to choose, not ours.
    pending: list[tuple[str, object, int]] = [("$", content, 1)]
    while pending:
        where, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise DataError(f"{file}: JSON nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            if file.name not in VOCABULARIES:
                for key, inner in value.items():
                    _check_entry(file, where, key, inner)
            pending += [(f"{where}.{key}", inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{where}[{i}]", inner, depth + 1) for i, inner in enumerate(value)]
    if file.name == "adapter_config.json":
        raise DataError(
            f"{file}: an adapter, which names another model to load; load that model and merge the adapter "
            "with peft's merge_and_unload(), then save_pretrained(DIR)"
        )


def _check_entry(file: Path, where: str, key: str, value: object) -> None:
    """Refuse one `key: value` of a configuration if it can make a loader run foreign code."""
    refusal = ""
    if key in ("auto_map", "custom_pipeline", "custom_pipelines") and value:
        refusal = "names code to run, and salience runs none; if your library has this model built in, delete it"
    elif key == "trust_remote_code" and value:
        refusal = "lets the directory trust itself; delete it"
    elif key.lstrip("_").startswith("attn_implementation"):
        strange = [name for name in _leaves(value) if name is not None and name not in ATTENTION]
        if strange:
            refusal = f"is {strange[0]!r}; allowed are the built-in {', '.join(sorted(ATTENTION))}"
    elif key in ("type", "types") and file.name in MODULE_LISTS:
        strange = [name for name in _leaves(value) if not str(name).startswith("sentence_transformers.")]
        if strange:
            refusal = f"is {strange[0]!r}; only modules of the installed sentence_transformers are allowed"
    elif key == "activation_function" and "." in str(value) and not str(value).startswith("torch."):
        refusal = f"is {value!r}, imported by name; only names within torch are allowed"
    elif key == "_class_name" and not isinstance(value, str):
        refusal = "names a custom pipeline file; only a class name of diffusers is allowed"
    elif (key == "path" and file.name == "modules.json") or key == "transformers_weights":
        inside = PurePosixPath(str(value).replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts:
            refusal = f"is {value!r}, outside the model directory"
    elif key == "weight_map" and isinstance(value, dict):
        strange = [name for name in value.values() if name != os.path.basename(str(name))]
        if strange:
            refusal = f"names the shard {strange[0]!r}; shards lie beside their index"
    if refusal:
        raise DataError(f"{file}: {where}.{key} {refusal}")


def _leaves(value: object) -> list[object]:
    """The values of `value`, whether it is one, a list of them, or a mapping from sub-model to them."""
    pending, leaves = [value], []
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        else:
            leaves.append(value)
    return leaves
