"""From files of text to batches on a mesh.

files -> documents (`sources`) -> tokens on disk (`tokenizer`, `corpus`) -> windows (`packing`) in an order that is a
pure function of seed and step (`order`) -> global arrays, fetched ahead (`loader`, `prefetch`).
"""
