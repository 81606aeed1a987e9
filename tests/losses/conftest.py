"""Lets the tests of this folder import `oracles`, the folder beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
