"""Encoders, fusions, the SegDeformer decoder, and their weights."""
