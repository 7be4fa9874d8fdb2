"""Elastic layouts: a plan for every node count, what it costs to move between them, and the goodput under failures."""
