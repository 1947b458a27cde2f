"""The study of accuracy on small data sets; `make study`."""

import sys

from accuracy.study import main

if __name__ == "__main__":
    sys.exit(main())
