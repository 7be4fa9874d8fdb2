"""Tuning with a launcher that only pretends: what is tried in which order, what is left out and why, what is not repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.costmodels.layout import Layout
from moeplan.costmodels.model_catalog import load_model
from moeplan.errors import ExportError, FileError, MoeplanError, ProblemError
from moeplan.planner.plan import Plan, load_plan
from moeplan.planner.plan_data import read_layout
from moeplan.planner.solve import solve
from moeplan.records import dump_yaml
from moeplan.runtime.journal import Journal
from moeplan.runtime.launch import Job, State, Template
from moeplan.runtime.logs import FORMS, custom_form
from moeplan.runtime.tune import Settings, Tuned, candidates, tune
from moeplan.runtime.winner import winner_data
from tests.planner import tiny

MODEL = load_model("mixtral-8x7b-4l-proxy")
PLAN = solve(tiny.problem(MODEL, "h100x8", batch=64), keep=5).plans[0]
LAYOUTS = candidates(PLAN, 8)
STEP = "iteration 1/ 9 | elapsed time per iteration (ms): {:.3f} |\n"
OOM = "torch.OutOfMemoryError: CUDA out of memory\n"


@dataclass
class Ended:
    """A job that has ended, or that keeps saying what it says."""

    handle: str
    states: list[State]
    stopped: bool = False

    def poll(self) -> State:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def stop(self) -> None:
        self.stopped = True


class Interrupted(Ended):
    """A job during which the tune is interrupted."""

    def poll(self) -> State:
        raise KeyboardInterrupt


@dataclass
class Pretence:
    """A launcher whose trials end as soon as they begin: milliseconds of a step, or the text of the log and how it ends."""

    becomes: Callable[[Layout], float | tuple[str, State]]
    started: list[str] = field(default_factory=list)
    jobs: list[Ended] = field(default_factory=list)
    found: Ended | None = None
    interrupt_at: int = 0

    def start(self, command: str, directory: Path, log: Path, mark: str) -> Job:
        self.started.append(directory.name)
        made = self.becomes(read_layout(yaml.safe_load((directory / "plan.yaml").read_text())["layout"], "plan"))
        text, state = (STEP.format(made) * 5, State("ended", 0)) if isinstance(made, (float, int)) else made
        log.write_text(text)
        kind = Interrupted if len(self.started) == self.interrupt_at else Ended
        self.jobs.append(kind(f"job-{len(self.started)}", [state]))
        return self.jobs[-1]

    def again(self, handle: str, mark: str) -> Job | None:
        return self.found


def tuned(tmp_path: Path, pretence: Pretence, plan: Plan = PLAN, said: list[str] | None = None, **more: Any) -> Tuned:
    settings = {"top": 8, "steps": 3, "warmup": 1, "poll_s": 0.0, "trials": 20} | {
        k: more.pop(k) for k in list(more) if k in FIELDS
    }
    arguments: dict[str, Any] = {
        "template": Template("run {dir}"), "form": FORMS["megatron"], "directory": tmp_path / "trials",
        "journal_file": tmp_path / "journal.sqlite", "write": lambda _, directory: directory.mkdir(),
        "say": (said if said is not None else []).append,
    }  # fmt: skip
    return tune(plan, launcher=pretence, settings=Settings(**settings), **(arguments | more))


FIELDS = {f.name for f in dataclasses.fields(Settings)}


def by_place(times: Mapping[int, Any], usual: float = 100.0) -> Callable[[Layout], Any]:
    """A machine that gives the layouts at some places what is said, and the others a usual time."""
    return lambda layout: times.get(LAYOUTS.index(layout), usual)


# ---------------------------------------------------------------- candidates


def test_candidates_are_the_plan_its_runners_up_and_the_best_others() -> None:
    assert LAYOUTS[0] == PLAN.layout and LAYOUTS[1:5] == [r.layout for r in PLAN.runners_up] and len(set(LAYOUTS)) == 8
    assert candidates(PLAN, 3) == LAYOUTS[:3]
    bare = dataclasses.replace(PLAN, runners_up=())
    assert set(candidates(bare, 5)) == set(LAYOUTS[:5])


# ---------------------------------------------------------------- choosing


def test_the_fastest_is_found_and_everything_written_down(tmp_path: Path) -> None:
    said: list[str] = []
    pretence = Pretence(by_place({3: 60.0}))
    found = tuned(tmp_path, pretence, said=said, threshold=0.0)
    assert found.best is not None and found.best.layout == LAYOUTS[3] and found.best.outcome is not None
    assert found.best.outcome.step_s == pytest.approx(0.06) and found.trials == len(pretence.started) == 8
    assert [e.trial for e in found.entries if e.place == 0] == [1] and found.verdict == "every candidate was tried or ruled out"
    assert all(e.expected_s > 0 for e in found.entries if e.trial > 1) and all(job.stopped for job in pretence.jobs)
    assert any("trial 1: " in line and "the given plan" in line for line in said)
    journal = Journal(tmp_path / "journal.sqlite")
    assert journal.entries() == list(found.entries) and journal.events()[-1][2] == found.verdict
    for entry in found.entries:
        plan = load_plan(Path(entry.directory) / "plan.yaml")
        assert plan.layout == entry.layout and plan.step_s == pytest.approx(entry.predicted_s)


def test_no_more_is_tried_than_promises_anything(tmp_path: Path) -> None:
    predicted = dict(enumerate(e.predicted_s for e in tuned(tmp_path / "all", Pretence(by_place({})), threshold=0.0).entries))
    right = Pretence(lambda layout: 1000 * predicted[LAYOUTS.index(layout)])
    found = tuned(tmp_path, right, threshold=0.01)
    assert found.trials < 8 and found.verdict.startswith("no other plan promises 1.0%: the most is ")
    assert found.expected is not None and max(found.expected.gain) < 0.01
    assert tuned(tmp_path, right, threshold=0.5).trials == found.trials, "a journal that is done stays done"
    assert tuned(tmp_path, right, threshold=0.0).trials == 8


def test_the_limit_of_trials(tmp_path: Path) -> None:
    pretence = Pretence(by_place({}))
    found = tuned(tmp_path, pretence, trials=2, threshold=0.0)
    assert found.trials == 2 and "2 trials are done, as many as --trials allows; still to be expected: " in found.verdict
    assert tuned(tmp_path, pretence, trials=4, threshold=0.0).trials == 4
    assert pretence.started == [f"trial-0{i}" for i in (1, 2, 3, 4)], "no trial is repeated"


# ---------------------------------------------------------------- outcomes


def test_out_of_memory_leaves_out_what_needs_more(tmp_path: Path) -> None:
    found = tuned(tmp_path, Pretence(by_place({0: (OOM, State("ended", 1))})), threshold=0.0)
    least = found.entries[0].predicted_bytes
    for entry in found.entries[1:]:
        assert (entry.phase == "skipped") == (entry.predicted_bytes >= least), entry
        assert ("ran out of memory" in entry.why) == (entry.phase == "skipped")
    assert {e.phase for e in found.entries} == {"ended", "skipped"}
    events = [what for _, _, what in Journal(tmp_path / "journal.sqlite").events()]
    assert sum(what.startswith("skipped: predicted to need") for what in events) == sum(bool(e.why) for e in found.entries)


def test_a_launch_that_never_works_is_given_up(tmp_path: Path) -> None:
    pretence = Pretence(lambda _: ("bash: torchrun: command not found\n", State("ended", 127)))
    found = tuned(tmp_path, pretence)
    assert found.best is None and winner_data(found) is None and len(pretence.started) == 3
    assert found.verdict == (
        "3 plans crashed with 'bash: torchrun: command not found' and none ran: the launch is at fault, not the plans"
    )


def test_a_log_that_says_nothing_ends_the_tune_and_is_read_again(tmp_path: Path) -> None:
    pretence = Pretence(lambda _: ("hello\ntook 0.5 s\ntook 0.25 s\ntook 0.25 s\n", State("ended", 0)))
    for started in (1, 1):
        with pytest.raises(ProblemError) as caught:
            tuned(tmp_path, pretence)
        assert "trial 1 ended well, but its log" in str(caught.value) and "    took 0.25 s" in str(caught.value)
        assert "elapsed time per iteration (ms)" in str(caught.value) and "--regex" in str(caught.value)
        assert len(pretence.started) == started
    found = tuned(tmp_path, pretence, form=custom_form([r"took (?P<step_s>\S+) s"]), trials=1)
    assert found.best is not None and found.best.outcome is not None and found.best.outcome.step_s == 0.25
    assert len(pretence.started) == 1


def test_a_plan_that_the_exporter_refuses(tmp_path: Path) -> None:
    def write(plan: Plan, directory: Path) -> None:
        if plan.layout == LAYOUTS[0]:
            raise ExportError("no such flag")
        directory.mkdir()

    found = tuned(tmp_path, Pretence(by_place({})), write=write, threshold=0.0)
    first = found.entries[0].outcome
    assert first is not None and (first.kind, first.message) == ("refused", "no such flag") and found.trials == 7


def test_a_job_that_the_scheduler_lost_is_started_once_more(tmp_path: Path) -> None:
    pretence = Pretence(by_place({0: ("", State("ended", 1, "NODE_FAIL"))}))
    found = tuned(tmp_path, pretence, trials=1)
    first = found.entries[0]
    assert first.attempt == 2 and first.outcome is not None and first.outcome.kind == "lost"
    assert pretence.started[:2] == ["trial-01", "trial-01"] and (Path(first.directory) / "log-1.txt").exists()


# ---------------------------------------------------------------- going on


def test_an_interrupted_trial_is_stopped_and_started_again(tmp_path: Path) -> None:
    pretence = Pretence(by_place({}), interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, pretence, threshold=0.0)
    assert pretence.jobs[1].stopped
    said: list[str] = []
    found = tuned(tmp_path, pretence, said=said, threshold=0.0)
    assert pretence.started[:3] == ["trial-01", "trial-02", "trial-02"] and len(pretence.started) == 9
    assert sorted(e.attempt for e in found.entries) == [1] * 7 + [2] and "going on with" in said[0]
    assert any("was running when the tune ended, started again" in line for line in said)


def test_a_job_that_still_runs_is_followed(tmp_path: Path) -> None:
    pretence = Pretence(by_place({}), interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, pretence, threshold=0.0)
    pretence.found = Ended("77", [State("ended", 0)])
    found = tuned(tmp_path, pretence, threshold=0.0)
    assert len(pretence.started) == 8 and [e.attempt for e in found.entries] == [1] * 8
    assert [e.handle for e in found.entries if e.trial == 2] == ["77"]


def test_another_plan_is_refused(tmp_path: Path) -> None:
    tuned(tmp_path, Pretence(by_place({})), trials=1)
    other = solve(tiny.problem(MODEL, "h100x8", batch=32), keep=5).plans[0]
    with pytest.raises(ProblemError, match=r"is of another workload: sha256 [0-9a-f]{16} there, [0-9a-f]{16} in the plan"):
        tuned(tmp_path, Pretence(by_place({})), plan=other)


def test_settings_that_changed_are_said(tmp_path: Path) -> None:
    tuned(tmp_path, Pretence(by_place({})), trials=1)
    said: list[str] = []
    tuned(tmp_path, Pretence(by_place({})), trials=1, said=said, steps=2, top=4)
    assert "steps: 2 now, 3 when the journal was begun; this holds for the trials to come" in said
    assert "top: 4 now, 8 when the journal was begun; the candidates stay those of the journal" in said


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trials" / "trial-01").mkdir(parents=True)
    (tmp_path / "trials" / "trial-01" / "thesis.tex").touch()
    with pytest.raises(FileError, match="holds what the journal does not know"):
        tuned(tmp_path, Pretence(by_place({})))
    assert (tmp_path / "trials" / "trial-01" / "thesis.tex").exists()


def test_one_tune_at_a_time(tmp_path: Path) -> None:
    def second(_: Layout) -> float:
        with pytest.raises(FileError, match="another tune works in"):
            tuned(tmp_path, Pretence(by_place({})))
        return 5.0

    tuned(tmp_path, Pretence(second), trials=1)


# ---------------------------------------------------------------- the plan that won


def test_the_winner_is_a_plan_like_any_other(tmp_path: Path) -> None:
    found = tuned(tmp_path, Pretence(by_place({2: 50.0, 4: (OOM, State("ended", 1))})), threshold=0.0)
    data = winner_data(found)
    assert data is not None
    (tmp_path / "winner.yaml").write_text(dump_yaml(data))
    plan = load_plan(tmp_path / "winner.yaml")
    assert plan.layout == LAYOUTS[2] and plan.certificate == PLAN.certificate
    assert any(r.startswith("measured by moeplan tune: 50.0 ms a step, the median of 4; the fastest of") for r in plan.remarks)
    told = data["provenance"]["tune"]
    assert told["measured_step_s"] == pytest.approx(0.05) and told["ended"] == found.verdict
    assert [t["trial"] for t in told["trials"]] == list(range(1, found.trials + 1))
    assert {t["outcome"] for t in told["trials"]} == {"done", "out_of_memory"}


def test_errors_are_ours(tmp_path: Path) -> None:
    (tmp_path / "trials").touch()
    with pytest.raises(MoeplanError, match="cannot use directory"):
        tuned(tmp_path, Pretence(by_place({})))
