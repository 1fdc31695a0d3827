"""The operations of the SegDeformer decoder: one file each, its plain-PyTorch reference inside.

The references are the specification. Nothing here knows models, data or recipes.
"""
