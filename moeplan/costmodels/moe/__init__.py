"""Schedules of one MoE layer, one a file; `schedules.py` lists them."""
