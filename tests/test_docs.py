"""The docs say what the code does: help pages are generated, the README names every command and no other."""

from __future__ import annotations

import re
from pathlib import Path

from docs.generate import CHAT_PAGE, EXPLAIN_PAGE, PAGE, command_line_page, explain_json_page
from edgetune.chat.commands import commands_page
from edgetune.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]


def test_command_line_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == command_line_page(), "run `make docs`"
    assert CHAT_PAGE.read_text(encoding="utf-8") == commands_page(), "run `make docs`"


def test_the_page_of_explains_json_is_up_to_date() -> None:
    assert EXPLAIN_PAGE.read_text(encoding="utf-8") == explain_json_page(), "run `make docs`"


def test_readme_names_every_command_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `edgetune (\w+)", readme, flags=re.MULTILINE))
    assert named == set(VERBS)


def test_readme_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
