"""Agents of torchrun that load torch once: started by the tests, told what to do over standard input, a word a line.

`start` forks an agent, which forks its worker (torchrun's own launcher and agent, by its start method `fork`), and answers its
process id; `ended` answers the exit codes of those that have ended. Arguments: port of the agents' store, directory, then
those of `elastic_job`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.runtime.elastic_job import after_step, main

importlib.import_module("torch._dynamo")  # what workers would each load later


def work(*arguments: str) -> None:
    """One worker."""
    sys.argv = ["elastic_job", *arguments]
    if code := main(after_step=after_step):
        sys.exit(code)


def agent(port: str, directory: Path, number: int, arguments: list[str]) -> None:
    """One node; never returns."""
    code = 1
    try:
        log = os.open(directory / f"agent-{number}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        config = LaunchConfig(
            min_nodes=3,
            max_nodes=4,
            nproc_per_node=1,
            run_id="elastic",
            rdzv_backend="c10d",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_configs={"is_host": "0", "last_call_timeout": "6", "keep_alive_interval": "1", "keep_alive_max_attempt": "6"},
            max_restarts=20,
            monitor_interval=0.2,
            start_method="fork",
            local_addr="127.0.0.1",
        )
        elastic_launch(config, work)(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(port: str, directory: Path, arguments: list[str]) -> None:
    """Answer until standard input ends."""
    started = 0
    codes: dict[int, int] = {}
    for word in sys.stdin:
        if word.strip() == "start":
            process = os.fork()
            if not process:
                agent(port, directory, started, arguments)
            started += 1
            print(process, flush=True)
            continue
        while len(codes) < started:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            codes[process] = os.waitstatus_to_exitcode(status)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
