"""Documents that are generated, and commands that documents show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_configuration_reference_is_what_the_schema_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "run python docs/make_configuration.py"


def test_every_file_that_the_documents_name_exists() -> None:
    missing = []
    for document in DOCUMENTS:
        for name in re.findall(r"`((?:launch|benchmarks|docs|conf|slurm|tests)/[\w./-]+\.\w+)`", document.read_text()):
            if not (ROOT / name).exists():
                missing.append(f"{document.name}: {name}")
    assert missing == []


def test_every_link_of_the_documents_leads_somewhere() -> None:
    links = [(page, link) for page in DOCUMENTS for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())]
    assert len(links) > 50
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_architecture_names_every_folder_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    folders = {f"{path.parent.relative_to(ROOT / 'distill')}/" for path in (ROOT / "distill").rglob("__init__.py")} - {
        "./"
    }
    assert set(re.findall(r"`([\w/]+/)`", rows)) == folders
