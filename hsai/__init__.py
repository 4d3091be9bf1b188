"""hsai: one transformer definition, from a supercomputer to a phone."""

__version__ = "0.1.0"
