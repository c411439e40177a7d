"""Importing salience and asking for help must be quick: the heavy packages stay unloaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "captum", "sklearn", "transformers", "matplotlib", "pandas"}
PROGRAM = """
import sys
{statement}
print("loaded:", *({heavy} & set(sys.modules)))
"""


def loaded_by(statement: str) -> str:
    program = PROGRAM.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_the_probe_sees_a_heavy_package() -> None:
    assert "sklearn" in loaded_by("import sklearn")


@pytest.mark.parametrize("statement", ["import salience", "import salience.cli", "import salience.evidence.store"])
def test_imports_are_light(statement: str) -> None:
    assert loaded_by(statement) == "loaded:"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["papers", "--help"],
        ["papers", "list", "--help"],
        ["papers", "list"],
        ["reproduce", "--help"],
    ],
)
def test_help_is_light(arguments: list[str]) -> None:
    statement = f"""
from salience.cli import main
sys.argv = ["salience", *{arguments}]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code
"""
    assert loaded_by(statement) == "loaded:"
