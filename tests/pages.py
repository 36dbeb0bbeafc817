"""The pages for users, and the blocks of code on them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}


def blocks(page: str, kind: str) -> list[str]:
    """Return the texts of a page's blocks of one kind, in their order; kinds may be told apart by `|`."""
    return re.findall(rf"```(?:{kind})\b[^\n]*\n(.*?)```", PAGES[page], re.DOTALL)


def commands() -> list[str]:
    """Return the lines that are to be typed, of all pages, without what is said of them."""
    texts = [block for page in PAGES for block in blocks(page, "console|shell")]
    return [line.partition("#")[0].strip() for block in texts for line in block.splitlines()]
