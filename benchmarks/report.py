"""Stored results of ``bench.py`` as PNG plots, Markdown, or a README's performance section.

    python benchmarks/report.py RESULT... [--png FOLDER] [--markdown FILE] [--readme FILE]
"""

from __future__ import annotations

import sys

from normnorm.commands import execute
from speed.report import parser

if __name__ == "__main__":
    sys.exit(execute(parser()))
