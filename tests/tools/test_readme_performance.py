"""The README's performance section is what the stored results give, all of them."""

from __future__ import annotations

from pathlib import Path

from speed.results import FORMAT
from speed.tables import readme_files, readme_section, with_section

ROOT = Path(__file__).resolve().parents[2]


def test_readme_is_rendered_from_the_stored_results_by_make_report() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = readme_files(text, ROOT)
    stored = {
        path
        for path in (ROOT / "benchmarks/results").glob("*.json")
        if f'"format": "{FORMAT}"' in path.read_text(encoding="utf-8")
    }
    assert set(paths) == stored
    assert with_section(text, readme_section(paths, ROOT)) == text
