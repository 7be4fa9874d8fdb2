"""`moeplan lint`: its table, its JSON and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Moeplan
from tests.exporters.reading.judges import SAMPLES


def test_a_script_without_errors(moeplan: Moeplan) -> None:
    done = moeplan("lint", SAMPLES / "mixtral_8x7b.sh", "--device", "h100")
    assert done.code == 0
    assert "sequence-parallel-off" in done.out and "0 errors" in done.out and "saves" in done.out


def test_errors_end_in_one(moeplan: Moeplan, tmp_path: Path) -> None:
    text = (SAMPLES / "mixtral_8x7b.sh").read_text().replace("--overlap-grad-reduce\n", "\n")
    (tmp_path / "run.sh").write_text(text)
    done = moeplan("lint", tmp_path / "run.sh")
    assert done.code == 1 and "gather-overlap" in done.out and "1 errors" in done.out


def test_json(moeplan: Moeplan) -> None:
    more = ["--add", "--eval-interval 1000", "--", "4", "256"]
    done = moeplan("lint", SAMPLES / "qwen3_moe.sh", "--cluster", "h100x32", "--json", *more)
    data = json.loads(done.out)
    assert done.code == 0 and data["counts"]["error"] == 0
    dispatcher = next(f for f in data["findings"] if f["rule"] == "dispatcher")
    assert dispatcher["saves"] > 0.01 and dispatcher["fix"].startswith("--moe-token-dispatcher-type")
    assert data["counts"] == {s: sum(f["severity"] == s for f in data["findings"]) for s in ("error", "change", "slow")}


def test_what_cannot_be_read_is_an_error(moeplan: Moeplan, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("echo nothing\n")
    assert moeplan("lint", tmp_path / "run.sh").code == 1


def test_of_megatron_deepspeed_only_the_layout_is_judged(moeplan: Moeplan) -> None:
    done = moeplan("lint", SAMPLES / "dense_pipeline_zero.sh", "--cluster", "h100x32")
    assert done.code == 0 and "the flags of Megatron-DeepSpeed are not" in done.err and "0 errors" in done.out


def test_megatron_deepspeed_without_its_number_of_gpus(moeplan: Moeplan) -> None:
    done = moeplan("import", SAMPLES / "moe_gpt_1.3b.sh")
    assert done.code == 1 and "--hostfile" in done.err and "--gpus N" in done.err
