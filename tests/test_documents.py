"""README.md and docs/ show what npgpt prints, and their links work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import npgpt
from npgpt.cli import VERBS
from tests.support import documents, pictures
from tests.support.command import here
from tests.support.documents import LINKED, ROOT, RUN

README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_what_is_shown_is_what_is_printed(path: Path, tmp_path: Path) -> None:
    found = [f"{block}\nshown:\n{block.shown}\nprinted:\n{out}" for block, out in documents.faults(path, tmp_path)]
    assert not found, "\n".join(found)


def test_only_real_blocks_are_run_elsewhere() -> None:
    first_lines = [block.text for path in RUN for block in documents.blocks(path)]
    for beginning in documents.ELSEWHERE:
        assert any(text.startswith(beginning) for text in first_lines), beginning


def test_shown_output_can_be_wrong() -> None:
    assert documents.matches("a … c", "a b c")
    assert documents.matches("word " * 30, ("word " * 15 + "\n") * 2) is False
    assert documents.matches(("word " * 15 + "\n") * 2, "word " * 30)
    assert documents.matches("rms 1.5e-07  matches", "rms 0.03 matches", exactly=False)
    assert not documents.matches("rms 1.5e-07  differs", "rms 0.03 matches", exactly=False)
    assert not documents.matches("rms 1.5e-07", "rms 1.6e-07")
    assert not documents.matches("a …", "b a")


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 10_000
    assert len((ROOT / "npgpt" / "model.py").read_text("utf-8").splitlines()) < 200


def test_the_block_is_the_models() -> None:
    assert f"```python\n{documents.source()}```" in README


def test_the_table_of_speed_is_that_of_the_results() -> None:
    """Each figure in README.md equals that in benchmarks/RESULTS.md for the same engine and heading."""
    results: dict[tuple[str, str], str] = {}
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8"), re.MULTILINE):
        for place, figure in cells(table):
            results.setdefault(place, figure)
    (table,) = re.findall(r"^\| engine .*\n(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(list(cells(table))) == 20
    assert [results[place] for place, _ in cells(table)] == [figure for _, figure in cells(table)]


def cells(table: str) -> list[tuple[tuple[str, str], str]]:
    """Return each cell's content by row and column."""
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [((row[0], name), cell) for row in rows for name, cell in zip(heading[1:], row[1:], strict=True)]


@pytest.mark.parametrize("path", LINKED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(path: Path) -> None:
    for link in documents.links(path):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target), link


def test_options_that_documents_name_exist() -> None:
    """Every command in running text and tables has an existing verb and options of that verb."""
    options = {verb: set(re.findall(r"--[a-z][a-z-]*", here(verb, "--help")[1])) for verb in VERBS}
    anything = {"--version", "--help"}.union(*options.values())
    for path in RUN:
        text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for words in map(str.split, re.findall(r"`([^`]+)`", text)):
            named = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
            if words[0] == "npgpt":
                assert words[1:2] == [] or words[1] in (*VERBS, "VERB", "--version"), words
                assert named <= options.get(words[1] if words[1:] else "", anything), words
            elif words[0].startswith("--"):
                assert named <= anything, words


def test_every_key_of_a_score_is_described() -> None:
    record = json.loads(here("score", "--ids", "1,2", "--json", "--top", "1")[1])
    table = (ROOT / "docs" / "scoring.md").read_text("utf-8").split("| key | value |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert list(record) == re.findall("`(.*?)`", "".join(rows))


def test_pictures_are_those_of_the_command() -> None:
    """Shades may differ by one step with another BLAS."""
    model = npgpt.load()
    for name, made in (("attention", pictures.attention(model)), ("score", pictures.score(model))):
        kept = (pictures.FOLDER / f"{name}.svg").read_text("utf-8")
        assert re.sub("#[0-9a-f]{6}", "", kept) == re.sub("#[0-9a-f]{6}", "", made)


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 150_000, picture
