"""Every process that the tests are or start computes on one core, from before torch is imported."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
