"""Instructions an element of the main CPU kernels, counted by callgrind: a measure without noise.

    python benchmarks/callgrind_cpu.py [--no-save]

Prints a table, with what was stored before beside it, and writes
``benchmarks/results/callgrind_cpu.json``. :mod:`speed.counts` does the counting;
``bench.py --callgrind`` puts the same counts into a result file.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from speed import tables
from speed.counts import CallgrindError, count_cpu
from speed.results import Count, json_text, write_atomically

STORED = Path(__file__).resolve().parent / "results" / "callgrind_cpu.json"


def stored() -> dict[tuple[str, str, str], float]:
    """The counts of the last time, by work, mode and operation."""
    if not STORED.exists():
        return {}
    counts = msgspec.json.decode(STORED.read_bytes(), type=list[Count])
    return {(c.work, c.mode, c.operation): c.instructions for c in counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-save", action="store_true", help="print the table alone")
    arguments = parser.parse_args()
    try:
        counts = count_cpu()
    except CallgrindError as error:
        print(f"callgrind_cpu: {error}", file=sys.stderr)
        return 1
    before = stored()
    head = ("kernel (AVX2, float32)", "mode", "operation", "instructions an element", "before")
    lines = []
    for c in counts:
        old = before.get((c.work, c.mode, c.operation))
        was = "" if old is None else f"{old:.2f}"
        lines.append((c.work, c.mode, c.operation, f"{c.instructions:.2f}", was))
    print(tables.table(head, lines, 3))
    if not arguments.no_save:
        write_atomically(STORED, json_text(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
