"""Activations times N:M sparse weights, dense-valued or int4; see api.py."""
