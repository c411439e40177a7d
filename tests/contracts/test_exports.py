"""Rooms export lazily: every listed name is there, and editors and type checkers see the same names."""

import ast
import importlib
from pathlib import Path

import pytest

import salience

SOURCE = Path(salience.__file__).parent
ROOMS = sorted(
    str(path.parent.relative_to(SOURCE.parent)).replace("/", ".")
    for path in SOURCE.rglob("__init__.py")
    if "_WHERE" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("room", ROOMS)
def test_names_are_there_and_told_alike(room):
    module = importlib.import_module(room)
    where = module._WHERE
    assert sorted(module.__all__) == sorted(where) == dir(module)
    for name, home in where.items():
        assert name != home.split(".")[0], f"{room}.{name} would turn into its module after the first use"
        assert getattr(module, name) is getattr(importlib.import_module(f"{room}.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
    told: set[str] = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            told |= {alias.name for item in node.body for alias in getattr(item, "names", [])}
    assert told == set(where)


def test_a_missing_package_names_its_extra():
    from salience._lazy import missing_extra

    error = missing_extra(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"), "this")
    assert "pip install 'salience[torch]'" in str(error)
    assert missing_extra(ModuleNotFoundError("No module named 'nothing'", name="nothing"), "this") is None
