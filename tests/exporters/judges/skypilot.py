"""SkyPilot's own schemas of a task and of its resources, without the rest of SkyPilot, which needs clouds' packages."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any
from unittest import mock

from tests.exporters.judges import VERSIONS, folder, serve

UNUSED = (
    "sky_logging", "adaptors.common", "server.daemons", "skylet.configs", "skylet.log_lib", "utils.message_utils",
    "utils.ux_utils",
)  # fmt: skip


def _judge(task: dict[str, Any]) -> dict[str, Any]:
    schemas, validator = (importlib.import_module(f"sky.utils.{name}") for name in ("schemas", "validator"))
    check = validator.get_schema_validator()
    check(schemas.get_task_schema()).validate(task)
    check(schemas.get_resources_schema()).validate(task["resources"])
    return {}


if __name__ == "__main__":
    package = types.ModuleType("sky")
    package.__path__, package.__version__ = [str(folder("skypilot") / "sky")], VERSIONS["skypilot"]
    sys.modules |= {"sky": package, **{f"sky.{name}": mock.MagicMock() for name in UNUSED}}
    serve(_judge)
