"""AGENTS.md must stay true: its commands run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "AGENTS.md"
COMMANDS = re.findall(r"^salience (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_agents_page_runs(command, tmp_path, monkeypatch):
    monkeypatch.setenv("SALIENCE_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "salience", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_page_names_commands():
    assert len(COMMANDS) >= 4
