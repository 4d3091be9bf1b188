"""Grouped-query attention by position, window and segment; see api.py."""
