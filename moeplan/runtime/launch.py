"""Starting the trial of a plan by the user's own command, watching it, and ending it with everything that it started.

A command template has placeholders: {dir} the directory of the trial, {plan} its plan file, {gpus} the ranks, {trial} its
number. Locally the command runs in a session of its own; all its processes carry a mark in their environment, by which they are
found again, also those that made sessions of their own or lost their parent (Linux; elsewhere the process group alone).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import string
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from moeplan.errors import DeviceError, UsageError, nearest_hint
from moeplan.runtime.logs import Log

PLACEHOLDERS = ("dir", "plan", "gpus", "trial")
EXAMPLES = {"local": "bash {dir}/run_torchrun.sh", "slurm": "sbatch {dir}/run_slurm.sbatch"}
"""A template by launcher, for the files of `moeplan export`."""
MARK = "MOEPLAN_TRIAL"
"""Environment variable that marks the processes of a trial."""
GRACE_S = 10.0
"""Time that processes have to end by themselves before they are killed."""


@dataclass(frozen=True, slots=True)
class Template:
    """A command with placeholders."""

    text: str

    def command(self, directory: Path, plan: Path, gpus: int, trial: int) -> str:
        """The command of one trial, paths quoted for a shell."""
        quoted = {"dir": shlex.quote(str(directory)), "plan": shlex.quote(str(plan))}
        return self.text.format(**quoted, gpus=gpus, trial=trial)


def parse_template(text: str, launcher: str) -> Template:
    """The template of a user; refuses unknown placeholders, and one that would run every plan alike."""
    example = f"like --launch '{EXAMPLES[launcher]}'"
    try:
        names = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise UsageError(f"--launch '{text}': {error}", hint="write braces of the shell twice: ${{NAME}}") from None
    for name, spec, conversion in names:
        if name not in PLACEHOLDERS or spec or conversion:
            near = nearest_hint(name, PLACEHOLDERS) if name else f"known: {', '.join(PLACEHOLDERS)}"
            raise UsageError(
                f"--launch '{text}': unknown placeholder '{{{name}}}'",
                hint=f"{near}; braces of the shell are written twice: ${{{{NAME}}}}",
            )
    if not {"dir", "plan"} & {name for name, _, _ in names}:
        raise UsageError(f"--launch '{text}' has neither {{dir}} nor {{plan}}: every trial would run the same", hint=example)
    return Template(text)


@dataclass(frozen=True, slots=True)
class State:
    """Where a job stands."""

    phase: Literal["waiting", "running", "ended"]
    exit_code: int | None = None
    """Of a job that ended; negative: the signal that ended it; None: not known."""
    word: str = ""
    """What the scheduler calls it."""


class Job(Protocol):
    """A trial that was started."""

    handle: str
    """By which it is found again."""

    def poll(self) -> State:
        """Where it stands."""

    def stop(self) -> None:
        """End it with all that it started; nothing if it has ended."""


class Launcher(Protocol):
    """A way to start jobs."""

    def start(self, command: str, directory: Path, log: Path, mark: str) -> Job:
        """Start a command in a directory, its output into the file `log`; `mark` is a name that no other trial has."""

    def again(self, handle: str, mark: str) -> Job | None:
        """The job of an earlier process by its handle ("": not known) and mark, if it can still be followed.

        Of one that cannot, whatever still runs is ended.
        """


# ---------------------------------------------------------------- on this machine


class LocalJob:
    """A command of this machine."""

    def __init__(self, command: str, directory: Path, log: Path, mark: str) -> None:
        self.mark = mark
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self.handle = str(self.process.pid)

    def poll(self) -> State:
        """Where it stands: ended when its shell has ended."""
        code = self.process.poll()
        if code is None:
            return State("running")
        return State("ended", 128 - code if 128 < code < 128 + 65 else code)  # a shell adds 128 to the signal of its command

    def stop(self) -> None:
        """End it: a request first, after `GRACE_S` by force."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGTERM)
        end_marked(self.mark, GRACE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class LocalLauncher:
    """Starts commands on this machine."""

    def start(self, command: str, directory: Path, log: Path, mark: str) -> Job:
        """Start a command in a shell and session of its own."""
        try:
            return LocalJob(command, directory, log, mark)
        except OSError as error:
            raise DeviceError(f"cannot start '{command}': {error.strerror}") from None

    def again(self, handle: str, mark: str) -> Job | None:
        """Nothing: the exit of a process that is not a child cannot be waited for; what is left of it is ended."""
        end_marked(mark, GRACE_S)
        return None


def marked(mark: str) -> list[int]:
    """Processes of this machine that carry a mark in their environment."""
    wanted, out = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if wanted in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                out.append(int(entry.name))
    return out


def end_marked(mark: str, grace_s: float) -> None:
    """End all processes that carry a mark: a request first, after `grace_s` by force."""
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    while left := marked(mark):
        forced = time.monotonic() > deadline
        for pid in left:
            if forced or pid not in asked:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if forced else signal.SIGTERM)
        asked.update(left)
        if time.monotonic() > deadline + grace_s:  # a process that no signal ends waits for a device
            return
        time.sleep(0.05)


# ---------------------------------------------------------------- watching


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a trial is over."""

    steps: int
    """Step lines that are enough, warm-up included."""
    timeout_s: float
    """Longest time that it may run; waiting in a queue does not count."""
    stall_s: float
    """Longest time without a new line in its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a trial came to its end."""

    why: Literal["exit", "enough", "timeout", "stall"]
    """By itself; with enough steps done, stopped then or not; stopped at the time limit; stopped after silence."""
    exit_code: int | None = None
    word: str = ""
    """What the scheduler calls it."""
    seconds: float = 0.0
    """Time that it ran."""


def watch(job: Job, log: Log, limits: Limits, poll_s: float, report: Callable[[str, float, Log], None] | None = None) -> Ended:
    """Follow a job to its end, or end it; `report` is told its phase, the seconds that it has run and the log."""
    started: float | None = None
    grown = time.monotonic()
    while True:
        state, now = job.poll(), time.monotonic()
        if log.read() or state.phase == "waiting":
            grown = now
        if started is None and state.phase != "waiting":
            started = grown = now
        ran = now - started if started is not None else 0.0
        if report is not None:
            report(state.phase, ran, log)
        if state.phase == "ended":
            job.stop()  # what it left behind
            log.close()
            how: Literal["exit", "enough"] = "enough" if len(log.step_s) >= limits.steps else "exit"
            return Ended(why=how, exit_code=state.exit_code, word=state.word, seconds=ran)
        why: Literal["", "enough", "timeout", "stall"] = ""
        if len(log.step_s) >= limits.steps:
            why = "enough"
        elif ran > limits.timeout_s:
            why = "timeout"
        elif now - grown > limits.stall_s:
            why = "stall"
        if why:
            log.close()  # before the job complains of being stopped
            job.stop()
            return Ended(why=why, seconds=ran)
        time.sleep(poll_s)
