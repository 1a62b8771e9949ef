"""Finished runs: tables, figures, attention, recommendations, exported vectors, the report, the benchmark.

Imports everything else; only scripts import it.
"""
