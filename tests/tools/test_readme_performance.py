"""The README's performance section is what the stored results give, all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report_samples

from speed import results
from speed.tables import BEGIN, END, readme_files, readme_section, with_section

ROOT = Path(__file__).resolve().parents[2]


def stored(folder: Path) -> set[Path]:
    """The results of benchmarks under a folder's benchmarks/results."""
    found = set()
    for path in (folder / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") == results.FORMAT:
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
    paths = readme_files(text, folder)
    if {path.resolve() for path in paths} != expected:
        return "made from other files than those that are stored"
    if with_section(text, readme_section(paths, folder)) != text:
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
    path, other = folder / "cpu.json", folder / "gpu.json"
    results.save(report_samples.small_results(), path)
    assert what_is_stale(tmp_path) == "no section"
    good = f"# nothing\n{BEGIN}\n{readme_section([path], tmp_path)}\n{END}\n"
    readme.write_text(good, encoding="utf-8")
    assert what_is_stale(tmp_path) is None
    readme.write_text(good.replace("1.30", "1.29"), encoding="utf-8")
    assert what_is_stale(tmp_path) == "other text than the results give"
    readme.write_text(good, encoding="utf-8")
    results.save(report_samples.gpu_results(), other)
    assert what_is_stale(tmp_path) == "made from other files than those that are stored"
    other.unlink()
    path.rename(other)
    with pytest.raises(results.ResultsError, match="cannot read"):
        readme_section([path], tmp_path)
