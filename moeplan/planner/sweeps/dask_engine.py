"""The engine of a sweep over many machines: the workers of a Dask scheduler that runs already.

Dask moves the problem of a worker that dies to another one, some times over, and lets workers come and go. The workers need the
same moeplan; problems travel whole, so that they need none of the files of the sweep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from moeplan.errors import DeviceError
from moeplan.planner.problem import Problem
from moeplan.planner.sweeps.answer import Answer, answer

START_S = 10.0
"""How long scheduler and first worker are waited for."""


class DaskEngine:
    """Workers of a Dask scheduler."""

    def __init__(self, address: str) -> None:
        """Connect to a scheduler ("tcp://10.0.0.1:8786") that has a worker."""
        if find_spec("distributed") is None:
            raise DeviceError("--scheduler needs Dask, which is not installed", hint="pip install 'moeplan[dask]'")
        import distributed

        self._distributed: Any = distributed
        self.address = address
        try:
            self.client = self._distributed.Client(address, timeout=START_S)
        except (OSError, ValueError) as error:
            raise DeviceError(
                f"no Dask scheduler at '{address}': {error}", hint="start one with `dask scheduler`, it says its address"
            ) from None
        self._flying: dict[Any, int] = {}
        self._sent = 0
        try:
            self.client.wait_for_workers(1, timeout=START_S)
        except TimeoutError:
            self.client.close()
            raise DeviceError(
                f"the Dask scheduler at '{address}' has no worker", hint=f"start some with `dask worker {address} --nthreads 1`"
            ) from None

    def room(self) -> int:
        """See `Engine`; every worker has one problem in store, so that it need not wait for the next."""
        return 2 * int(sum(self.client.nthreads().values())) - self.busy()

    def busy(self) -> int:
        """See `Engine`."""
        return len(self._flying)

    def submit(self, place: int, problem: Problem) -> None:
        """See `Engine`."""
        self._sent += 1
        key = f"moeplan-{place}-{os.getpid()}-{self._sent}"
        self._flying[self.client.submit(answer, problem, key=key, pure=False)] = place

    def completed(self, timeout_s: float) -> Sequence[tuple[int, Answer | str]]:
        """See `Engine`."""
        if not self._flying:
            time.sleep(timeout_s)
            return ()
        try:
            done = self._distributed.wait(list(self._flying), timeout=timeout_s, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            return ()
        return [(self._flying.pop(future), self._outcome(future)) for future in done]

    def close(self) -> None:
        """See `Engine`; the workers stay, without the problems that they were given."""
        self.client.cancel(list(self._flying))
        self.client.close()

    def _outcome(self, future: Any) -> Answer | str:
        try:
            found: Answer = future.result()
        except self._distributed.KilledWorker:
            return "the loss of several Dask workers"
        except Exception as error:  # whatever is not caught by `answer` is no answer: workers without moeplan, a lost scheduler
            raise DeviceError(
                f"a Dask worker of '{self.address}' failed: {type(error).__name__}: {error}",
                hint="the workers need the same Python and moeplan as this machine",
            ) from None
        return found
