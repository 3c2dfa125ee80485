"""What the tests of the manual share with those of the repository and of the Python package."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / "repo"), str(_TESTS / "python")]
