"""Raw tables to data set files: interactions, images, the k-core; the demo's data and its small CLIP.

Imports common, data and items.
"""
