"""``python -m pycnf``."""

import sys

from .cli import main

sys.exit(main())
