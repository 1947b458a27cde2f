"""The study of the handwritten digits; `make study`."""

import sys

from accuracy.study import main

if __name__ == "__main__":
    sys.exit(main())
