"""README shows the settings as they are, and names the two commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from imrelay.settings.reading import Setting, settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", list(settings()), ids=lambda row: f"{row.section}.{row.key}")
def test_each_setting_stands_in_the_table_with_its_default(row: Setting) -> None:
    """README's table has a row for every setting, with its default and what it is."""
    default = f"`{row.default_text}`" if row.default_text else "empty"
    assert f"| `[{row.section}]` `{row.key}` | {default} | {row.doc}" in README


def test_the_table_has_no_row_for_what_is_no_setting() -> None:
    """A setting that is gone is gone from README too."""
    rows = [line for line in README.splitlines() if line.startswith("| `[")]
    assert len(rows) == len(list(settings()))


@pytest.mark.parametrize("command", ["scripts/start", "scripts/test"])
def test_the_two_commands_are_named(command: str) -> None:
    """README names what starts and what tests the project."""
    assert f"    {command}\n" in README
