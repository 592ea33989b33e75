"""The model's deliberate breakages still fit the package. `python -m tests.model.breakages` tries them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.model.breakages import BREAKAGES, PACKAGE, Breakage
from tests.model.fleet import ROOT


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_a_breakage_changes_what_it_names_and_can_be_compiled(breakage: Breakage, tmp_path: Path) -> None:
    """What it replaces stands in the file exactly once."""
    path = tmp_path / breakage.file
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / PACKAGE / breakage.file, path)
    before = path.read_text()
    breakage.apply(tmp_path)
    assert path.read_text() != before
    compile(path.read_text(), str(path), "exec")


def test_breakages_have_names_of_their_own() -> None:
    """They are chosen by name, and at least ten promises are tried."""
    names = [breakage.name for breakage in BREAKAGES]
    assert len(set(names)) == len(names) >= 10


def test_a_breakage_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """Where the code has changed, or what is to be replaced stands there twice."""
    (tmp_path / "module.py").write_text("one = 1\none = 1\n")
    with pytest.raises(ValueError, match=r"twice: this stands 2 times in .*module\.py"):
        Breakage("twice", "module.py", "one = 1\n", "").apply(tmp_path)
