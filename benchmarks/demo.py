"""Small networks with and without normality normalization, side by side; `make demo`."""

import sys

from accuracy.demo import main

if __name__ == "__main__":
    sys.exit(main())
