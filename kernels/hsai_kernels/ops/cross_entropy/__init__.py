"""Linear projection and cross-entropy over a vocabulary in one; see api.py."""
