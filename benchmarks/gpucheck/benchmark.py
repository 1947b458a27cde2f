"""Stage: how long the layers take beside torch's own, and whether the targets are met.

The engine of ``normnorm bench`` measures: each provider is checked against float64, then all are
timed in alternation. What does not fit into the time is written down as left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import sys
import time
import types
from typing import Any

import torch

from gpucheck.environment import nvidia_smi
from gpucheck.rig import Rig
from gpucheck.stage import COMMAND, Failure, Section, main, write_json

if importlib.util.find_spec("msgspec") is None:
    # The engine reads and writes its own files with it; nothing here does, and a machine without
    # a network may not have it.
    sys.modules["msgspec"] = types.ModuleType("msgspec")

import fused

from gpucheck import targets, works
from normnorm import use_backend
from normnorm.bench import environment, results
from normnorm.bench import measure as engine
from normnorm.bench.networks import Network, measure_network
from normnorm.bench.results import Measurement, NetworkMeasurement
from normnorm.bench.work import Work

__all__ = ["run"]

_SEED = engine.Settings().seed
_FIELDS = (
    "suite", "layer", "dtype", "memory_format", "mode", "operation", "method", "provider",
    "status", "message", "median_ms", "p20_ms", "p80_ms", "rounds", "calls", "model_bytes",
    "ratio", "peer", "kept_bytes", "peak_bytes", "error", "bound",
)  # fmt: skip


_NETWORK_FIELDS = (
    "network", "source", "norm", "provider", "norm_layers", "batch", "dtype", "memory_format",
    "unit", "units", "status", "message", "median_ms", "p20_ms", "p80_ms", "rate", "ratio",
    "peak_bytes",
)  # fmt: skip


def _allow_for_radii(rig: Rig) -> None:
    """Adds to the engine's bound what the normals may err by.

    The radius of a pair is off by up to the root of two units where it is itself no larger, since
    the logarithm under it errs absolutely. Among many normals the largest is above 4, and so is
    the largest output in the same measure.
    """
    of_rounding = engine.bound

    def bound(work: Work) -> float:
        return of_rounding(work) + ((2 * rig.unit) ** 0.5 / 4 if work.mode == "noise" else 0.0)

    engine.bound = bound


def _row(measurement: Measurement) -> dict[str, Any]:
    row = {name: getattr(measurement, name) for name in _FIELDS}
    row["shape"] = list(measurement.shape)
    row["gb_per_s"] = measurement.gb_per_s
    row["share_of_copy"] = None
    return row


def _network_row(measurement: NetworkMeasurement) -> dict[str, Any]:
    return {name: getattr(measurement, name) for name in _NETWORK_FIELDS}


def _add_shares(rows: list[dict[str, Any]]) -> None:
    """Each row's bytes a second over those of the copy in the same measurement."""
    copies = [r for r in rows if r["provider"] == "copy" and r["gb_per_s"]]
    if copies:
        for row in rows:
            if row["gb_per_s"] and row["provider"] != "copy":
                row["share_of_copy"] = row["gb_per_s"] / copies[0]["gb_per_s"]


class Benchmark:
    """The measurements of a run, and the time they may take."""

    def __init__(self, rig: Rig, section: Section) -> None:
        self.rig = rig
        self.section = section
        self.ours = [f"normnorm-{name}" for name in rig.serving()]
        self._began = time.time()
        self.found = results.Results(environment=environment.before(rig.device, _SEED))
        self.data = section.data
        self.data.update(
            copy_gb_per_s=None,
            rows=[],
            networks=[],
            joined=[],
            left_out=[],
            targets=[],
            clocks_after=None,
        )

    def has(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        return self.section.left_s > self.rig.pick(seconds, 1.0)

    def leave_out(self, what: str, why: str) -> None:
        self.data["left_out"].append({"what": what, "why": why})

    def measure(self, item: works.Item) -> None:
        if not self.has(item.seconds):
            self.leave_out(str(item.work), "no time was left")
            return
        providers = [n for n in item.providers if n in self.ours or n not in works.OURS]
        budget = self.rig.pick(0.1, 0.002) * len(providers)
        settings = engine.Settings(
            budget_s=budget, min_rounds=self.rig.pick(5, 2), max_rounds=self.rig.pick(60, 3)
        )
        try:
            found = engine.measure(item.work, providers, self.rig.device, settings)
            self.rig.synchronize()
        except Exception as error:  # out of memory, say: the other rows are worth having
            self.leave_out(str(item.work), f"{type(error).__name__}: {error}"[:500])
            self.rig.free_cache()
            self.rig.synchronize()  # a device that failed for good ends the stage here
            return
        self.found.measurements += found
        rows = list(map(_row, found))
        _add_shares(rows)
        self.data["rows"] += rows
        self._tell(str(item.work), rows)
        self.save()

    def _tell(self, work: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["provider"] in self.ours and row["median_ms"]:
                ratio = f"{row['ratio']:.2f} x {row['peer']}" if row["ratio"] else ""
                share = f"{row['share_of_copy']:.0%} of copy" if row["share_of_copy"] else ""
                who = row["provider"].removeprefix("normnorm-")
                time = f"{row['median_ms']:9.4f} ms"
                print(f"{who:7} {work:62} {row['operation']:9}{time}  {ratio:14} {share}")
            elif row["status"] in ("wrong", "failed"):
                print(f"{row['provider']} {work} {row['status']}: {row['message']}")

    def train(self, network: Network) -> None:
        what = f"training step of {network}"
        if not self.has(25.0):
            self.leave_out(what, "no time was left")
            return
        budget = self.rig.pick(3.0, 0.005)
        settings = engine.Settings(
            budget_s=budget, min_rounds=self.rig.pick(5, 1), max_rounds=self.rig.pick(30, 1)
        )
        try:
            found = measure_network(network, ["torch", *self.ours], self.rig.device, settings)
            self.rig.synchronize()
        except Exception as error:
            self.leave_out(what, f"{type(error).__name__}: {error}"[:500])
            self.rig.free_cache()
            self.rig.synchronize()
            return
        self.found.networks += found
        rows = list(map(_network_row, found))
        self.data["networks"] += rows
        for row in rows:
            if row["ratio"]:
                print(
                    f"{row['provider']:16} {network}: {row['rate']:.0f} {row['unit']}/s,"
                    f" {row['ratio']:.3f} x torch"
                )
            elif row["message"]:
                print(f"{row['provider']:16} {network}: {row['message']}")
        self.rig.free_cache()
        self.save()

    def join(self, case: works.Joined) -> None:
        """What it saves to do a neighbour's work in the norm's own pass."""
        dtype, rounds = getattr(torch, case.dtype), self.rig.pick(9, 1)
        for name in self.rig.serving():
            if not self.has(3.0):
                self.leave_out(f"{case} by {name}", "no time was left")
                continue
            try:
                with use_backend(name):
                    found = fused.measure(
                        case.what, case.shape, case.memory_format, dtype, self.rig.device,
                        self.rig.pick(0.3, 0.001), rounds,
                    )  # fmt: skip
                self.rig.synchronize()
            except Exception as error:
                self.leave_out(f"{case} by {name}", f"{type(error).__name__}: {error}"[:500])
                self.rig.free_cache()
                self.rig.synchronize()
                continue
            times = {row.way: row.timing for row in found}
            saved = times["joined"].median_ms / times["in steps"].median_ms
            print(f"{name:7} {case}: {times['joined'].median_ms:.4f} ms, {saved:.2f} x in steps")
            self.data["joined"] += [
                {
                    "what": row.what, "way": row.way, "backend": name, "shape": list(row.shape),
                    "dtype": row.dtype, "memory_format": row.memory_format, "moved": row.moved,
                    "kept_bytes": row.kept_bytes, "median_ms": row.timing.median_ms,
                    "p20_ms": row.timing.p20_ms, "p80_ms": row.timing.p80_ms,
                }
                for row in found
            ]  # fmt: skip
            self.save()

    def save(self) -> None:
        copies = [r["gb_per_s"] for r in self.data["rows"] if r["provider"] == "copy"]
        self.data["copy_gb_per_s"] = max((speed for speed in copies if speed), default=None)
        self.data["targets"] = targets.judge(
            self.data["rows"], self.data["networks"], self.ours, not self.rig.dry
        )
        self.section.save()

    def finish(self) -> None:
        """Leaves the rows in the engine's own form too, for `normnorm report`."""
        seconds = time.time() - self._began
        before = dataclasses.replace(
            self.found.environment, command_line=os.environ.get(COMMAND, shlex.join(sys.argv))
        )
        self.found.environment = environment.after(before, self.rig.device, seconds)
        self.found.problems = [f"{each['what']}: {each['why']}" for each in self.data["left_out"]]
        self.found.complete = True
        data = {
            "format": results.FORMAT, "version": results.VERSION,
            **dataclasses.asdict(self.found),
        }  # fmt: skip
        write_json(self.section.folder / "gpu_check_bench.json", data)


def run(section: Section) -> None:
    rig = Rig.find(section.dry)
    _allow_for_radii(rig)
    benchmark = Benchmark(rig, section)
    for item in works.first(section.dry):
        benchmark.measure(item)
    for network in works.networks(section.dry):
        benchmark.train(network)
    for case in works.joined(section.dry):
        benchmark.join(case)
    for item in (*works.definitions(section.dry), *works.last(section.dry)):
        benchmark.measure(item)
    section.data["clocks_after"] = None if section.dry else nvidia_smi()
    benchmark.save()
    benchmark.finish()
    wrong = [
        r for r in benchmark.data["rows"]
        if r["provider"] in benchmark.ours and r["status"] in ("wrong", "failed")
    ]  # fmt: skip
    bad = [r for r in benchmark.data["networks"] if r["status"] == "failed"]
    if not any(row["status"] == "ok" for row in benchmark.data["rows"]):
        raise Failure("nothing was measured")
    if "normnorm-cuda" not in benchmark.ours:
        raise Failure(f"backend 'cuda' cannot run: {rig.reasons()['cuda']}")
    if wrong or bad:
        first_message = (wrong or bad)[0]["message"]
        raise Failure(f"{len(wrong)} rows and {len(bad)} networks failed: {first_message}")


if __name__ == "__main__":
    main(run)
