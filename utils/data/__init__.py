"""Data set files to arrays: histories, the split, titles, image paths, every problem at once; the paper's archive.

Imports common.
"""
