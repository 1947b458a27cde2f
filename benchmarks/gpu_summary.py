"""What a run of ``gpu_check.py`` found, as a page of Markdown: steps, failures, targets, and every
time beside what was predicted for it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_targets

# GB/s of device memory by the vendors' datasheets; the longest name that a device's holds counts.
MEMORY = {
    "H200": 4800, "H100 80GB HBM3": 3350, "H100 NVL": 3900, "H100 PCIe": 2000, "H20": 4000,
    "GH200": 4000, "B200": 8000, "A100-SXM4-80GB": 2039, "A100-SXM4-40GB": 1555,
    "A100 80GB PCIe": 1935, "A100-PCIE-40GB": 1555, "L40S": 864, "L4": 300, "RTX 3090": 936,
    "RTX 4090": 1008, "RTX 5090": 1792,
}  # fmt: skip
COPY = 0.9  # of that a copy reaches: 4.3 TB/s on an H200
# What a kernel that holds its groups on chip is expected to reach: of a copy, and of the rate at
# which the multiprocessors can issue its instructions, 128 elements' a clock.
OF_COPY, OF_ISSUE, LANES = 0.80, 0.75, 128
OURS = ("normnorm-cuda", "normnorm-triton")


def roof(name: str) -> float | None:
    """The GB/s that a copy reaches on a device of that name; None for one that is not listed."""
    known = max((model for model in MEMORY if model in name), key=len, default=None)
    return None if known is None else COPY * MEMORY[known]


def predicted_ms(row: dict[str, Any], gpu: dict[str, Any], counts: Sequence[dict]) -> float | None:
    """The larger of what moving its bytes and issuing its instructions should take, pass by pass;
    None for an unknown device."""
    copy = roof(gpu["name"])
    if copy is None:
        return None
    passes = ["forward", "backward"] if row["operation"] == "full" else [row["operation"]]
    tensors = {"forward": 2, "backward": 3}
    total = 0.0
    for each in passes:
        moved = row["model_bytes"] * tensors[each] / sum(tensors[p] for p in passes)
        memory = moved / (copy * 1e6) / OF_COPY
        elements = moved / tensors[each] / {"float32": 4, "bfloat16": 2, "float16": 2}[row["dtype"]]
        instructions = next(
            (c["instructions"] for c in counts if c["operation"] == each
             and c["mode"] == row["mode"] and c["dtype"] == row["dtype"]), 0.0,
        )  # fmt: skip
        rate = gpu["multiprocessors"] * LANES * (gpu["max_clock_mhz"] or 1755.0) * 1e3
        total += max(memory, elements * instructions / rate / OF_ISSUE)
    return total


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in r) + " |" for r in lines
    )


def closing(record: dict[str, Any]) -> str:
    """The result in a line."""
    missing = [step["step"] for step in record["steps"] if step["status"] == "not run"]
    words = f"FAILED: {', '.join(record['failed'])}" if record["failed"] else "nothing failed"
    if missing:
        words += f"; not run: {', '.join(missing)}"
    return f"{'dry run: ' if record['dry'] else ''}{words} ({record['seconds']:.0f} s)"


def _where(record: dict[str, Any]) -> str:
    found = record["machine"]
    gpus = [
        f"{gpu['name']} (driver {gpu['driver']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, memory "
        f"roof {_number(roof(gpu['name']))} GB/s)"
        for gpu in found.get("gpu", [])
    ]
    names = ("torch", "cuda", "triton", "python", "normnorm", "commit")
    versions = [f"{name} {found.get(name) or '-'}" for name in names]
    return "; ".join([*(gpus or ["no GPU"]), ", ".join(versions), record["started"]])


def markdown(record: dict[str, Any], folder: Path) -> str:
    """The page; ``folder`` holds the benchmark's files as far as there are any."""
    parts = ["# GPU check", _where(record), f"**{closing(record)}**"]
    steps = [
        [step["step"], step["status"], f"{step['seconds']:.1f}", step["message"][:300]]
        for step in record["steps"]
    ]
    parts.append(_table(("step", "", "seconds", ""), steps))
    contact = next((s["paths"] for s in record["steps"] if "paths" in s), {})
    if contact:
        rows = [[path, error or "right"] for path, error in contact.items()]
        parts += ["## First contact", _table(("path", "against float64"), rows)]
    paths = [folder / f"gpu_check_{part}.json" for part in ("cuda", "triton", "networks")]
    files = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]
    measured = [row for file in files for row in file["measurements"]]
    networks = [row for file in files for row in file["networks"]]
    if measured and not record["dry"]:
        providers = [name for name in OURS if any(row["provider"] == name for row in measured)]
        rows = [
            [t["target"], f"{'<=' if t['at_most'] else '>='} {_number(t['goal'])}",
             _number(t["value"]), {True: "met", False: "MISSED", None: ""}[t["met"]],
             t["remark"]]
            for t in gpu_targets.judge(measured, networks, providers)
        ]  # fmt: skip
        parts += ["## Targets", _table(("target", "goal", "measured", "", ""), rows)]
    rows = []
    for file in files:
        gpu = file["environment"]["gpu"]
        for row in file["measurements"]:
            if row["provider"] not in OURS and row["status"] not in ("wrong", "failed"):
                continue
            words = [row["layer"], "x".join(map(str, row["shape"])), row["dtype"]]
            words += ["channels_last"] if row["memory_format"] == "channels_last" else []
            graph = gpu and row["method"] == "graph"
            rows.append([
                f"{' '.join(words)}, {row['operation']}, {row['mode']}", row["provider"],
                _number(row["median_ms"]) if row["status"] == "ok" else row["status"],
                _number(predicted_ms(row, gpu, file["counts"]) if graph else None),
                _number(row["ratio"]), row["peer"] or "",
                _number(gpu_targets.share_of_copy(row, file["measurements"])),
            ])  # fmt: skip
    if rows:
        head = ("work", "provider", "ms", "predicted", "ratio", "to", "of copy")
        parts += ["## Layers", _table(head, rows)]
    if networks:
        rows = [
            [row["network"], row["provider"], _number(row["median_ms"]), _number(row["ratio"]),
             row["message"] or ""]
            for row in networks
        ]  # fmt: skip
        parts += ["## Training steps", _table(("network", "provider", "ms", "ratio", ""), rows)]
    problems = [f"* {words}" for file in files for words in file["problems"]]
    if problems:
        parts += ["## Not measured, or wrong", "\n".join(problems)]
    return "\n\n".join(parts) + "\n"
