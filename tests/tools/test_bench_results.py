"""Result files, the tables, CSV and plots made of them, the README's section, and comparison."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from bench_samples import DTYPES, ENVIRONMENT, GPU, bench, network_row, row, some_results, whole_run
from report import parser as report_parser

from normnorm.cli import execute
from speed import counts, results
from speed.results import Count, Measurement, NetworkMeasurement, ResultsError, load, save
from speed.tables import (
    BEGIN,
    CSV_COLUMNS,
    END,
    changes,
    csv_text,
    differences,
    markdown,
    readme_files,
    readme_section,
    text,
)


def report(*arguments):
    return execute(report_parser(), list(map(str, arguments)))


# Result files


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_saved_is_loaded(gpu, tmp_path):
    found = whole_run(gpu)
    save(found, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == found
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["format"], data["version"]) == ("normnorm-bench", 1)


def put(old, new):
    return lambda text: text.replace(old, new)


DAMAGED = {
    "truncated": lambda text: text[: len(text) // 2],
    "Invalid enum value 'pytest-benchmark' - at `$.format`": put("normnorm-bench",
                                                                 "pytest-benchmark"),
    "Invalid enum value 99 - at `$.version`": put('"version": 1,', '"version": 99,'),
    "Expected `float | null`": put('"median_ms": 1.0', '"median_ms": "fast"'),
}  # fmt: skip


@pytest.mark.parametrize("sentence", DAMAGED)
def test_a_bad_file_gets_a_sentence_and_nothing_is_written(sentence, tmp_path, capsys):
    good, bad, table = (tmp_path / name for name in ("good.json", "bad.json", "table.md"))
    save(some_results(row()), good)
    bad.write_text(DAMAGED[sentence](good.read_text()))
    table.write_text("before")
    assert bench("compare", good, bad) == 2
    assert report(good, bad, "--markdown", table, "--png", tmp_path / "plots") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f'{bad} is damaged, or no "normnorm-bench" file of version 1: ' in first
    assert sentence in first
    assert second == first.replace("bench.py", "report.py", 1)
    assert table.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3


def test_files_that_are_not_there_and_outputs_that_cannot_be_written(tmp_path, capsys):
    good, file = tmp_path / "good.json", tmp_path / "file"
    save(some_results(row()), good)
    file.write_text("in the way")
    for words, sentence in (
        ([good], "--png, --markdown or --readme"),
        ([tmp_path / "none.json", "--png", tmp_path / "plots"], "cannot read"),
        ([good, "--markdown", tmp_path / "no folder/table.md"], "cannot write"),
        ([good, "--png", file], "cannot write"),
        ([good, "--readme", tmp_path / "README.md"], "cannot read"),
    ):
        assert report(*words) == 2
        assert sentence in capsys.readouterr().err
    assert file.read_text() == "in the way"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "r.json", tmp_path / "link.json"
    save(some_results(row()), path)
    before = path.read_bytes()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(results.os, "replace", full_disk)
        with pytest.raises(ResultsError, match="No space left on device"):
            save(some_results(row(), row("copy")), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    link.symlink_to(path)
    save(some_results(row(), row("copy")), link)
    assert link.is_symlink()
    assert len(load(path).measurements) == 2


def test_rates_and_shares_follow_from_the_rows():
    mine = row("normnorm-cpu", 2.0, model_bytes=8_000_000)
    copy = row("copy", 1.0, operation="forward", model_bytes=8_000_000)
    found = some_results(mine, replace(copy, mode="eval", median_ms=0.5), copy)
    assert mine.gb_per_s == pytest.approx(4.0)
    assert found.share_of_copy(mine) == pytest.approx(0.5)
    assert found.share_of_copy(replace(mine, shape=(1, 2))) is None
    assert network_row(median=20.0).rate == pytest.approx(200.0)


def test_the_issue_roof_is_instructions_over_lanes_and_clock():
    found = some_results(counts=[
        Count(work="w", mode="noise", operation=operation, isa="sm_90", instructions=each)
        for operation, each in (("forward", 40.0), ("backward", 60.0))
    ])  # fmt: skip
    # 100 multiprocessors issue 128 lanes 2e6 times a millisecond: 2.56e8 elements of 100 each.
    mine = row("normnorm-cuda", 2.0, shape=(256_000_000,))
    assert found.share_of_issue(mine) is None
    found.environment = replace(ENVIRONMENT, gpu=GPU, device="cuda")
    assert found.share_of_issue(mine) == pytest.approx(0.5)
    assert found.share_of_issue(replace(mine, operation="forward")) == pytest.approx(0.2)
    for other in ({"mode": "quiet"}, {"dtype": "bfloat16"}, {"provider": "torch"}):
        assert found.share_of_issue(replace(mine, **other)) is None


def test_instructions_of_the_cuda_kernels_are_those_that_the_tests_keep():
    stored = json.loads((Path(__file__).parents[1] / "data/sass_budgets.json").read_text())
    newest = stored[max(stored, key=lambda version: tuple(map(int, version.split("."))))]["sm_90"]
    found = {(c.operation, c.mode, c.dtype): c for c in counts.count_cuda((9, 0))}
    assert set(found) == set(itertools.product(("forward", "backward"), ("noise", "quiet"), DTYPES))
    for (operation, mode, dtype), count in found.items():
        assert count.isa == "sm_90"
        if mode == "noise":
            kept = newest[f"{operation}_noise_{dtype}"]["instructions"]
            assert count.instructions == kept
    assert counts.count_cuda((1, 0)) == []


# Text


def test_csv_has_ligers_columns_and_all_the_numbers():
    found = some_results(
        row("torch", 2.0, peak_bytes=2**20), row("idle", None, status="unavailable", message="no")
    )
    lines = list(csv.DictReader(csv_text(found).splitlines()))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert [(line["metric_name"], line["metric_unit"], line["y_value_50"]) for line in lines] == [
        ("speed", "ms", "2.0"), ("memory", "MB", "1.0")
    ]  # fmt: skip
    assert json.loads(lines[0]["extra_benchmark_config_str"])["shape"] == [8, 32]
    assert lines[0]["gpu_name"] == "a processor"


def test_the_tables_say_what_failed_and_where_it_was_measured():
    found = some_results(
        row("torch", 2.0, ratio=1.0, peer="torch", kept_bytes=1500, error=1e-7, bound=1e-5),
        row("normnorm-cpu", 3.0, ratio=1.5, peer="torch"),
        row("broken", None, status="wrong", message="it was off"),
        networks=[network_row()], problems=["broken on it: wrong: it was off"],
    )  # fmt: skip
    for words in (text(found), markdown(found)):
        assert "LayerNormalNorm 8x32 float32, training with noise" in words
        assert "broken: wrong: it was off" in words
        assert "a processor, 2 threads on 2 cores" in words
        assert "torch 2.13.0" in words
        assert "400" in words  # images a second
    (line,) = [line for line in text(found).splitlines() if line.startswith("torch  ")][:1]
    assert line.split() == ["torch", "2", "±1%", "1.00", "0.00256", "1.5", "kB", "1e-07"]
    assert "| torch | 2 ±1% | 1.00 | 0.00256 |  | 1.5 kB |  | 1e-07 |" in markdown(found)


def test_means_over_works_are_geometric():
    rows = [
        row(p, 1.0, shape=(8, n), ratio=ratio)
        for p, n, ratio in (("torch", 1, 1.0), ("a", 1, 0.5), ("a", 2, 2.0), ("b", 1, 3.0))
    ]
    words = text(some_results(*rows))
    mean = next(line for line in words.splitlines() if line.startswith("test "))
    assert mean.split() == ["test", "float32", "contiguous", "noise", "2", "1.00", "3.00", "(1)"]


# Rendering


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CPU's results and a GPU's."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("cpu", "gpu"):
        save(whole_run(name == "gpu"), folder / f"{name}.json")
    return [folder / "cpu.json", folder / "gpu.json"]


def test_the_tables_of_every_run_are_written_and_each_plot_shows_something(files, tmp_path):
    table, tmp_path = tmp_path / "tables.md", tmp_path / "plots"
    assert report(*files, "--png", tmp_path, "--markdown", table) == 0
    assert table.read_text() == markdown(load(files[0])) + "\n" + markdown(load(files[1]))
    expected = {
        "ratio_noise_float32", "ratio_quiet_float32", "ratio_eval_float32", "size_float32",
        "batch_sweep_float32", "networks",
    }  # fmt: skip
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{i}_{name}.png" for i in (1, 2) for name in expected}
    for name in names:
        pixels = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert min(pixels.shape[:2]) > 300, name
        assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 20, name
        # Nothing is cut off: the outermost pixels are white.
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.min() == 1.0, name


def test_readme_ratio_is_that_of_the_two_columns_beside_it(files, tmp_path):
    words = readme_section(files, files[0].parent)
    lines = [line[2:-2].split(" | ") for line in words.splitlines() if "|" in line]
    head = lines.index(["layer", "input", "operation", "provider", "torch, ms", "ms", "ratio"])
    assert lines[2] == [
        "conv_net (normnorm) batch 4 float32, a training step", "normnorm (CPU)",
        "100", "112", "1.12",
    ]  # fmt: skip
    assert lines[head + 2] == [
        "BatchNormalNorm2d", "8x64x28x28 float32", "forward + backward, training with noise",
        "normnorm (CPU)", "0.401", "0.522", "1.30",
    ]  # fmt: skip
    rows = [line for line in lines if line[-1][0].isdigit()]
    assert len(rows) >= 3
    for *_, torch_ms, ms, ratio in rows:
        assert float(ratio) == pytest.approx(float(ms) / float(torch_ms), rel=0.01)
    assert not any("x64x14x14" in line[1] for line in lines)  # sweeps are left out
    assert "1 measurements failed or were wrong" in words
    assert "[gpu.json](gpu.json)" in words
    assert readme_files(words, files[0].parent) == files
    interrupted = some_results(row("normnorm-cpu"))
    interrupted.complete = False
    save(interrupted, tmp_path / "run.json")
    words = readme_section([tmp_path / "run.json"], tmp_path)
    assert "was interrupted" in words
    assert "|" not in words


def test_readme_command_replaces_the_section_and_nothing_else(files, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert report(files[0], "--readme", readme) == 0
    words = readme.read_text()
    assert words.startswith(f"# Title\n\n{BEGIN}\n<!-- rendered")
    assert words.endswith(f"{END}\n\nafter\n")
    assert "old" not in words
    for bad in ("nothing", f"{BEGIN} alone", f"{END}{BEGIN}", f"{BEGIN}{END}" * 2):
        readme.write_text(bad)
        assert report(files[0], "--readme", readme) == 2
        assert "once each" in capsys.readouterr().err
        assert readme.read_text() == bad


# Comparison


def comparison(before, after, tmp_path):
    """The exit status of `bench.py compare` on two lists of rows."""
    for name, rows in (("a", before), ("b", after)):
        nets = [r for r in rows if isinstance(r, NetworkMeasurement)]
        layers = [r for r in rows if isinstance(r, Measurement)]
        save(some_results(*layers, networks=nets), tmp_path / f"{name}.json")
    return bench("compare", tmp_path / "a.json", tmp_path / "b.json")


@pytest.mark.parametrize(
    ("before", "after", "status", "words"),
    [
        ((1.0, 0.01), (1.2, 0.01), 1, "1 slower, 0 faster"),
        ((1.2, 0.01), (1.0, 0.01), 0, "0 slower, 1 faster"),
        ((1.0, 0.01), (1.04, 0.01), 0, "0 slower, 0 faster"),  # too little to be called a change
        ((1.0, 0.15), (1.2, 0.15), 0, "0 slower, 0 faster"),  # within the noise
    ],
)
def test_a_change_beyond_the_noise_is_found(before, after, status, words, tmp_path, capsys):
    assert comparison([row("torch", *before)], [row("torch", *after)], tmp_path) == status
    said = capsys.readouterr().out
    assert words in said
    assert ("+20%" in said and "±1%" in said) == (status == 1)


def test_one_long_sample_does_not_make_a_change():
    after = replace(row("torch", 1.2), p20_ms=1.15, p80_ms=2.0)
    assert not changes(some_results(row("torch", 1.0)), some_results(after))[0].significant


def test_a_slower_machine_shows_beside_the_slowdown():
    before = [row("torch", 1.0), row("a", 2.0, ratio=2.0)]
    after = [row("torch", 2.0), row("a", 4.0, ratio=2.0)]
    found = changes(some_results(*before), some_results(*after))
    a = next(change for change in found if change.name.endswith("full, a"))
    assert a.significant
    assert a.against_torch == 1.0


def test_networks_are_compared_and_a_new_failure_counts(tmp_path, capsys):
    assert comparison([network_row()], [network_row(median=20.0)], tmp_path) == 1
    assert "conv_net (normnorm) batch 4" in capsys.readouterr().out
    failed = row("torch", None, status="failed", message="it broke")
    assert comparison([row("torch"), row("a")], [failed, row("a")], tmp_path) == 1
    assert "it broke" in capsys.readouterr().out


def test_files_without_anything_in_common_are_refused(tmp_path, capsys):
    assert comparison([row("torch")], [row("copy")], tmp_path) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_other_machines_and_versions_are_named():
    other = replace(ENVIRONMENT, threads=1, torch="2.14.0", packages={}, gpu=GPU)
    assert differences(ENVIRONMENT, other) == [
        "threads: 2 before, 1 after", "torch: 2.13.0 before, 2.14.0 after",
        "gpu: None before, a GPU after", "triton: 3.7.1 before, None after",
    ]  # fmt: skip
    assert differences(ENVIRONMENT, ENVIRONMENT) == []
