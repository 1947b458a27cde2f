"""Instructions an element of the main CPU kernels, counted by callgrind: a measure without noise.

    python benchmarks/callgrind_cpu.py [--output FILE]

The table has what was stored before beside each count. :mod:`speed.counts` does the counting;
``bench.py --callgrind`` puts the same counts into a result file.
"""

import sys
from dataclasses import asdict
from functools import partial

import record
from speed import tables
from speed.counts import count_cpu

KEY = ("work", "mode", "operation")


def table(before: list[record.Row], rows: list[record.Row]) -> str:
    head = ("kernel (AVX2, float32)", "mode", "operation", "instructions an element", "before")
    old = {tuple(row[k] for k in KEY): f"{row['instructions']:.2f}" for row in before}
    lines = []
    for row in rows:
        key = tuple(row[k] for k in KEY)
        lines.append((*key, f"{row['instructions']:.2f}", old.get(key, "")))
    return tables.table(head, lines, 3)


def main() -> int:
    before = record.stored(record.RESULTS / "callgrind_cpu.json")
    return record.main(
        "callgrind", record.parser(__doc__), lambda _: list(map(asdict, count_cpu())),
        partial(table, before),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
