"""``normnorm report``: one page that works in a browser, plots, Markdown, and clear refusals."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import browser
import matplotlib.image
import numpy as np
import pytest
import report_samples

from normnorm import cli
from normnorm.bench import results, scaling
from normnorm.bench.report import write_html
from normnorm.bench.report.growth import growth_plots, model_is_supported
from normnorm.bench.report.html import render_html
from normnorm.bench.report.markdown import BEGIN, END, render_markdown, sources_of
from normnorm.bench.report.plots import plots_of
from normnorm.bench.report.roofline import columns
from normnorm.bench.report.sources import Source, Sources, read
from normnorm.bench.report.style import in_order, look
from normnorm.bench.report.tables import across

ROOT = Path(__file__).resolve().parent.parent
PROVIDERS = (
    "normnorm-cpu", "normnorm-triton", "normnorm-reference", "torch", "cudnn", "compiled-torch",
    "compiled-reference", "reference", "liger", "quack", "copy",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A CPU's results, a GPU's, and a study."""
    folder = tmp_path_factory.mktemp("results")
    paths = [folder / name for name in ("cpu.json", "gpu.json", "study.json")]
    results.save(report_samples.cpu_results(), paths[0])
    results.save(report_samples.gpu_results(), paths[1])
    scaling.save(report_samples.study(), paths[2])
    return paths


@pytest.fixture(scope="module")
def page(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both machines and the study on one page, by the command."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", *map(str, files), "--html", str(path)]) == 0
    return path


def report(*arguments: object) -> int:
    return cli.main(["report", *map(str, arguments)])


# The page


# Of each plot: how many colours a small copy of it has, and how much of it is not white.
_LOOK_AT_PLOTS = """
return [...document.querySelectorAll("img.plot")].map((image) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [400, 400];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 400, 400);
  const pixels = new Uint32Array(context.getImageData(0, 0, 400, 400).data.buffer);
  const drawn = pixels.filter((p) => (p >>> 24) > 0 && p !== 0xffffffff);
  return [image.alt, image.naturalWidth, new Set(pixels).size, drawn.length / pixels.length];
});
"""
_WIDTHS = "return [document.documentElement.scrollWidth, window.innerWidth]"
_COLUMN = """
const heads = [...document.querySelectorAll("#all th")].map((h) => h.textContent);
const column = heads.indexOf(arguments[0]);
return [...document.querySelectorAll("#all tbody tr")].filter((r) => !r.hidden)
  .map((r) => r.cells[column].textContent);
"""
_CLICK = """
[...document.querySelectorAll("#all th button")]
  .find((b) => b.textContent === arguments[0]).click();
"""
_CHOOSE = """
const label = [...document.querySelectorAll("#filters label")]
  .find((l) => l.firstChild.textContent === arguments[0]);
const control = label.querySelector("select, input");
control.value = arguments[1];
control.dispatchEvent(new Event(control.tagName === "SELECT" ? "change" : "input"));
"""


def test_page_in_a_browser(page: Path, files: list[Path]) -> None:
    """No complaint, nothing fetched, every plot drawn, a table that sorts and filters, and no
    overflow on a phone; one browser for all, since starting it takes most of the time."""
    with browser.chromium() as driver:
        browser.open_file(driver, page)
        plots = driver.execute_script(_LOOK_AT_PLOTS)
        expected = [
            plot.title
            for plots_ in (
                plots_of(report_samples.cpu_results()),
                plots_of(report_samples.gpu_results()),
                growth_plots(report_samples.study()),
            )
            for plot in plots_
        ]
        for (alt, width, colours, drawn), title in zip(plots, expected, strict=True):
            assert alt.startswith(title)
            assert width > 300, alt
            assert colours > 20, alt
            assert drawn > 0.01, alt

        for width in (360, 768, 1280):
            browser.resize(driver, width, 800)
            content, window = driver.execute_script(_WIDTHS)
            assert content <= width == window

        rows = driver.execute_script(_COLUMN, "ms")
        count = sum(len(results.load(path).measurements) for path in files[:2])
        assert len(rows) == count
        driver.execute_script(_CLICK, "ms")
        ascending = driver.execute_script(_COLUMN, "ms")
        numbers = [float(text) for text in ascending if text]
        assert numbers == sorted(numbers)
        assert ascending[-1] == ""  # not timed: at the end either way
        driver.execute_script(_CLICK, "ms")
        descending = driver.execute_script(_COLUMN, "ms")
        assert [float(text) for text in descending if text] == numbers[::-1]
        assert descending[-1] == ""
        driver.execute_script(_CLICK, "layer")
        layers = driver.execute_script(_COLUMN, "layer")
        assert layers == sorted(layers)

        driver.execute_script(_CHOOSE, "provider", "normnorm (Triton)")
        driver.execute_script(_CHOOSE, "contains", "8x64 BACKWARD")
        assert set(driver.execute_script(_COLUMN, "provider")) == {"normnorm (Triton)"}
        assert set(driver.execute_script(_COLUMN, "operation")) == {"backward"}
        shown = driver.execute_script("return document.getElementById('count').value")
        assert shown == f"4 of {count} rows"

        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        hidden = "return getComputedStyle(document.getElementById('filters')).display"
        assert driver.execute_script(hidden) == "none"

        assert browser.complaints(driver) == []
        assert browser.requests(driver) == [page.resolve().as_uri()]


def test_the_browser_test_notices_a_broken_page(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = render_html(Sources(runs=[Source(None, report_samples.small_results())]))
    text = text.replace("<h1>", '<div style="width: 500px">wide</div><h1>')
    text = text.replace('"use strict";', "nothing.here();", 1)
    text = re.sub(r'src="data:image/svg[^"]+"', 'src="missing.svg"', text, count=1)
    broken.write_text(text, encoding="utf-8")
    with browser.chromium(360, 800) as driver:
        browser.open_file(driver, broken)
        content, _ = driver.execute_script(_WIDTHS)
        assert content > 360
        assert "missing.svg" in " ".join(browser.requests(driver))
        complaints = " ".join(browser.complaints(driver))
        assert "nothing is not defined" in complaints
        assert "missing.svg" in complaints


def test_page_says_where_how_and_what_went_wrong(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in (
        "An accelerator", "A processor, 2 threads", "driver", "580.1", "torch 2.13.0+cpu",
        "0123456789abcdef", "normnorm bench --json gpu.json", "load average", "0.10 before, 1.90",
        "wrong: output is off by &lt;b&gt;0.5&lt;/b&gt; &amp; more",
        "compiled-reference is &lt;script&gt;alert(1)&lt;/script&gt; wrong",
        "Nothing in this section was measured by this project", "DeepLearningExamples",
    ):  # fmt: skip
        assert words in text, words
    assert "<script>alert" not in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "@import" not in text
    assert "http-equiv" not in text


def test_machines_stand_side_by_side(page: Path) -> None:
    runs = [("one", report_samples.cpu_results()), ("two", report_samples.gpu_results())]
    table = across(runs)
    assert table.head[3:] == (
        "one: normnorm (CPU)", "two: normnorm (CUDA)", "two: normnorm (Triton)",
    )  # fmt: skip
    works = {row[:3]: row[3:] for row in table.rows}
    assert works["LayerNormalNorm", "tokens, float32", "forward, evaluation"] == (
        "1.30", "0.80", "0.95",
    )  # fmt: skip
    assert not any("bfloat16" in name[1] for name in works)  # that only one of them measured
    assert across(runs[:1]).rows == []
    assert 'id="across"' in page.read_text(encoding="utf-8")


def test_page_is_the_same_for_the_same_results() -> None:
    sources = Sources(runs=[Source(None, report_samples.small_results())])
    assert render_html(sources) == render_html(sources)


def test_page_says_that_a_run_was_interrupted_or_the_machine_busy(tmp_path: Path) -> None:
    run = report_samples.small_results()
    assert "interrupted" not in render_html(Sources(runs=[Source(None, run)]))
    run.complete = False
    run.environment = report_samples.replace(run.environment, load_before=3.5)
    write_html(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "This run was interrupted" in text
    assert "The machine was busy (load average 3.5)" in text


def test_results_without_measurements_or_without_torch_make_a_page() -> None:
    empty = results.Results(environment=report_samples.CPU)
    assert "A processor" in render_html(Sources(runs=[Source(None, empty)]))
    alone = report_samples.small_results()
    alone.measurements = [
        report_samples.replace(row, ratio=None, peer=None)
        for row in alone.select(provider="normnorm-cpu")
    ]
    assert "BatchNormalNorm2d" in render_html(Sources(runs=[Source(None, alone)]))
    assert "render" not in render_markdown(Sources(runs=[Source(None, alone)]), ROOT)[40:]


# Plots


def test_every_plot_is_a_png_that_shows_something(files: list[Path], tmp_path: Path) -> None:
    assert report(files[0], files[2], "--png", tmp_path / "plots") == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {
        "1_ratio_noise_float32.png", "1_ratio_eval_float32.png", "1_size_float32.png",
        "1_batch_sweep_float32.png", "1_roofline.png", "1_networks.png",
        "1_ratio_quiet_float32.png", "2_growth.png", "2_collectives.png", "2_several_gpus.png",
    } == names  # fmt: skip
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


def test_roofs_follow_from_the_copy_and_from_instructions() -> None:
    run = report_samples.gpu_results()
    column = next(c for c in columns(run) if c.name.startswith("forward\nwith noise\n4 B"))
    assert column.counted
    assert column.arithmetic == pytest.approx(132 * 128 * 1.98 / 50.0)
    fastest = max(row.gb_per_s for row in run.select(provider="copy"))
    assert column.memory == pytest.approx(fastest / 4)
    on_cpu = next(columns(report_samples.cpu_results()))
    assert not on_cpu.counted
    ours = [row for row in on_cpu.rows if row.provider == "normnorm-cpu"]
    best = max(row.elements / row.median_ms * 1e-6 for row in ours)
    assert on_cpu.arithmetic == pytest.approx(best)


@pytest.mark.parametrize(("error", "shown"), [(0.1, True), (-0.24, True), (0.3, False)])
def test_model_is_shown_only_where_the_measurements_support_it(error: float, shown: bool) -> None:
    study = report_samples.study(error)
    assert model_is_supported(study.collectives) is shown
    assert not model_is_supported(study.collectives[:1])
    names = [plot.name for plot in growth_plots(study) if plot.model]
    assert ("several_gpus" in names) is shown
    text = render_markdown(Sources(studies=[(Path("study.json"), study)]), ROOT)
    assert ("Modelled, not measured" in text) is shown


# Markdown


def table_after(text: str, words: str) -> list[list[str]]:
    lines = text[text.index(words) :].splitlines()
    lines = list(itertools.dropwhile(lambda line: not line.startswith("|"), lines))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_markdown_has_the_numbers_and_where_they_come_from(files: list[Path]) -> None:
    folder = files[0].parent
    text = render_markdown(read(files), folder)
    assert [run.path for run in sources_of(text, folder).runs] == files[:2]
    assert "A processor, 2 threads" in text
    assert "commit 012345678" in text
    assert "[cpu.json](cpu.json)" in text
    head, _, first, *_ = table_after(text, "**Measured: A processor")
    run = results.load(files[0])
    resnet = run.select(
        provider="normnorm-cpu", operation="full", mode="noise", suite="resnet", status="ok"
    )
    largest = max(resnet, key=lambda row: row.elements)
    assert head[3:8] == ["largest", "torch, ms", "normnorm (CPU), ms", "/ torch", "over inputs"]
    assert first[:4] == [
        "BatchNormalNorm2d", "resnet, float32", "forward + backward, noise", "8x64x28x28",
    ]  # fmt: skip
    assert float(first[5]) == pytest.approx(largest.median_ms, rel=0.005)
    geometric = np.exp(np.mean([np.log(row.ratio) for row in resnet]))
    assert float(first[6]) == pytest.approx(geometric, abs=0.005)
    low, high = min(row.ratio for row in resnet), max(row.ratio for row in resnet)
    assert first[7] == f"{len(resnet)}: {low:.2f} to {high:.2f}"
    assert "1 measurements failed or were wrong" in text
    assert "Measured: how cost grows" in text


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
    "future study": '{"format": "normnorm-scaling", "version": 99}',
    "hollow": '{"format": "normnorm-bench", "version": 1}',
    "hollow study": '{"format": "normnorm-scaling", "version": 1}',
    "list": "[]",
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gives_a_sentence_and_leaves_what_there_was(
    kind: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, page = tmp_path / "bad.json", tmp_path / "page.html"
    bad.write_text(BAD[kind], encoding="utf-8")
    page.write_text("what there was", encoding="utf-8")
    assert report(files[0], bad, "--html", page, "--png", tmp_path / "plots") == 2
    error = capsys.readouterr().err
    assert error.startswith("normnorm report: ")
    assert str(bad) in error
    assert "Traceback" not in error
    if "future" in kind:
        assert "99" in error
    assert page.read_text(encoding="utf-8") == "what there was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "page.html"]


def test_missing_input_and_unwritable_output(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(tmp_path / "none.json") == 2
    assert "cannot read" in capsys.readouterr().err
    assert report(files[0], "--html", tmp_path / "no folder" / "page.html") == 2
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert report(files[0], "--png", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"
    assert report(files[0], "--readme", tmp_path / "README.md") == 2
    assert "cannot read" in capsys.readouterr().err
