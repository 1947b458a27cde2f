"""Result files, the text made of them, and their comparison."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_samples import DTYPES, ENVIRONMENT, GPU, bench, network_row, row, some_results

from speed import compare, machine_code
from speed import results as results_module
from speed.results import (
    Count,
    Measurement,
    NetworkMeasurement,
    ResultsError,
    load,
    save,
)  # fmt: skip
from speed.tables import csv_text, markdown, text

# Result files


def test_what_is_saved_is_loaded(tmp_path):
    found = some_results(
        row(), row("broken", None, status="wrong", message="it was off"),
        networks=[network_row()], counts=[
            Count(work="w", mode="noise", operation="forward", isa="avx2", instructions=3.5)
        ], problems=["one"],
    )  # fmt: skip
    found.environment = replace(ENVIRONMENT, gpu=GPU, device="cuda")
    path = tmp_path / "r.json"
    save(found, path)
    assert load(path) == found
    data = json.loads(path.read_text())
    assert data["format"] == "normnorm-bench"
    assert data["version"] == 1


def put(old, new):
    return lambda text: text.replace(old, new)


DAMAGED = {
    "is damaged or not JSON": lambda text: text[: len(text) // 2],
    "is damaged or not JSON at all": lambda text: "\x7fELF",
    'has no "format"': lambda text: "[]",
    "its format is 'pytest-benchmark'": put("normnorm-bench", "pytest-benchmark"),
    "is of version 99": put('"version": 1,', '"version": 99,'),
    "Expected `float | null`": put('"median_ms": 1.0', '"median_ms": "fast"'),
    "missing required field `provider`": put('"provider"', '"who"'),
    "Invalid enum value 'sideways'": put('"full"', '"sideways"'),
    "says ok, but its times are": put('"median_ms": 1.0', '"median_ms": -1.0'),
    "says failed, but not why": put('"status": "ok"', '"status": "failed"'),
}  # fmt: skip


@pytest.mark.parametrize("sentence", DAMAGED)
def test_damaged_and_foreign_files_are_refused_in_words(sentence, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    save(some_results(row()), good)
    bad.write_text(DAMAGED[sentence](good.read_text()))
    with pytest.raises(ResultsError) as refusal:
        load(bad)
    assert sentence in str(refusal.value)
    assert str(bad) in str(refusal.value)
    assert bench("compare", good, bad) == 2
    assert sentence in capsys.readouterr().err


def test_files_that_are_no_text_or_not_there_are_refused_too(tmp_path):
    path = tmp_path / "binary.json"
    path.write_bytes(bytes(range(256)))
    for bad in (path, tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ResultsError):
            load(bad)
        assert bench("compare", bad, bad) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    save(some_results(row()), path)
    path.chmod(0o640)
    before = path.read_bytes()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(results_module.os, "fsync", full_disk)
        with pytest.raises(ResultsError, match="No space left on device"):
            save(some_results(row(), row("copy")), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    link = tmp_path / "link.json"
    link.symlink_to(path)
    save(some_results(row(), row("copy")), link)
    assert link.is_symlink()
    assert len(load(path).measurements) == 2
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ResultsError, match="cannot write"):
        save(some_results(row()), tmp_path / "no" / "folder.json")


def test_rates_and_shares_follow_from_the_rows():
    mine = row("normnorm-cpu", 2.0, model_bytes=8_000_000)
    copy = row("copy", 1.0, operation="forward", model_bytes=8_000_000)
    other = replace(copy, mode="eval", median_ms=0.5)
    found = some_results(mine, other, copy)
    assert mine.gb_per_s == pytest.approx(4.0)
    assert found.share_of_copy(mine) == pytest.approx(0.5)
    assert found.share_of_copy(replace(mine, shape=(1, 2))) is None
    assert network_row(median=20.0).rate == pytest.approx(200.0)


def test_the_issue_roof_is_instructions_over_lanes_and_clock():
    counts = [
        Count(work="w", mode="noise", operation=operation, isa="sm_90", instructions=each)
        for operation, each in (("forward", 40.0), ("backward", 60.0))
    ]
    found = some_results(counts=counts)
    found.environment = replace(ENVIRONMENT, gpu=GPU, device="cuda")
    # 100 multiprocessors issue 128 lanes 2e6 times a millisecond: 2.56e8 elements of 100 each.
    mine = row("normnorm-cuda", 2.0, shape=(256_000_000,))
    assert found.share_of_issue(mine) == pytest.approx(0.5)
    assert found.share_of_issue(replace(mine, operation="forward")) == pytest.approx(0.2)
    assert found.share_of_issue(replace(mine, mode="quiet")) is None
    assert found.share_of_issue(replace(mine, dtype="bfloat16")) is None
    assert found.share_of_issue(replace(mine, provider="torch")) is None
    assert some_results(counts=counts).share_of_issue(mine) is None


def test_instructions_of_the_cuda_kernels_are_those_that_the_tests_keep():
    stored = json.loads((Path(__file__).parents[1] / "data/sass_budgets.json").read_text())
    newest = stored[max(stored, key=lambda version: tuple(map(int, version.split("."))))]
    counts = machine_code.cuda_counts((9, 0))
    assert {(c.operation, c.mode, c.dtype) for c in counts} == set(
        itertools.product(("forward", "backward"), ("noise", "quiet"), DTYPES)
    )
    for c in counts:
        assert c.isa == "sm_90"
    noisy = {(c.operation, c.dtype): c.instructions for c in counts if c.mode == "noise"}
    for (operation, dtype), instructions in noisy.items():
        assert instructions == newest["sm_90"][f"{operation}_noise_{dtype}"]["instructions"]
    assert machine_code.cuda_counts((1, 0)) == []


# Text


def test_csv_has_ligers_columns_and_all_the_numbers():
    found = some_results(
        row("torch", 2.0, peak_bytes=2**20), row("idle", None, status="unavailable", message="no")
    )
    lines = list(csv.DictReader(csv_text(found).splitlines()))
    assert list(lines[0]) == [
        "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
        "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
        "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
    ]  # fmt: skip
    assert [(line["metric_name"], line["metric_unit"]) for line in lines] == [
        ("speed", "ms"), ("memory", "MB")
    ]  # fmt: skip
    assert [float(line["y_value_50"]) for line in lines] == [2.0, 1.0]
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
        assert "1.5 kB" in words
        assert "a processor, 2 threads on 2 cores" in words
        assert "torch 2.13.0" in words
        assert "400" in words  # images a second
    table = markdown(found)
    assert "| normnorm-cpu |" in table
    assert all(line.count("|") > 5 for line in table.splitlines() if line.startswith("|"))


def test_means_over_works_are_geometric():
    rows = [
        row(p, 1.0, shape=(8, n), ratio=ratio)
        for p, n, ratio in (("torch", 1, 1.0), ("a", 1, 0.5), ("a", 2, 2.0), ("b", 1, 3.0))
    ]
    words = text(some_results(*rows))
    mean = next(line for line in words.splitlines() if line.startswith("test "))
    assert mean.split() == ["test", "float32", "contiguous", "noise", "2", "1.00", "3.00", "(1)"]


# Comparison


def comparison(before, after, tmp_path):
    """The exit status of `bench.py compare` on two lists of rows."""
    for name, rows in (("a", before), ("b", after)):
        nets = [r for r in rows if isinstance(r, NetworkMeasurement)]
        layers = [r for r in rows if isinstance(r, Measurement)]
        save(some_results(*layers, networks=nets), tmp_path / f"{name}.json")
    return bench("compare", tmp_path / "a.json", tmp_path / "b.json")


def test_a_slowdown_beyond_the_noise_is_found(tmp_path, capsys):
    assert comparison([row("torch", 1.0)], [row("torch", 1.2)], tmp_path) == 1
    words = capsys.readouterr().out
    assert "+20%" in words
    assert "±1%" in words
    assert "1 slower, 0 faster" in words


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1.0, 0.01), (1.04, 0.01)),  # too little to be called a change
        ((1.0, 0.15), (1.2, 0.15)),  # within the noise
        ((1.2, 0.01), (1.0, 0.01)),  # faster
    ],
)
def test_what_is_no_slowdown_is_not_called_one(before, after, tmp_path, capsys):
    assert comparison([row("torch", *before)], [row("torch", *after)], tmp_path) == 0
    assert "0 slower" in capsys.readouterr().out


def test_one_long_sample_does_not_make_a_change():
    before = row("torch", 1.0)
    after = replace(row("torch", 1.2), p20_ms=1.15, p80_ms=2.0)
    assert not compare.changes(some_results(before), some_results(after))[0].significant


def test_a_slower_machine_shows_beside_the_slowdown():
    before = [row("torch", 1.0), row("a", 2.0, ratio=2.0)]
    after = [row("torch", 2.0), row("a", 4.0, ratio=2.0)]
    found = compare.changes(some_results(*before), some_results(*after))
    a = next(change for change in found if change.name.endswith("full, a"))
    assert a.significant
    assert a.against_torch == 1.0


def test_networks_are_compared_and_a_new_failure_counts(tmp_path, capsys):
    assert comparison([network_row()], [network_row(median=20.0)], tmp_path) == 1
    assert "conv_net batch 4" in capsys.readouterr().out
    failed = row("torch", None, status="failed", message="it broke")
    assert comparison([row("torch"), row("a")], [failed, row("a")], tmp_path) == 1
    assert "it broke" in capsys.readouterr().out


def test_files_without_anything_in_common_are_refused(tmp_path, capsys):
    assert comparison([row("torch")], [row("copy")], tmp_path) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_other_machines_and_versions_are_named():
    other = replace(ENVIRONMENT, threads=1, torch="2.14.0", packages={}, gpu=GPU)
    assert list(compare.differences(ENVIRONMENT, other)) == [
        "threads: 2 before, 1 after", "torch: 2.13.0 before, 2.14.0 after",
        "gpu: None before, a GPU after", "triton: 3.7.1 before, None after",
    ]  # fmt: skip
    assert list(compare.differences(ENVIRONMENT, ENVIRONMENT)) == []
