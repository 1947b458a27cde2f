"""``report.py``: PNG plots, Markdown, the README's section, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import report_samples

from normnorm.commands import execute
from speed import results
from speed.figures import in_order, look
from speed.report import parser
from speed.tables import BEGIN, END, markdown, readme_files, readme_section

PROVIDERS = (
    "normnorm-cpu", "normnorm-triton", "normnorm-reference", "torch", "cudnn", "compiled-torch",
    "compiled-reference", "reference", "liger", "quack", "copy",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A CPU's results and a GPU's."""
    folder = tmp_path_factory.mktemp("results")
    paths = [folder / name for name in ("cpu.json", "gpu.json")]
    results.save(report_samples.cpu_results(), paths[0])
    results.save(report_samples.gpu_results(), paths[1])
    return paths


def report(*arguments: object) -> int:
    return execute(parser(), list(map(str, arguments)))


def table_after(text: str, heading: str) -> list[list[str]]:
    """The cells of the first Markdown table after a column's name, head and rule included."""
    lines = text[text.rindex("\n", 0, text.index(heading)) + 1 :].splitlines()
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


# Plots


def test_every_plot_is_a_png_that_shows_something(files: list[Path], tmp_path: Path) -> None:
    assert report(*files, "--png", tmp_path / "plots") == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {
        "1_ratio_noise_float32.png", "1_ratio_quiet_float32.png", "1_ratio_eval_float32.png",
        "1_size_float32.png", "1_batch_sweep_float32.png", "1_networks.png",
    } == {name for name in names if name.startswith("1_")}  # fmt: skip
    assert "2_ratio_noise_bfloat16.png" in names
    for name in names:
        pixels = matplotlib.image.imread(tmp_path / "plots" / name)[..., :3]
        assert min(pixels.shape[:2]) > 300, name
        assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 20, name
        # Nothing is cut off: the outermost pixels are white.
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.min() == 1.0, name


def test_each_provider_has_colours_and_markers_of_its_own() -> None:
    looks = [look(provider) for provider in PROVIDERS]
    assert len({each.colour for each in looks}) == len(PROVIDERS)
    assert len({each.marker for each in looks}) == len(PROVIDERS)
    for each in looks:  # legible as text on white: 3 to 1 for the large, bold labels
        channels = [int(each.colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) > 2.2, each.label
    assert look("somebody new").label == "somebody new"
    assert in_order(["copy", "torch", "somebody new", "normnorm-cpu"]) == [
        "normnorm-cpu", "torch", "somebody new", "copy",
    ]  # fmt: skip


# Markdown


def test_markdown_holds_every_run(files: list[Path], tmp_path: Path) -> None:
    assert report(*files, "--markdown", tmp_path / "tables.md") == 0
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text == markdown(results.load(files[0])) + "\n" + markdown(results.load(files[1]))


def test_readme_ratio_is_that_of_the_two_columns_beside_it(files: list[Path]) -> None:
    text = readme_section(files, files[0].parent)
    networks = table_after(text, "| network |")
    assert networks[2] == [
        "resnet18 (torchvision) batch 8 float32, a training step", "normnorm (CPU)",
        "100", "112", "1.12",
    ]  # fmt: skip
    head, _, first, *rest = table_after(text, "| layer |")
    assert head == ["layer", "input", "operation", "provider", "torch, ms", "ms", "ratio"]
    largest = max(
        results.load(files[0]).select(
            provider="normnorm-cpu", operation="full", mode="noise", suite="resnet", status="ok"
        ),
        key=lambda row: row.elements,
    )
    assert first[:4] == [
        "BatchNormalNorm2d", "8x64x28x28 float32", "forward + backward, training with noise",
        "normnorm (CPU)",
    ]  # fmt: skip
    assert float(first[5]) == pytest.approx(largest.median_ms, rel=0.005)
    for *_, torch_ms, ms, ratio in (first, *rest):
        assert float(ratio) == pytest.approx(float(ms) / float(torch_ms), rel=0.01)
    assert "1 measurements failed or were wrong" in text
    assert "[gpu.json](gpu.json)" in text
    assert readme_files(text, files[0].parent) == files


def test_readme_section_of_an_interrupted_run_without_torch(tmp_path: Path) -> None:
    run = report_samples.small_results()
    run.measurements = [
        report_samples.replace(row, ratio=None, peer=None)
        for row in run.select(provider="normnorm-cpu")
    ]
    run.complete = False
    results.save(run, tmp_path / "run.json")
    text = readme_section([tmp_path / "run.json"], tmp_path)
    assert "was interrupted" in text
    assert "|" not in text


def test_readme_command_replaces_the_section_and_nothing_else(
    files: list[Path], tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    assert report(files[0], "--readme", readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\n{BEGIN}\n<!-- rendered")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    assert report(files[0], "--readme", readme) == 0
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text", ["nothing", f"{BEGIN} alone", f"{END}{BEGIN}", f"{BEGIN}{END}" * 2]
)
def test_readme_without_its_markers_is_left_alone(
    text: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    assert report(files[0], "--readme", readme) == 2
    assert "once each" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == text


# Refusals


BAD = {
    "foreign": '{"rows": []}',
    "another's": '{"format": "somebody-else", "version": 1}',
    "damaged": '{"format": "normnorm-bench", "version": 1, "environment": {"torch"',
    "empty": "",
    "future": '{"format": "normnorm-bench", "version": 99}',
    "hollow": '{"format": "normnorm-bench", "version": 1}',
    "list": "[]",
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gives_a_sentence_and_leaves_the_output_as_it_was(
    kind: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, table = tmp_path / "bad.json", tmp_path / "table.md"
    bad.write_text(BAD[kind], encoding="utf-8")
    table.write_text("before", encoding="utf-8")
    assert report(files[0], bad, "--markdown", table, "--png", tmp_path / "plots") == 2
    error = capsys.readouterr().err
    assert error.startswith("report.py: ")
    assert str(bad) in error
    assert "Traceback" not in error
    if kind == "future":
        assert "99" in error
    assert table.read_text(encoding="utf-8") == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "table.md"]


def test_missing_input_and_unwritable_output(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(files[0]) == 2
    assert "--png, --markdown or --readme" in capsys.readouterr().err
    assert report(tmp_path / "none.json", "--markdown", tmp_path / "table.md") == 2
    assert "cannot read" in capsys.readouterr().err
    assert report(files[0], "--markdown", tmp_path / "no folder" / "table.md") == 2
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert report(files[0], "--png", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"
    assert report(files[0], "--readme", tmp_path / "README.md") == 2
    assert "cannot read" in capsys.readouterr().err
