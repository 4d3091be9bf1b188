"""Activations times int8 or int4 weights; see api.py."""
