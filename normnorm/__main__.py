"""``python -m normnorm``."""

import sys

from .cli import main

sys.exit(main())
