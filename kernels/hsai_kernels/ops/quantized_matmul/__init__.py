"""Activations times weights of int8 or of codes of few bits; see api.py."""
