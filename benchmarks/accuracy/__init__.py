"""How well predictions meet published, measured training runs: `python -m benchmarks.accuracy`."""
