"""One training run, or a sweep of them: see docs/measured/experiments.md."""

import sys

from accuracy.runs import main

if __name__ == "__main__":
    sys.exit(main())
