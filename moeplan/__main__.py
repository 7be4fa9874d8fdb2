"""`python -m moeplan`."""

from moeplan.cli import run

run()
