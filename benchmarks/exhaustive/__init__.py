"""Whether the certified search finds the best of everything that it claims to look at: `python -m benchmarks.exhaustive`."""
