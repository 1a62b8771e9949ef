"""Sampling, the training step, full-ranking evaluation, user grouping, checkpoints.

Imports common, data, items and models.
"""
