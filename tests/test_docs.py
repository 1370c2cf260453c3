"""Every Python block of README and docs runs, top to bottom, in an empty folder.

What the text loads from the Hub lies in that folder under the same name: a tiny random BERT, and a few sentences.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.data import hub

import peft_prune
from peft_prune import report
from peft_prune.report.methods import method_titles, methods_table


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PLAIN = ("README.md", "reference.md", "support.md", "peft_matrix.md", "peft_proposals.md", "examples.md")
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


# ------------------------------------------------------------------------ methods


def test_the_table_of_methods_is_made_from_the_recipes():
    made = re.search(
        r"<!-- methods: .*?-->\n(.*?)\n<!-- end of methods -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert made, "README.md has no block of methods"
    assert made[1] == methods_table(), f"README.md should have this between its comments:\n{methods_table()}"


def test_what_is_supported_is_said_of_every_method():
    heads = re.findall(r"^\| what \|(.*)\|$", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE)
    assert len(heads) >= 5
    for head in heads:
        assert [cell.strip() for cell in head.split("|")] == [*method_titles(), "test"]


def test_every_method_has_a_page():
    overview = (ROOT / "docs" / "README.md").read_text()
    for page in re.findall(r"\]\(docs/(\w+\.md)\)", methods_table()):
        assert f"]({page})" in overview and page in (ROOT / "mkdocs.yml").read_text()


USED = """
import sys
import torch
from peft import PeftModel, get_peft_model
from helpers.models import logits, make_llama
from peft_prune import calibrate
from peft_prune.layers.layer import pruning_layers
from new_method import RIAConfig

ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
model = get_peft_model(make_llama(), RIAConfig(task_type="CAUSAL_LM", sparsity=0.5))
calibrate(model, [{"input_ids": ids}])
first = next(layer for layer in pruning_layers(model) if layer.module_name.endswith("0.self_attn.q_proj"))
seen, plain = [], make_llama()
plain.get_submodule(first.module_name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
plain(input_ids=ids)
size = plain.get_submodule(first.module_name).weight.detach().abs()
ranking = (size / size.sum(1, keepdim=True) + size / size.sum(0)) * torch.cat(seen).square().sum(0) ** 0.25
assert torch.equal(first.get_mask("default"), ranking > ranking.flatten().median())
expected = logits(model, {"input_ids": ids})
model.save_pretrained("saved")
loaded = PeftModel.from_pretrained(make_llama(), "saved")
assert torch.equal(logits(loaded, {"input_ids": ids}), expected)
merged = loaded.merge_and_unload()
assert torch.equal(merged.get_submodule(first.module_name).weight == 0, ~first.get_mask("default"))
assert torch.equal(logits(merged, {"input_ids": ids}), expected)
"""


@pytest.mark.parametrize(
    ("text", "word"),
    [("Wanda: a mask", "wanda"), ("(score_init=x)", "init"), ("`WandaConfig`", "wanda"), ("llama.cpp", "cpp")],
)
def test_the_search_of_the_site_knows_words_beside_punctuation_and_parts_of_names(text, word):
    separator = re.search(r"separator: '(.*)'", (ROOT / "mkdocs.yml").read_text())[1]
    assert word in [part.lower() for part in re.split(separator, text) if part]


def test_the_new_method_of_contributing_works(tmp_path):
    """In a process of its own, since a method that is registered stays so."""
    (block,) = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len([line for line in block.splitlines() if line.strip()]) <= 40
    (tmp_path / "new_method.py").write_text(block)
    (tmp_path / "used.py").write_text(USED)
    code = f"import sys; sys.path[:0] = ['.', {str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import used"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imports_of(path: Path) -> set[str]:
    """Folders and modules at the top of the package that a file of it imports from, for types alone left out."""
    depth = len(path.relative_to(ROOT / "peft_prune").parts)
    tree, found = ast.parse(path.read_text()), set()
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {child for node in typing for child in ast.walk(node)}
    for node in ast.walk(tree):
        if node not in skipped and isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_data_flows_one_way():
    """As the table of CONTRIBUTING.md says: a row imports from itself and from rows above it."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    place = {}
    for i, (names, text) in enumerate(rows):
        for name in re.findall(r"`(\w+)(?:/|\.py)`", names + (text if "recipe.py" in names else "")):
            place[name] = i
    package = ROOT / "peft_prune"
    modules = (path for path in package.iterdir() if path.is_dir() or path.suffix == ".py")
    tops = {path.name.removesuffix(".py") for path in modules if not path.name.startswith("_")}
    assert tops == set(place), tops ^ set(place)
    for path in package.rglob("*.py"):
        top = path.relative_to(package).parts[0].removesuffix(".py")
        if top != "__init__":
            later = {name for name in imports_of(path) if place[name] > place[top]}
            assert not later, f"{path.relative_to(package)} imports {later}"
