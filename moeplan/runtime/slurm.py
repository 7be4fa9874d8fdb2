"""Trials as Slurm jobs: sbatch, squeue, sacct and scancel.

The command of a trial is what follows `sbatch`: options, script, its arguments. The job gets the trial's mark as its name, by
which it is found again, and the trial's log as its output. Where accounting is off, how a job ended is read from its log alone.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

from moeplan.errors import DeviceError, UsageError
from moeplan.runtime.launch import Job, State

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "RESV_DEL_HOLD", "REQUEUE_FED")
"""States of a job that does not run yet."""
LOST = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REVOKED")
"""Ends of a job that are no fault of its plan."""
OURS = ("-J", "--job-name", "-o", "--output", "-e", "--error", "-D", "--chdir", "-a", "--array", "-W", "--wait")
"""Options of sbatch that a trial sets itself, or that would hide its job."""
LATE = 5
"""Times that accounting is asked for a job that has left the queue."""
PATIENCE = 20
"""Times in a row that squeue may fail before a trial is given up."""
ANSWER_S = 120.0
"""Longest time that a Slurm command may take."""


class SlurmJob:
    """A job of the queue."""

    def __init__(self, handle: str, poll_s: float) -> None:
        self.handle, self.poll_s = handle, poll_s
        self.end: State | None = None
        self.failed = 0

    def poll(self) -> State:
        """Where it stands; asks accounting once it has left the queue."""
        if self.end is not None:
            return self.end
        code, text = _run("squeue", "--noheader", "--jobs", self.handle, "--format=%T")
        word = text.split()[0] if code == 0 and text.split() else ""
        if code and "Invalid job id" not in text:
            self.failed += 1
            if self.failed >= PATIENCE:
                raise DeviceError(f"squeue failed {self.failed} times in a row: {text.strip()[-200:]}")
            return State("running", word="squeue does not answer")
        self.failed = 0
        if word in WAITING:
            return State("waiting", word=word)
        if word in ("RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT"):
            return State("running", word=word)
        self.end = self._ended(word)
        return self.end

    def _ended(self, word: str) -> State:
        for attempt in range(LATE):
            if attempt:
                time.sleep(self.poll_s)
            code, text = _run("sacct", "--noheader", "--parsable2", "-X", "--jobs", self.handle, "--format=State,ExitCode")
            cells = text.split("\n")[0].strip().split("|")
            if code == 0 and len(cells) == 2 and cells[0].split()[0] not in ("RUNNING", "COMPLETING", *WAITING):
                status, _, signal = cells[1].partition(":")
                number = -int(signal) if signal.isdecimal() and int(signal) else int(status) if status.isdecimal() else None
                return State("ended", number, cells[0].split()[0])
            if code:  # no accounting here
                break
        return State("ended", {"COMPLETED": 0}.get(word), word)

    def stop(self) -> None:
        """Cancel it, and wait until it has left the nodes."""
        if self.end is not None:
            return
        code, text = _run("scancel", self.handle)
        if code:
            raise DeviceError(f"cannot cancel Slurm job {self.handle}: {text.strip()[-200:]}")
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            code, text = _run("squeue", "--noheader", "--jobs", self.handle, "--format=%T")
            if code == 0 and text.split() and text.split()[0] in ("RUNNING", "COMPLETING", "STOPPED", *WAITING):
                time.sleep(self.poll_s)
                continue
            break
        self.end = State("ended", None, "CANCELLED")


class SlurmLauncher:
    """Submits commands to Slurm."""

    def __init__(self, poll_s: float) -> None:
        self.poll_s = poll_s

    def start(self, command: str, directory: Path, log: Path, mark: str) -> Job:
        """Submit what the command says, under the name `mark`."""
        words = submission(command)
        given = (f"--job-name={mark}", f"--output={str(log).replace('%', '%%')}", "--open-mode=append")
        code, text = _run("sbatch", "--parsable", *given, *words, cwd=directory)
        number = text.strip().split("\n")[-1].split(";")[0].strip()
        if code or not number.isdecimal():
            raise DeviceError(f"sbatch refused '{command}': {text.strip()[-300:] or f'exit code {code}'}")
        return SlurmJob(number, self.poll_s)

    def again(self, handle: str, mark: str) -> Job | None:
        """The job, in the queue or ended, by its number or, where that was not written down, by its name."""
        if not handle:
            code, text = _run("squeue", "--noheader", f"--name={mark}", "--format=%i")
            handle = text.split()[0] if code == 0 and text.split() else ""
        if not handle:
            return None
        job = SlurmJob(handle, self.poll_s)
        state = job.poll()
        return job if state.phase != "ended" or state.word else None


def submission(command: str) -> list[str]:
    """What follows `sbatch` in a command; refuses options that a trial sets itself."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--launch '{command}': {error}") from None
    if words[:1] == ["sbatch"]:
        words = words[1:]
    for word in words:
        if not word.startswith("-") and "/" in word:  # the script; what follows is for it
            break
        if word.split("=")[0] in OURS:
            raise UsageError(
                f"--launch '{command}': {word} is not for the template; tune names jobs, their logs and directories"
            )
    return words


def _run(program: str, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """Exit code and output of a Slurm command; its complaint where it failed."""
    try:
        end = subprocess.run(
            [program, *arguments], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=ANSWER_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        if program == "sacct":
            return 1, "sacct is not there"
        raise DeviceError(
            f"{program} is not on this machine", hint="use --launcher local, or run this where Slurm is"
        ) from None
    except subprocess.TimeoutExpired:
        return 1, f"{program} did not answer in {ANSWER_S:.0f} s"
    return end.returncode, end.stdout if end.returncode == 0 else end.stdout + end.stderr
