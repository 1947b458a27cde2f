"""What each layer and whole networks cost beside torch's own; docs/measured/benchmarks.md says how.

``python benchmarks/bench.py [--quick] [--json FILE] ...``
``python benchmarks/bench.py compare before.json after.json``
"""

import sys

from normnorm.cli import execute
from speed.options import parser

if __name__ == "__main__":
    sys.exit(execute(parser()))
