"""``python -m normnorm``."""

import sys

from normnorm.cli import main

sys.exit(main())
