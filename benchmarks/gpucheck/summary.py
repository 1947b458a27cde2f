"""What a run found, for people: a table on the terminal and a page of Markdown."""

from __future__ import annotations

from typing import Any

from gpucheck.record import Record

__all__ = ["markdown", "text", "write"]

Rows = list[list[str]]


def _verdict(target: dict[str, Any]) -> str:
    return {True: "met", False: "MISSED", None: "-"}[target["met"]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    data = record["stages"].get("benchmark", {}).get("data") or {}
    return data.get("targets", [])


def _details(name: str, stage: dict[str, Any], targets: list[dict[str, Any]]) -> str:
    """A stage's result in a few words."""
    data = stage["data"] or {}
    if name == "smoke":
        checks = data.get("checks", [])
        return f"{sum(c['passed'] for c in checks)} of {len(checks)} checks passed"
    if name == "tests":
        counts = [f"{n} {outcome}" for outcome, n in sorted(data.get("counts", {}).items())]
        left = len(data.get("not_run", []))
        return ", ".join(counts + ([f"{left} not run"] if left else []))
    if name == "benchmark":
        met = sum(t["met"] is True for t in targets)
        missed = sum(t["met"] is False for t in targets)
        left = len(data.get("left_out", []))
        words = f"{met} targets met, {missed} missed, {len(targets) - met - missed} not measured"
        return words + (f"; {left} works left out" if left else "")
    if name == "sanitizers":
        return ", ".join(f"{tool} {t['status']}" for tool, t in data.get("tools", {}).items())
    if name == "build":
        libraries = data.get("libraries", {})
        return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in libraries.items())
    gpu = data.get("gpu")
    return gpu["name"] if gpu else data.get("cpu", "")


def _stage_rows(record: dict[str, Any]) -> Rows:
    targets = _targets(record)
    return [
        [name, f"{stage['seconds']:.1f}", stage["status"].upper() if stage["status"] != "passed"
         else "passed", _details(name, stage, targets)]
        for name, stage in record["stages"].items()
    ]  # fmt: skip


def _target_rows(record: dict[str, Any]) -> Rows:
    return [
        [t["target"], f"{'<=' if t['at_most'] else '>='} {_number(t['goal'])}",
         _number(t["value"]), _verdict(t), t["remark"] or ""]
        for t in _targets(record)
    ]  # fmt: skip


def _measured(record: dict[str, Any]) -> Rows:
    data = record["stages"].get("benchmark", {}).get("data") or {}
    rows = []
    for row in data.get("rows", []):
        if not row["provider"].startswith("normnorm-") and row["ratio"] in (None, 1.0):
            continue
        shape = "x".join(map(str, row["shape"]))
        last = " channels_last" if row["memory_format"] == "channels_last" else ""
        rows.append([
            f"{row['layer']} {shape} {row['dtype']}{last}, {row['operation']}, {row['mode']}",
            row["provider"], _number(row["median_ms"]), _number(row["ratio"]), row["peer"] or "",
            _number(row["gb_per_s"]), _number(row["share_of_copy"]),
        ])  # fmt: skip
    return rows


def _trained(record: dict[str, Any]) -> Rows:
    data = record["stages"].get("benchmark", {}).get("data") or {}
    return [
        [row["network"], row["provider"], row["norm"], f"{_number(row['rate'])} {row['unit']}",
         _number(row["median_ms"]), _number(row["ratio"])]
        for row in data.get("networks", [])
    ]  # fmt: skip


def _joined(record: dict[str, Any]) -> Rows:
    data = record["stages"].get("benchmark", {}).get("data") or {}
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in data.get("joined", []):
        shape = "x".join(map(str, row["shape"]))
        last = " channels_last" if row["memory_format"] == "channels_last" else ""
        case = (f"{row['what']}, {shape} {row['dtype']}{last}", row["backend"])
        times.setdefault(case, {})[row["way"]] = row["median_ms"]
    return [
        [*case, _number(ways.get("joined")),
         *(_number(ways["joined"] / ways[way]) if way in ways else ""
           for way in ("in steps", "torch"))]
        for case, ways in times.items()
    ]  # fmt: skip


def _closing(record: dict[str, Any]) -> str:
    states = {name: stage["status"] for name, stage in record["stages"].items()}
    failed = [name for name, status in states.items() if status == "failed"]
    missing = [name for name, status in states.items() if status == "unavailable"]
    dry = "dry run: " if record["dry"] else ""
    if failed:
        return f"{dry}FAILED: {', '.join(failed)}"
    if not record["ok"]:
        return f"{dry}not complete"
    but = f"; NOT CHECKED, for it is unavailable here: {', '.join(missing)}" if missing else ""
    return f"{dry}{'no stage failed' if but else 'every stage passed'}{but}"


def _aligned(rows: Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    return "\n".join(line.rstrip() for line in lines)


def text(record: dict[str, Any]) -> str:
    """The closing table: stages, then targets."""
    parts = ["", _aligned([["stage", "seconds", "result", ""], *_stage_rows(record)])]
    targets = _target_rows(record)
    if targets and not record["dry"]:  # of tiny inputs on a CPU they would say nothing
        parts += ["", _aligned([["target", "goal", "measured", "", ""], *targets])]
    return "\n".join([*parts, "", f"{_closing(record)} ({record['seconds']:.0f} s)"])


def _table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def _provenance(record: dict[str, Any]) -> str:
    data = record["stages"].get("environment", {}).get("data") or {}
    if not data:
        return ""
    versions = data["versions"]
    gpu = data["gpu"]["name"] if data["gpu"] else f"{data['cpu']} (no GPU)"
    driver = (data["nvidia_smi"] or {}).get("driver_version", "-")
    source = data["source"]
    commit = source["commit"] or f"none; sources {source['digest']}"
    if source["uncommitted"]:
        commit += " with uncommitted changes"
    return (
        f"{gpu}; driver {driver}; torch {versions['torch']}, CUDA {versions['cuda']}, Triton "
        f"{versions['triton']}; commit {commit}; {record['started']}"
    )


def markdown(record: dict[str, Any]) -> str:
    """The page: stages, targets, every row."""
    parts = [
        "# GPU check", _provenance(record), f"**{_closing(record)}** ({record['seconds']:.0f} s)",
        _table(["stage", "seconds", "result", ""], _stage_rows(record)),
    ]  # fmt: skip
    messages = [
        f"* {name}: {stage['message']}"
        for name, stage in record["stages"].items()
        if stage["message"]
    ]
    if messages:
        parts.append("\n".join(messages))
    tables = (
        ("Targets", ["target", "goal", "measured", "", ""], _target_rows(record)),
        (
            "Layers", ["work", "provider", "ms", "ratio", "to", "GB/s", "of copy"],
            _measured(record),
        ),
        (
            "Training steps", ["network", "provider", "norm layers", "a second", "ms", "ratio"],
            _trained(record),
        ),
        (
            "Joined to a neighbour", ["work", "backend", "ms", "to steps", "to torch in steps"],
            _joined(record),
        ),
    )  # fmt: skip
    for title, head, rows in tables:
        if rows:
            parts += [f"## {title}", _table(head, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(record: Record) -> bool:
    """Writes the page beside the record; False, and a sentence, where that fails."""
    try:
        record.markdown.write_text(markdown(record.data), encoding="utf-8")
    except OSError as error:
        print(f"the summary could not be written to {record.markdown}: {error}")
        return False
    return True
