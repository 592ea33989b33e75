"""The table of all settings as text for people: what `imrelay check-config --help` prints."""

from __future__ import annotations

import textwrap
from itertools import zip_longest

from imrelay.settings.reading import Setting, settings

__all__ = ["settings_table"]

#: The least width of the column for the meaning, in characters, however narrow the terminal is.
_NARROWEST = 30
_HEADINGS = ("setting", "default, unit", "meaning")


def settings_table(width: int) -> str:
    """Return the settings by section, one or more lines for each: its name, default with unit, and meaning.

    No line is longer than `width` characters, unless the meaning would have fewer than 30 or has a longer word.
    """
    rows = list(settings())
    names = max(len(row.key) for row in rows)
    defaults = max(len(_default(row)) for row in rows)
    indent = names + defaults + 6
    lines = [f"  {_HEADINGS[0]:{names}}  {_HEADINGS[1]:{defaults}}  {_HEADINGS[2]}"]
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"[{section}]"]
        space = max(width - indent, _NARROWEST)
        meaning = textwrap.wrap(row.doc, space, break_long_words=False, break_on_hyphens=False)
        for name, default, text in zip_longest([row.key], [_default(row)], meaning, fillvalue=""):
            lines.append(f"  {name:{names}}  {default:{defaults}}  {text}")
    return "\n".join(lines)


def _default(row: Setting) -> str:
    return f"{row.default_text or 'empty'} {row.unit}".rstrip()
