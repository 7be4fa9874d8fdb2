"""Tables of runs: columns, order, statuses, and prices that do not depend on the company a row keeps."""

import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest

from moeplan.costmodels.layout import Layouts
from moeplan.costmodels.price import Pricing
from moeplan.costmodels.uncertainty import interval
from moeplan.errors import FileError, SchemaError
from moeplan.planner.estimate import OUTPUT_COLUMNS, PricedRun, price_runs, read_table, table_text
from moeplan.planner.runs import REQUIRED_COLUMNS, SURPLUS, read_run
from moeplan.profiles.nominal import nominal
from moeplan.units import GIB
from tests.planner.published_rows import BRIDGE, LORA, ROWS, SIMUMAX, SWIFT, UNSTATED

HEADER = "id,status,reason,predicted_step_s,predicted_low_s,predicted_high_s,predicted_tokens_per_s_per_gpu,predicted_peak_gib"
LINE = "a,llama3-8b,H100,8,8192,64,1,1"


def text_of(rows: list[dict[str, str]], *, columns: list[str] | None = None) -> str:
    stream = io.StringIO(newline="")
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(stream, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def table(tmp_path: Path, content: str | bytes) -> list[dict[str, str]]:
    path = tmp_path / "runs.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


def by_id(priced: list[PricedRun]) -> dict[str, dict[str, str]]:
    return {p.id: p.row() for p in priced}


def test_columns_and_their_order() -> None:
    lines = table_text(price_runs([SIMUMAX, LORA])).splitlines()
    assert lines[0] == HEADER == ",".join(OUTPUT_COLUMNS)
    assert len(lines) == 3 and lines[2].startswith("mlperf-lora-5.0,unsupported,") and lines[2].endswith(",,,,,")


def test_statuses_of_published_rows() -> None:
    found = {p.id: (p.status, p.reason) for p in price_runs(ROWS)}
    assert list(found) == [row["id"] for row in ROWS]
    assert found["simumax-1.2"] == ("ok", "") and found["bridge-26.06.01"][0] == "ok"
    assert found["folding"][0] == "partial" and "mbs: assumed 1; " in found["folding"][1]
    assert found["mcore-0.8"] == ("unsupported", "num_gpus is not given")
    assert found["mlperf-lora-5.0"][0] == "unsupported" and "LoRA" in found["mlperf-lora-5.0"][1]


def test_a_row_is_priced_as_its_layout_alone() -> None:
    for row in (BRIDGE, SIMUMAX, SWIFT):
        run = read_run(row)
        profile, one = nominal(run.cluster), Layouts.of([run.layout])
        time = Pricing(run.model, profile, run.workload, one).step_cost().time.at(0)
        step = float(time.total)
        peak = float(Pricing(run.model, profile, run.workload, one).peak_memory().total.max())
        low, high = interval(run.model, profile, run.workload, time)
        (priced,) = price_runs([row])
        assert priced.cost is not None and float(priced.cost.total) == pytest.approx(step, rel=1e-12)
        assert (priced.peak_bytes, priced.low_s, priced.high_s) == pytest.approx((peak, low, high), rel=1e-12)
        out = priced.row()
        assert float(out["predicted_step_s"]) == pytest.approx(step, rel=1e-5)
        assert float(out["predicted_peak_gib"]) == pytest.approx(peak / GIB, rel=1e-4)
        tokens = run.workload.tokens / step / run.cluster.gpus
        assert float(out["predicted_tokens_per_s_per_gpu"]) == pytest.approx(tokens, rel=1e-5)
        assert float(out["predicted_low_s"]) < step < float(out["predicted_high_s"])


def many(count: int) -> list[dict[str, str]]:
    """Rows of several models, clusters and batches, some of which cannot be priced."""
    pick, rows = random.Random(5), []
    for i in range(count):
        row = dict(pick.choice(ROWS))
        if pick.random() < 0.3:
            row[pick.choice(("mbs", "recompute", "etp", "precision", "vpp"))] = ""
        if pick.random() < 0.3:
            row["gbs"] = str(int(row.get("gbs") or 64) * pick.choice((2, 3)))
        rows.append({**row, "id": f"row-{i}"})
    return rows


def test_any_order_gives_the_same_predictions() -> None:
    rows = many(200)
    plain = by_id(price_runs(rows))
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    again = price_runs(shuffled)
    assert [p.id for p in again] == [r["id"] for r in shuffled]
    assert by_id(again) == plain
    assert {r["status"] for r in plain.values()} == {"ok", "partial", "unsupported"}


def test_a_row_does_not_depend_on_the_others() -> None:
    rows = many(60)
    together = by_id(price_runs(rows))
    for row in rows[::7]:
        (alone,) = price_runs([row])
        assert alone.row() == together[row["id"]]


def test_1200_rows(tmp_path: Path) -> None:
    rows = table(tmp_path, text_of(many(1200)))
    seen: list[tuple[int, int]] = []
    priced = price_runs(rows, lambda done, total: seen.append((done, total)))
    assert [p.id for p in priced] == [f"row-{i}" for i in range(1200)]
    assert seen[-1] == (1200, 1200) and seen == sorted(seen)
    assert len(table_text(priced).splitlines()) == 1201


def test_measured_and_unknown_columns_make_no_difference() -> None:
    measured = {**SIMUMAX, "tokens_per_s_per_gpu": "9000", "mfu": "0.4", "measured_step_s": "0.9", "colour": "blue"}
    blank = dict.fromkeys(("tokens_per_s_per_gpu", "mfu", "measured_step_s", "tflops_per_gpu"), "")
    assert by_id(price_runs([measured])) == by_id(price_runs([SIMUMAX])) == by_id(price_runs([{**SIMUMAX, **blank}]))


def test_rows_that_break_todays_rules_are_priced_with_a_remark() -> None:
    (old,) = price_runs([{**SWIFT, "sequence_parallel": "no"}])
    assert old.status == "partial" and old.cost is not None
    assert "breaks rule moe-sequence-parallel of today's Megatron: tp=2 without sequence parallelism" in old.reason


def test_what_the_hardware_cannot_do_is_unsupported() -> None:
    (fp8,) = price_runs([{**SWIFT, "precision": "fp8-cs"}])
    assert (fp8.status, fp8.cost) == ("unsupported", None) and "A800 has 8.0" in fp8.reason
    mixed = price_runs([{**SWIFT, "id": "a"}, {**SWIFT, "id": "b", "precision": "nvfp4"}])
    assert [p.status for p in mixed] == ["partial", "unsupported"]


def test_the_smallest_table(tmp_path: Path) -> None:
    rows = table(tmp_path, ",".join(REQUIRED_COLUMNS) + "\n" + LINE + "\n")
    (priced,) = price_runs(rows)
    assert priced.status == "partial" and priced.cost is not None
    assert table(tmp_path, ",".join(REQUIRED_COLUMNS) + "\n") == [] == price_runs([])


PLAIN = ",".join(REQUIRED_COLUMNS) + "\n" + LINE + "\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.rstrip("\n").encode(),
        PLAIN.encode() + b"\n\n",
        PLAIN.replace(",model,", ", model ,").encode(),
        ("\n".join(",".join(f'"{c}"' for c in line.split(",")) for line in PLAIN.splitlines())).encode(),
        PLAIN.replace(LINE, LINE + ",,,").encode(),
        PLAIN.replace("llama3-8b", " llama3-8b ").encode(),
    ],
    ids=["mark", "crlf", "cr", "no end", "blank lines", "spaces in names", "quotes", "blank surplus", "spaces in cells"],
)
def test_forms_of_the_same_table(content: bytes, tmp_path: Path) -> None:
    assert by_id(price_runs(table(tmp_path, content))) == by_id(price_runs(table(tmp_path, PLAIN)))


def test_columns_in_any_order(tmp_path: Path) -> None:
    rows = [SIMUMAX, SWIFT]
    names = list(dict.fromkeys(name for row in rows for name in row))
    random.Random(0).shuffle(names)
    assert by_id(price_runs(table(tmp_path, text_of(rows, columns=names)))) == by_id(price_runs(rows))


def test_cells_beyond_the_columns(tmp_path: Path) -> None:
    rows = table(tmp_path, PLAIN + "b,llama3-8b,H100,1,024,8192,64,1,1\n")
    assert rows[1][SURPLUS] == "1"
    assert [p.status for p in price_runs(rows)] == ["partial", "unsupported"]
    assert table(tmp_path, PLAIN + "c,llama3-8b\n")[1]["gpu"] is None


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "lacks the columns id, model, gpu, num_gpus, seq_len, gbs, tp, pp", "needed are id, model"),
        (b"id,model\na,b\n", "lacks the columns gpu, num_gpus", "needed are"),
        (PLAIN.replace("num_gpus", "gpus").encode(), "lacks the column num_gpus", "found 'gpus' for 'num_gpus'?"),
        (PLAIN.replace("id,", "ID,").encode(), "lacks the column id", "found 'ID' for 'id'?"),
        (PLAIN.replace(",", ";").encode(), "lacks the columns", "separate cells by commas"),
        (PLAIN.replace(",", "\t").encode(), "lacks the columns", "separate cells by commas"),
        (PLAIN.replace("gbs", "tp").encode(), "has the column tp twice", "remove one"),
        ((PLAIN + 'b,"unclosed\n').encode(), "line 3: unexpected end of data", "is it a CSV file?"),
        ((PLAIN + "b," + "x" * 140_000 + "\n").encode(), "line 3: field larger", "is it a CSV file?"),
        (PLAIN.encode("utf-16"), "not UTF-8 text", "save it as UTF-8"),
        (PLAIN.replace("llama3-8b", "llamé").encode("latin-1"), "not UTF-8 text", "save it as UTF-8"),
        (bytes(range(128, 256)), "not UTF-8 text", ""),
    ],
    ids=["empty", "few", "near", "case", "semicolons", "tabs", "twice", "quote", "huge", "utf-16", "latin-1", "binary"],
)
def test_files_that_are_no_tables(content: bytes, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        table(tmp_path, content)
    assert "run table" in caught.value.message and message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="run table .* does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileError, match="is a directory"):
        read_table(tmp_path)
    with pytest.raises(SchemaError):
        (tmp_path / "nul.csv").write_bytes(b"\x00" * 100)
        read_table(tmp_path / "nul.csv")


def test_predictions_read_back_as_csv() -> None:
    reason = price_runs([{**UNSTATED, "id": 'odd, "id"\nof two lines'}])
    (row,) = csv.DictReader(io.StringIO(table_text(reason), newline=""))
    assert row["id"] == 'odd, "id"\nof two lines' and list(row) == HEADER.split(",")


def test_numbers_are_numbers() -> None:
    for out in by_id(price_runs(many(80))).values():
        numbers = [out[name] for name in OUTPUT_COLUMNS[3:]]
        if out["status"] == "unsupported":
            assert out["reason"] and numbers == [""] * 5
        else:
            assert np.isfinite([float(n) for n in numbers]).all() and min(map(float, numbers)) > 0
            assert bool(out["reason"]) == (out["status"] == "partial")
