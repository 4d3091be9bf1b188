"""RMS normalization and a projection in one; see api.py."""
