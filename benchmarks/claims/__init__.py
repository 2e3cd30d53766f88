"""``python -m benchmarks.claims``, from the project's folder.

That folder comes first where Python looks for modules, and it holds the sources of fastlr. Unless its native
code was built in there, the installed fastlr has to go before them.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if not any((_ROOT / "fastlr" / f"_core{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != _ROOT), str(_ROOT)]
