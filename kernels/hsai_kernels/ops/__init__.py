"""The kernels, a folder each: api.py (signature, validation), reference.py, backends by platform, shapes.py (tests)."""
