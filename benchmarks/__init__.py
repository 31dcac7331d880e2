"""Measurements beside peers: `python -m benchmarks`."""

import sys
from pathlib import Path

# Their servers are those of the tests.
_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "integration")]
