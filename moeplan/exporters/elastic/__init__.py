"""Files of an elastic plan: elastic.json, arguments for every node count, launch files, and a script that picks among them."""

from moeplan.exporters.elastic.write import write_elastic

__all__ = ["write_elastic"]
