"""One training run: its options, settings, folder, stages and reports; finished runs opened again.

Imports everything above it; only analysis and the scripts import it.
"""
