"""Constants as text, by name and from files: units, defaults, and what is refused."""

import pytest

from moeplan.costmodels.moe.base import AlphaBeta
from moeplan.costmodels.moe.constants import OPERATIONS, Constants, constant_names, load_constants, parse_constant
from moeplan.errors import FileError, MoeplanError, SchemaError, UnknownNameError, UsageError

TEXTS = [  # text, name, alpha in s, beta in s/B or s/FLOP
    ("287us,1.25GB/s", "a2a", 287e-6, 0.8e-9),
    ("287, 1.25", "a2a", 287e-6, 0.8e-9),
    (" 0.287 ms , 580 ps/B ", "a2a", 287e-6, 580e-12),
    ("0,2us/MB", "all-gather", 0.0, 2e-12),
    ("1ms,200Gbit/s", "a2a", 1e-3, 4e-11),
    ("1ms,200Gb/s", "a2a", 1e-3, 4e-11),
    ("1ms,25GB/s", "a2a", 1e-3, 4e-11),
    ("1s,0s/GiB", "a2a", 1.0, 0.0),
    ("40us,20TFLOP/s", "gemm", 40e-6, 5e-14),
    ("40us,20TFLOPS", "gemm", 40e-6, 5e-14),
    ("40,20", "gemm", 40e-6, 5e-14),
    ("40us,50fs/FLOP", "gemm", 40e-6, 5e-14),
]
BAD = [  # text, name, message
    ("5us", "a2a", "alpha and beta are needed"),
    ("-5us,1GB/s", "a2a", "'-5us' is not a time of 0 or more"),
    ("5GB,1GB/s", "a2a", "'5GB' is not a time"),
    ("5us,0", "a2a", "'0' is not a rate above 0"),
    ("5us,-3GB/s", "a2a", "'-3GB/s' is not a rate"),
    ("5us,3gb/s", "a2a", "'3gb/s' is not a rate"),
    ("5us,3TFLOP/s", "a2a", "'3TFLOP/s' is not a rate"),
    ("5us,3GB/s", "gemm", "'3GB/s' is not a rate"),
    ("5us,1GB/s,2", "a2a", "'1GB/s,2' is not a rate"),
    ("1e999,1", "a2a", "'1e999' is not a time"),
    ("1,1e-999", "a2a", "is not a rate above 0"),
    ("nan,1", "a2a", "'nan' is not a time"),
]


@pytest.mark.parametrize(("text", "name", "startup_s", "unit_s"), TEXTS)
def test_units(text, name, startup_s, unit_s):
    line = parse_constant(text, name)
    assert (line.startup_s, line.unit_s) == pytest.approx((startup_s, unit_s))


@pytest.mark.parametrize(("text", "name", "message"), BAD)
def test_refused(text, name, message):
    with pytest.raises(UsageError) as caught:
        parse_constant(text, name)
    assert message in caught.value.message and f"constant {name} '{text}'" in caught.value.message
    assert caught.value.hint == f"write it like {'43us,45.7TFLOP/s' if name == 'gemm' else '287us,1.72GB/s'}"


def test_examples_of_the_hints_are_understood():
    assert parse_constant("43us,45.7TFLOP/s", "gemm") and parse_constant("287us,1.72GB/s", "a2a")


def test_shipped_testbeds():
    """Corrected values of figure 5, ms over float32 elements or MACs."""
    assert constant_names() == ["fsmoe-a", "fsmoe-b"]
    a, b = (load_constants(name) for name in constant_names())
    assert a.groups == {"mp": 8, "esp": 8, "ep": 6} and b.groups == {"mp": 4, "esp": 4, "ep": 8}
    printed = {
        "a2a": (0.287, 2.3201445211e-6, 0.175, 1.224e-6), "all-gather": (0.337, 2.3477633843e-7, 0.032, 6.72e-7),
        "reduce-scatter": (0.395, 2.2171110136e-7, 0.0391, 6.68e-7),
        "gradient-all-reduce": (0.511, 4.9511764052e-6, 0.0837, 2.396e-6), "gemm": (0.0426, 9.16e-11, 0.0924, 1.768e-10),
    }  # fmt: skip
    assert set(a.given) == set(b.given) == set(printed)
    for name, (alpha_a, beta_a, alpha_b, beta_b) in printed.items():
        unit = 2.0 if name == "gemm" else 4.0
        for constants, alpha, beta in ((a, alpha_a, beta_a), (b, alpha_b, beta_b)):
            line = constants.given[name]
            assert (line.startup_s * 1e3, line.unit_s * 1e3 * unit) == pytest.approx((alpha, beta), rel=1e-9)
    assert all(constants.element_bytes == 4 and "arXiv" in constants.source for constants in (a, b))


def test_defaults():
    line = {name: AlphaBeta(startup_s=i + 1.0, unit_s=10.0 * (i + 1)) for i, name in enumerate(OPERATIONS)}
    few = Constants(name="x", source="x", given={name: line[name] for name in ("a2a", "all-gather", "reduce-scatter", "gemm")})
    lines = few.lines(gemms=3, mp=2, esp=2, ep=2)
    assert lines.fused_exchange == lines.exchange == line["a2a"] and lines.mp_gather == lines.gather == line["all-gather"]
    both = (line["all-gather"], line["reduce-scatter"])
    assert (lines.reduce.startup_s, lines.reduce.unit_s) == (sum(x.startup_s for x in both), sum(x.unit_s for x in both))
    assert lines.experts == AlphaBeta(startup_s=3 * line["gemm"].startup_s, unit_s=line["gemm"].unit_s)
    every = few.over(line).lines(gemms=2, mp=2, esp=2, ep=2)
    assert (every.fused_exchange, every.mp_gather, every.reduce) == (
        line["fused-a2a"], line["mp-all-gather"], line["all-reduce"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "missing"),
    [
        ((1, 1, 4), "a2a, gemm"),
        ((1, 1, 1), "gemm"),
        ((2, 1, 4), "a2a, all-gather, gemm"),
        ((1, 2, 2), "a2a, all-gather, reduce-scatter, gemm"),
    ],
)
def test_missing_constants_are_named(groups, missing):
    mp, esp, ep = groups
    with pytest.raises(UsageError, match=f"constants 'x': missing {missing}$") as caught:
        try:
            Constants(name="x", source="x", given={}).lines(gemms=3, mp=mp, esp=esp, ep=ep)
        except UsageError as error:
            raise UsageError(error.message) from error
    assert caught.value.exit_code == 2


FILES = [  # text of a file, message
    ("name: x", "has no 'schema'"),
    ("schema: moeplan.constants/2", "has schema 'moeplan.constants/2'"),
    ("schema: moeplan.constants/1\nname: x", "missing key 'constants'"),
    ("schema: moeplan.constants/1\nname: x\nconstants: {a2b: '1,1'}", "unknown constant 'a2b'"),
    ("schema: moeplan.constants/1\nname: x\nconstants: {a2a: '1'}", "constant a2a '1': alpha and beta are needed"),
    ("schema: moeplan.constants/1\nname: x\nconstants: {a2a: 3}", "expected str"),
    ("schema: moeplan.constants/1\nname: x\nconstants: {}\nmp: 0", "key 'mp': 0 is not a whole number of at least 1"),
    ("schema: moeplan.constants/1\nname: x\nconstant: {}", "unknown key 'constant'"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[message for _, message in FILES])
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SchemaError) as caught:
        load_constants(str(path))
    assert message in caught.value.message and str(path) in caught.value.message


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schema: moeplan.constants/1\nname: mine\nesp: 4\nconstants: {a2a: '287us, 1.25 GB/s'}")
    mine = load_constants(str(path))
    assert (mine.name, mine.groups, mine.element_bytes) == ("mine", {"esp": 4}, 2)
    assert mine.given["a2a"].unit_s == pytest.approx(0.8e-9)


@pytest.mark.parametrize(("ref", "error"), [("fsmoe-c", UnknownNameError), ("none.yaml", FileError), ("", UnknownNameError)])
def test_unknown_names(ref, error):
    with pytest.raises(error) as caught:
        load_constants(ref)
    assert isinstance(caught.value, MoeplanError) and f"'{ref}'" in caught.value.message
