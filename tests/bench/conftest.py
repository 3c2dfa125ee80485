"""The benchmarks' modules are imported as their programs import them."""

import sys
from pathlib import Path

_BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path[:0] = [str(_BENCH), str(_BENCH / "python")]
