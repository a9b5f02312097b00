"""`python -m nopad`."""

import sys

from nopad.cli import main

sys.exit(main())
