"""The README and the pages behind it: links lead somewhere, code runs, tables name what is there."""

import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def _anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in _anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    for name in re.findall(r"(?<![\w./-])((?:\w+/)+[\w.]+\.(?:py|sh|toml|json))\b", page.read_text()):
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "gdn2_titan")), name


def test_every_page_is_found_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", ["README.md", "docs/operators.md"])
def test_the_code_of_a_page_runs(name):
    [code] = re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(code, name, "exec"), {})


def test_the_page_of_settings_has_every_field():
    pytest.importorskip("torchtitan")
    from gdn2_titan.titan.settings import GDN2, Data, OptimizerFields, Task

    page = (ROOT / "docs" / "settings.md").read_text()
    for name, section in {"gdn2": GDN2, "data": Data, "optimizer": OptimizerFields, "task": Task}.items():
        table = page.split(f"\n## [{name}]\n", 1)[1].split("\n## ", 1)[0]
        cells = "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
        assert set(re.findall(r"`(\w+)`", cells)) == {field.name for field in dataclasses.fields(section)}
