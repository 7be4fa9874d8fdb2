"""Forks the ranks of training runs from a process that has imported Megatron, since imports take longer than the training.

Started with the folder of Megatron and the path of a socket; says "ready" when it listens. A rank that torchrun starts
(`rank.py`) connects, and is run in a fork with its own arguments, environment and output.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from tests.exporters.training.cuda_on_cpu import megatron_on_cpu


def serve(path: str) -> None:
    """Fork a rank for every connection."""
    from tests.exporters.training.train_megatron import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                run(client, main)
            client.close()


def run(client: socket.socket, main: Callable[[], None]) -> NoReturn:
    """Be the rank that connected."""
    code = 1
    try:
        text, outputs, _, _ = socket.recv_fds(client, 1 << 20, 2)
        while more := client.recv(1 << 20):
            text += more
        for output, own in zip(outputs, (1, 2), strict=True):
            os.dup2(output, own)
        sys.argv, environment = json.loads(text)
        os.environ.clear()
        os.environ.update(environment)
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.send(bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    with megatron_on_cpu(sys.argv[1]):
        serve(sys.argv[2])
