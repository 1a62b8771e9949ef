"""Every process that the tests are or start finds the project, and computes on one core: so set before torch is imported."""
import os
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
