"""Puts tests/ on the path, so that tests find the zoo however they are started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
