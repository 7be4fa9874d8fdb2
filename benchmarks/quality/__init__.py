"""How good the plans of `solve` are beside the layouts that were published: `python -m benchmarks.quality`."""
