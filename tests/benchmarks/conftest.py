"""The checkout's folder, which holds the benchmarks, comes last: an installed auxkernels is imported before it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
