"""The README in Chinese says what the English one says: the same commands, routes, links and sections."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")
HEADING = re.compile(r"^#+ ", re.MULTILINE)
POINT = re.compile(r"^- ", re.MULTILINE)
ROW = re.compile(r"^\| ", re.MULTILINE)

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def test_the_code_blocks_are_the_same() -> None:
    assert BLOCK.findall(CHINESE) == BLOCK.findall(ENGLISH)
    assert len(BLOCK.findall(ENGLISH)) > 5


@pytest.mark.parametrize("pattern", [CODE, LINK], ids=["code", "links"])
def test_the_words_that_are_typed_and_the_pages_that_are_linked_are_the_same(pattern: re.Pattern[str]) -> None:
    english, chinese = (sorted(pattern.findall(prose(text))) for text in (ENGLISH, CHINESE))
    assert chinese == english


@pytest.mark.parametrize("pattern", [HEADING, POINT, ROW], ids=["headings", "points", "rows"])
def test_nothing_is_left_out(pattern: re.Pattern[str]) -> None:
    assert len(pattern.findall(prose(CHINESE))) == len(pattern.findall(prose(ENGLISH)))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_every_page_that_is_linked_is_there(text: str) -> None:
    local = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []
