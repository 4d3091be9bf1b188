"""The gated feed-forward block in one; see api.py."""
