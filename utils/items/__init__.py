"""What an item encoder reads: the source interface, image and token store, hidden states, features, foundation models.

Imports common, data and models.
"""
