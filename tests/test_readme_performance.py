"""The README's performance section is what the stored results give, all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report_samples

from normnorm.bench import results, scaling
from normnorm.bench.report.markdown import (
    BEGIN,
    END,
    render_markdown,
    sources_of,
    with_section,
)
from normnorm.bench.report.sources import read

ROOT = Path(__file__).resolve().parent.parent
FORMATS = (results.FORMAT, scaling.FORMAT)


def stored(folder: Path) -> set[Path]:
    """The results of benchmarks and studies under a folder's benchmarks/results."""
    found = set()
    for path in (folder / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") in FORMATS:
            found.add(path.resolve())
    return found


def what_is_stale(folder: Path) -> str | None:
    """A sentence that says what is wrong with a folder's README; None where all is well."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    expected = stored(folder)
    if not expected:
        return "a section without results" if BEGIN in text else None
    if BEGIN not in text:
        return "no section"
    sources = sources_of(text, folder)
    paths = [*(run.path for run in sources.runs), *(path for path, _ in sources.studies)]
    if {path.resolve() for path in paths if path} != expected:
        return "made from other files than those that are stored"
    if with_section(text, render_markdown(sources, folder)) != text:
        return "other text than the results give"
    return None


def test_readme_is_rendered_from_the_stored_results() -> None:
    assert what_is_stale(ROOT) is None, "`make report` renders it again"


def test_a_stale_section_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text("# nothing", encoding="utf-8")
    (folder / "somebody_elses.json").write_text("[1]", encoding="utf-8")
    assert what_is_stale(tmp_path) is None
    path = folder / "cpu.json"
    results.save(report_samples.small_results(), path)
    assert what_is_stale(tmp_path) == "no section"
    section = render_markdown(read([path]), tmp_path)
    good = f"# nothing\n{BEGIN}\n{section}\n{END}\n"
    readme.write_text(good, encoding="utf-8")
    assert what_is_stale(tmp_path) is None
    readme.write_text(good.replace("1.30", "1.29"), encoding="utf-8")
    assert what_is_stale(tmp_path) == "other text than the results give"
    readme.write_text(good, encoding="utf-8")
    scaling.save(report_samples.study(), folder / "study.json")
    assert what_is_stale(tmp_path) == "made from other files than those that are stored"
    path.unlink()
    with pytest.raises(results.ResultsError, match="cannot read"):
        what_is_stale(tmp_path)
