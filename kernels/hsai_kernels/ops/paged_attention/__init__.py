"""Attention over a cache in pages that rows share; see api.py."""
