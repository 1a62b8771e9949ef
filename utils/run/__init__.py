"""One training run: its options, settings, folder, stages and reports; finished runs opened again.

Imports common, data, items, prepare, training and models; only analysis and the scripts import it.
"""
