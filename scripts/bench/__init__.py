"""What scripts/bench_kernels.py is made of: timing by turns, ceilings, peers, and the cases themselves."""
