"""``python -m kvmnest``."""

import sys

from kvmnest.cli.main import main

sys.exit(main())
