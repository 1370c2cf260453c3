"""Every Python block of README and docs runs, top to bottom, in an empty folder.

What the text loads from the Hub lies in that folder under the same name: a tiny random BERT, and a few sentences.
"""

import re
from pathlib import Path

import pytest
from helpers.data import hub

import peft_prune
from peft_prune import report


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PLAIN = ("README.md", "reference.md", "support.md", "peft_matrix.md", "examples.md")
WITHOUT_CODE = [ROOT / "docs" / name for name in PLAIN]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_blocks_run_as_pasted(page, tmp_path, monkeypatch):
    blocks = BLOCK.findall(page.read_text())
    hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # blocks of a page build on each other
    assert blocks or page in WITHOUT_CODE, f"{page.name} shows no code"


def anchors(page: Path) -> set[str]:
    """What a link can name after `#`: the headings, as GitHub and MkDocs spell them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = (re.sub(r"\]\([^)]*\)", "", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    others = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
    for page in [*PAGES, *others]:
        for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", page.read_text())):
            if not target.startswith("http"):
                where = page.parent / target if target else page
                assert where.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(where), f"{page.name} links to {target}#{anchor}"


def test_every_public_name_is_in_the_reference():
    reference = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    names = [f"peft_prune.{name}" for name in peft_prune.__all__]
    names += [f"peft_prune.report.{name}" for name in report.__all__]
    assert sorted(set(names) - set(reference)) == []
    assert len(reference) == len(set(reference))


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_measured_numbers_name_the_command_that_made_them(page):
    sections = re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)
    for section in sections:
        title = section.split("\n")[0]
        if title in ("Measured", "Numbers", "What pays"):
            assert re.search(r"`[^`]*(benchmarks/|tests/|make )[^`]*`", section), f"{page.name}, {title}: no command"
