"""``python -m fastlr``: the command line."""

import sys

from fastlr.cli import main

sys.exit(main())
