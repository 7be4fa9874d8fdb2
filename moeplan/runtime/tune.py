"""Tuning: the best plans of a problem are run for real, a few steps each, until no other can be expected to win.

The given plan comes first. After each trial the profile is corrected by what was measured, every candidate is priced anew, and
the one is tried next from which most is to be gained (`planner/outlook.py`), those in doubt last (`outcomes.py`). It ends when
no candidate promises the threshold. Every change is in the journal before it is acted on, so that a killed tune goes on: an
ended trial is never repeated, one that was running is followed where it can be and started anew where not. Units: seconds.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeplan.costmodels.layout import Layout
from moeplan.errors import ExportError, FileError, ProblemError
from moeplan.planner.measurement import called
from moeplan.planner.outlook import Outlook, outlook, predictions
from moeplan.planner.plan import Plan, price_plan, provenance
from moeplan.planner.schedules import with_schedule
from moeplan.planner.solve import solve
from moeplan.runtime.journal import Entry, Journal, Phase
from moeplan.runtime.launch import Ended, Job, Launcher, Limits, Template, watch
from moeplan.runtime.logs import Log, LogForm
from moeplan.runtime.outcomes import Caution, Outcome, cautions, outcome, signature
from moeplan.units import format_seconds

LOG, PLAN = "log.txt", "plan.yaml"
"""Files of a trial, beside those of the export."""
SAME_COMPLAINT = 3
"""Crashes with one message, and no plan that ran, from which on the launch is at fault and not the plans."""
ATTEMPTS = 2
"""Times that a trial is started which the scheduler loses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a tune goes about it."""

    trials: int = 8
    """Most trials that are started."""
    top: int = 16
    """Candidates: the given plan, and the best others of its problem."""
    steps: int = 10
    """Steps that are measured in a trial."""
    warmup: int = 3
    """Step lines before these that do not count."""
    timeout_s: float = 1200.0
    """Longest time that a trial may run."""
    stall_s: float = 600.0
    """Longest silence of a trial's log."""
    threshold: float = 0.01
    """Share of the best step time that a plan must promise to be tried."""
    poll_s: float = 1.0
    """Time between two looks at a trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What a tune found."""

    plan: Plan
    """The given plan."""
    entries: tuple[Entry, ...]
    """All candidates, by place."""
    cautions: tuple[Caution, ...]
    expected: Outlook | None
    """What is expected of all candidates in the end; None: none ran."""
    verdict: str
    """Why it ended."""
    trials: int
    """Trials that were started."""

    @property
    def best(self) -> Entry | None:
        """The fastest that ran."""
        ran = [e for e in self.entries if e.outcome is not None and e.outcome.kind == "done"]
        return min(ran, key=lambda e: e.outcome.step_s if e.outcome else 0.0, default=None)


def tune(
    plan: Plan,
    *,
    template: Template,
    launcher: Launcher,
    form: LogForm,
    settings: Settings,
    directory: Path,
    journal_file: Path,
    write: Callable[[Plan, Path], None],
    say: Callable[[str], None],
    report: Callable[[str], None] | None = None,
) -> Tuned:
    """Try the best plans for real; `write` makes the files of a plan in a new directory.

    `say` is told what happens, `report` again and again where the running trial stands.
    """
    with _alone(directory):
        journal = Journal(journal_file)
        try:
            return _Tune(plan, template, launcher, form, settings, directory, journal, write, say, report).run()
        finally:
            journal.close()


def candidates(plan: Plan, top: int) -> list[Layout]:
    """The given plan, its runners-up and, where these are too few, the best others of its problem, `top` in all."""
    gpus = plan.problem.profile.cluster.gpus
    found = [plan.layout, *(r.layout for r in plan.runners_up if r.layout.world == gpus)]
    if len(found) < top:
        found += [p.layout for p in solve(plan.problem, keep=top).plans]
    return list(dict.fromkeys(with_schedule(plan.problem, x) for x in found))[:top]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a directory, so that no second tune works in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise FileError(f"cannot use directory '{directory}': {error.strerror}") from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileError(f"another tune works in '{directory}'", hint="wait for it, or give another -d") from None
        yield
    finally:
        os.close(held)


class _Tune:
    """State of one tune."""

    def __init__(
        self,
        plan: Plan,
        template: Template,
        launcher: Launcher,
        form: LogForm,
        settings: Settings,
        directory: Path,
        journal: Journal,
        write: Callable[[Plan, Path], None],
        say: Callable[[str], None],
        report: Callable[[str], None] | None,
    ) -> None:
        self.plan, self.template, self.launcher, self.form = plan, template, launcher, form
        self.settings, self.directory, self.journal, self.write = settings, directory, journal, write
        self.say, self.report = say, report
        self.expected: Outlook | None = None

    def run(self) -> Tuned:
        """Try candidates until it ends."""
        self._begin()
        self._read_again()
        for entry in self._entries("running"):
            self._go_on(entry)
        while True:
            entries, care = self._considered()
            verdict, chosen = self._choice(entries, care)
            if chosen is None:
                break
            self._try(chosen)
        self.journal.note(verdict)
        started = sum(e.attempt > 0 for e in entries)
        return Tuned(
            plan=self.plan,
            entries=tuple(entries),
            cautions=tuple(care),
            expected=self.expected,
            verdict=verdict,
            trials=started,
        )

    # ------------------------------------------------------------ beginning

    def _begin(self) -> None:
        """Begin the journal, or go on with it."""
        said = provenance(self.plan.problem, self.plan.layout)
        identity = {what: str(said[f"{what}_sha256"]) for what in ("model", "cluster", "workload", "layout")}
        identity["profile"] = str(said.get("profile_sha256") or said["profile"])
        now = {
            "launch": self.template.text,
            "log": self.form.name,
            "steps": self.settings.steps,
            "warmup": self.settings.warmup,
        }
        if self.journal.is_new:
            layouts = candidates(self.plan, self.settings.top)
            seconds, peaks = predictions(self.plan.problem, layouts)
            entries = [
                Entry(place=i, layout=x, predicted_s=float(seconds[i]), predicted_bytes=float(peaks[i]))
                for i, x in enumerate(layouts)
            ]
            self.journal.begin(identity, {**now, "top": self.settings.top, "id": uuid.uuid4().hex[:8]}, entries)
            self.say(f"{len(entries)} candidates, journal '{self.journal.path}'")
            return
        self.journal.check(identity)
        then = self.journal.settings
        for name, value in {**now, "top": self.settings.top}.items():
            if then.get(name) != value:
                kept = "; the candidates stay those of the journal" if name == "top" else "; this holds for the trials to come"
                self.say(f"{name}: {value!r} now, {then.get(name)!r} when the journal was begun{kept}")
        ended = len(self._entries("ended"))
        self.say(f"going on with '{self.journal.path}': {ended} trial{'s' * (ended != 1)} done")

    def _entries(self, phase: str) -> list[Entry]:
        return [e for e in self.journal.entries() if e.phase == phase]

    def _read_again(self) -> None:
        """Logs without a step line are read once more: what is looked for may be another now."""
        for entry in self._entries("ended"):
            if entry.outcome is not None and entry.outcome.kind == "unreadable":
                log = self._log(entry)
                log.close()
                found = outcome(Ended(why="exit", exit_code=0, seconds=entry.outcome.seconds), log, self.settings.warmup)
                self._end(entry, found)

    # ------------------------------------------------------------ choosing

    def _considered(self) -> tuple[list[Entry], list[Caution]]:
        """All candidates, with what the outcomes say against trying them written down."""
        entries = self.journal.entries()
        outcomes = {e.place: e.outcome for e in entries if e.outcome is not None}
        layouts, peaks = [e.layout for e in entries], [e.predicted_bytes for e in entries]
        care = cautions(layouts, peaks, outcomes, self.plan.problem.device_bytes)
        for i, (entry, caution) in enumerate(zip(entries, care, strict=True)):
            if entry.phase in ("open", "skipped") and caution.skip != entry.why:
                phase: Phase = "skipped" if caution.skip else "open"
                event = f"skipped: {caution.skip}" if caution.skip else "open again: no rule speaks against it any more"
                entries[i] = self.journal.put(dataclasses.replace(entry, phase=phase, why=caution.skip), event)
                if phase != entry.phase:
                    self.say(f"{called(entry.layout)}: {event}")
        measured = {i: o.step_s for i, o in outcomes.items() if o.kind == "done"}
        self.expected = outlook(self.plan.problem, layouts, measured) if measured else None
        return entries, care

    def _choice(self, entries: Sequence[Entry], care: Sequence[Caution]) -> tuple[str, Entry | None]:
        """The next candidate, or why there is none."""
        open_ = [e for e in entries if e.phase == "open"]
        crashes = [e.outcome for e in entries if e.outcome is not None and e.outcome.kind == "crash"]
        alike = Counter(signature(o.message) for o in crashes).most_common(1)
        if self.expected is None and alike and alike[0][1] >= SAME_COMPLAINT:
            said = crashes[-1].message
            return f"{alike[0][1]} plans crashed with '{said}' and none ran: the launch is at fault, not the plans", None
        if not open_:
            return "every candidate was tried or ruled out", None
        started = sum(e.attempt > 0 for e in entries)
        full = started >= self.settings.trials
        if self.expected is None:
            best = min(open_, key=lambda e: (len(care[e.place].doubts), e.place))
            return (f"{started} trials, none of which ran to an end", None) if full else ("", best)
        gain, chance = self.expected.gain, self.expected.chance
        most = max(open_, key=lambda e: gain[e.place])
        promise = f"{gain[most.place]:.1%} from {called(most.layout)}, {chance[most.place]:.0%} likely to be faster"
        worth = [e for e in open_ if gain[e.place] >= self.settings.threshold]
        if not worth:
            return f"no other plan promises {self.settings.threshold:.1%}: the most is {promise}", None
        if full:
            return f"{started} trials are done, as many as --trials allows; still to be expected: {promise}", None
        return "", min(worth, key=lambda e: (len(care[e.place].doubts), -gain[e.place]))

    # ------------------------------------------------------------ a trial

    def _try(self, entry: Entry) -> None:
        """Run the trial of a candidate."""
        number = 1 + max((e.trial for e in self.journal.entries()), default=0)
        directory = (self.directory / f"trial-{number:02d}").absolute()
        expected = self.expected.step_s[entry.place] if self.expected is not None else 0.0
        hope = "the given plan" if entry.place == 0 else f"number {entry.place + 1} by prediction"
        if self.expected is not None:
            hope = (
                f"expected {format_seconds(expected)}, {self.expected.chance[entry.place]:.0%} likely to be the fastest so far"
            )
        entry = dataclasses.replace(
            entry, phase="running", trial=number, directory=str(directory), expected_s=float(expected), why=""
        )
        self.say(f"trial {number}: {called(entry.layout)}: predicted {format_seconds(entry.predicted_s)}, {hope}")
        self._start(self.journal.put(entry, f"trial {number} begins"))

    def _go_on(self, entry: Entry) -> None:
        """A trial that was running when the tune ended: followed where it can be, else started anew."""
        job = self.launcher.again(entry.handle, entry.mark) if entry.mark else None
        if job is not None:
            self.say(f"trial {entry.trial}: {called(entry.layout)}: job {job.handle} is followed again")
            self._follow(dataclasses.replace(entry, handle=job.handle), job)
            return
        self.say(f"trial {entry.trial}: {called(entry.layout)}: was running when the tune ended, started again")
        self._start(entry, again=True)

    def _start(self, entry: Entry, *, again: bool = False) -> None:
        """Write the files of a trial, start it and follow it."""
        directory = Path(entry.directory)
        plan = price_plan(self.plan.problem, entry.layout, remarks=self.plan.problem.model.remarks)
        try:
            self._files(plan, directory, entry, again)
        except ExportError as error:
            self._end(entry, Outcome(kind="refused", message=str(error)))
            return
        attempt = entry.attempt + 1
        log = directory / LOG
        if log.exists():
            log.rename(directory / f"log-{attempt - 1}.txt")
        mark = f"moeplan-{self.journal.settings['id']}-{entry.trial}-{attempt}"
        command = self.template.command(directory, directory / PLAN, entry.layout.world, entry.trial)
        entry = dataclasses.replace(entry, attempt=attempt, mark=mark, handle="")
        entry = self.journal.put(entry, f"trial {entry.trial}, attempt {attempt}: {command}")
        job = self.launcher.start(command, directory, log, mark)
        self._follow(dataclasses.replace(entry, handle=job.handle), job)

    def _files(self, plan: Plan, directory: Path, entry: Entry, again: bool) -> None:
        """The files of a trial; what an interrupted start left of them is made anew."""
        if (directory / PLAN).exists() and entry.attempt:
            return
        if directory.exists():
            if not again or (directory / LOG).exists():
                raise FileError(f"'{directory}' holds what the journal does not know", hint="give another -d")
            shutil.rmtree(directory)
        self.write(plan, directory)
        plan.save(directory / PLAN)

    def _follow(self, entry: Entry, job: Job) -> None:
        """Follow a job to its end and write down its outcome."""
        settings, log = self.settings, self._log(entry)
        limits = Limits(steps=settings.warmup + settings.steps, timeout_s=settings.timeout_s, stall_s=settings.stall_s)
        told = self.report

        def report(phase: str, seconds: float, so_far: Log) -> None:
            if told is not None:
                last = f", the last {format_seconds(so_far.step_s[-1])}" if so_far.step_s else ""
                told(f"trial {entry.trial}: {phase}, {seconds:.0f} s, {len(so_far.step_s)} of {limits.steps} steps{last}")

        try:
            self.journal.put(entry, f"followed as {job.handle}")
            ended = watch(job, log, limits, settings.poll_s, report)
        except BaseException:
            job.stop()
            raise
        found = outcome(ended, log, settings.warmup)
        if found.kind == "lost" and entry.attempt < ATTEMPTS:
            self.say(f"trial {entry.trial}: {found.message}; started again")
            self._start(entry)
            return
        self._end(entry, found)

    def _log(self, entry: Entry) -> Log:
        return Log(Path(entry.directory) / LOG, self.form, self.plan.problem.workload.global_batch)

    def _end(self, entry: Entry, found: Outcome) -> None:
        """Write down how a trial ended; a log that says nothing ends the tune, unless others did."""
        event = found.text
        self.journal.put(dataclasses.replace(entry, phase="ended", outcome=found), event)
        self.say(f"trial {entry.trial}: {event}")
        readable = any(e.outcome is not None and e.outcome.kind == "done" for e in self.journal.entries())
        if found.kind == "unreadable" and not readable:
            lines = "\n".join(f"    {line}" for line in found.tail) or "    (it is empty)"
            raise ProblemError(
                f"trial {entry.trial} ended well, but its log '{entry.directory}/{LOG}' tells no step time: "
                f"{found.message}\nIts last lines:\n{lines}",
                hint="give --log-format or --regex for it, or fewer --warmup; the same command then reads this log again",
            )
