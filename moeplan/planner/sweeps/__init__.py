"""Sweeps: grids of questions solved one by one, in processes or on a cluster, and kept in a database."""
