"""Models of others, in and out: what a foreign file calls a tensor, and where its numbers stand in our model.

`entries.py` pairs one foreign tensor with one slice of an array of ours, `assemble.py` moves the numbers, one tensor at
a time, either way. A foreign format adds what it alone knows: its config, its names, its container.
"""
