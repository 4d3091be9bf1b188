"""Rotary position embedding; see api.py."""
