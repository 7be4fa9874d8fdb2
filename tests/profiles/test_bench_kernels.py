"""Every kernel runs here for real and computes what its name says; what a device lacks is refused with a reason."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moeplan.profiles import bench_attention, bench_kernels, bench_streams, bench_support
from moeplan.profiles.bench_kernels import KERNEL_OPS, kernel, measured
from moeplan.profiles.cases import STREAM_BYTES, Case, UnsupportedCase, kernel_cases
from moeplan.profiles.timing import Clock

CPU = torch.device("cpu")
DIRECTIONS = ("", "-dgrad", "-wgrad")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gemm(key: str = "bf16", **sizes: int) -> Case:
    return Case(op="gemm", key=key, sizes={"m": 48, "n": 32, "k": 64, **sizes})


def grouped(direction: str) -> Case:
    return Case(op="grouped_gemm", key=f"bf16{direction}", sizes={"groups": 3, "m": 16, "n": 32, "k": 64})


def attention(op: str, key: str, heads: int = 4, kv_heads: int = 2) -> Case:
    return Case(op=op, key=key, sizes={"batch": 2, "seq": 24, "heads": heads, "kv_heads": kv_heads})


def stream(key: str, rows: int = 16, width: int = 32) -> Case:
    return Case(op="stream", key=key, sizes={"bytes": 0.0, "rows": rows, "width": width})


def inside(run: Any, *names: str) -> list[Any]:
    """Tensors that a closure reads."""
    cells = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))
    return [cells[name].cell_contents for name in names]


def near(found: torch.Tensor, wanted: torch.Tensor, rel: float = 0.02) -> None:
    """Equal to what a bfloat16 result can be."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().float(), wanted.detach().float()
    assert float((found - wanted).norm() / wanted.norm()) < rel


def test_gemm() -> None:
    run, how = kernel(gemm(), CPU)
    x, weight = run.args
    near(run(), x.float() @ weight.float())
    assert run() is run.keywords["out"], "nothing is allocated while it is timed"
    assert how == f"torch.mm, torch {torch.__version__}"


def test_gemm_in_fp8_quantises_its_input() -> None:
    run, how = kernel(gemm("fp8"), CPU)
    _, x, (weight, scale) = run.args
    assert (x.dtype, weight.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    near(run(), x.float() @ (weight.float() * scale).t(), rel=0.05)
    assert "_scaled_mm" in how and "x quantised" in how


def test_quantised_tensors_use_the_whole_range() -> None:
    x = torch.tensor([[-3.0, 0.5], [1.0, 6.0]], dtype=torch.bfloat16)
    quantized, scale = bench_kernels._quantized(x, torch.float8_e4m3fn)
    assert float(quantized.float().abs().max()) == torch.finfo(torch.float8_e4m3fn).max == 448.0
    near(quantized.float() * scale, x, rel=0.05)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_grouped_gemm(direction: str) -> None:
    """Three products one by one: y = x w, dx = dy w^T, dw = dy^T x."""
    run, how = kernel(grouped(direction), CPU)
    left, right = (each.float() for each in run.args[:2])
    if direction == "-wgrad":
        wanted = torch.stack([a @ b for a, b in zip(left.chunk(3, dim=1), right.chunk(3), strict=True)])
        assert wanted.shape == (3, 32, 64)
    else:
        wanted = torch.cat([a @ b for a, b in zip(left.chunk(3), right, strict=True)])
        assert wanted.shape == (48, 32 if direction == "" else 64)
    near(run(), wanted)
    assert "grouped_mm" in how or "loop" in how


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_grouped_products_a_loop_does_the_same(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = kernel(grouped(direction), CPU)[0]()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("only on devices of the future")

    monkeypatch.setattr(bench_kernels, "_grouped_products", lambda: [("grouped", refuse)])
    run, how = kernel(grouped(direction), CPU)
    near(run(), wanted)
    assert how.startswith("loop of torch.mm")


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize(("key", "heads", "kv_heads"), [("64", 4, 4), ("128", 4, 2), ("192/128", 4, 4)])
def test_attention_and_its_backward(key: str, heads: int, kv_heads: int) -> None:
    run, how = kernel(attention("attention", key, heads, kv_heads), CPU)
    q, k, v = inside(run, "q", "k", "v")
    assert (q.shape, k.shape[1]) == ((2, heads, 24, int(key.partition("/")[0])), kv_heads)
    near(run(), plain_attention(q.float(), k.float(), v.float()))
    assert not run().requires_grad, "a forward that saves nothing"
    assert how.startswith("scaled_dot_product_attention, ")

    run, _ = kernel(attention("attention-backward", key, heads, kv_heads), CPU)
    _, inputs, gradient = run.args
    copies = [each.detach().float().requires_grad_() for each in inputs]
    wanted = torch.autograd.grad(plain_attention(*copies), copies, gradient.float())
    for found, each in zip(run(), wanted, strict=True):
        near(found, each, rel=0.03)


def test_attention_takes_the_fastest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def candidate(name: str, works: bool) -> Any:
        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            tried.append(name)
            if not works:
                raise RuntimeError(f"{name} is not for this device\nand says why at length")
            return plain_attention(q, k, v)

        return name, forward

    seconds = iter([2.0, 1.0])
    trial = bench_attention._trial_s
    monkeypatch.setattr(bench_attention, "_trial_s", lambda *args: (trial(*args), next(seconds))[1])
    some = [candidate("slow", True), candidate("broken", False), candidate("quick", True), candidate("math", True)]
    monkeypatch.setattr(bench_attention, "_candidates", lambda q, k: iter(some))
    assert kernel(attention("attention", "64"), CPU)[1].startswith("quick")
    assert "broken" in tried and "math" not in tried, "the plain one is the last resort"
    monkeypatch.setattr(bench_attention, "_candidates", lambda q, k: iter([candidate("broken", False)]))
    with pytest.raises(UnsupportedCase, match="head sizes 64/64: no implementation runs: broken is not for this device$"):
        kernel(attention("attention", "64"), CPU)


def test_flash_attn_is_tried_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is [batch, sequence, heads, head size], and version 3 gives more than the output."""

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Any:
        assert causal
        out = plain_attention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)
        return out, "log-sum-exp"

    def package(name: str) -> Any:
        if name == "flash_attn":
            raise ImportError
        return types.SimpleNamespace(flash_attn_func=flash_attn_func, __version__="3.1")

    monkeypatch.setattr(bench_attention.importlib, "import_module", package)
    [(name, forward)] = bench_attention._flash_attn()
    assert name == "flash_attn_interface 3.1"
    q, k, v = bench_attention._inputs(attention("attention", "64"), CPU)
    near(forward(q, k, v), plain_attention(q, k, v))


@pytest.mark.parametrize("kind", STREAM_BYTES)
def test_every_stream_runs(kind: str) -> None:
    run, how = kernel(stream(kind), CPU)
    run()
    assert how.endswith(torch.__version__)


def test_streams_compute_what_they_say() -> None:
    run, _ = bench_streams.stream(stream("copy"), CPU)
    assert torch.equal(run(), run.args[0])

    run, _ = bench_streams.stream(stream("norm"), CPU)
    x, residual, weight = (each.float() for each in inside(run, "x", "residual", "weight"))
    total = x + residual
    near(run(), total / (total**2).mean(dim=1, keepdim=True).sqrt() * weight)

    run, _ = bench_streams.stream(stream("swiglu"), CPU)
    gate, up = (each.float() for each in inside(run, "gate", "up"))
    near(run(), gate * gate.sigmoid() * up)

    run, _ = bench_streams.stream(stream("cross_entropy"), CPU)
    logits, targets = inside(run, "logits", "targets")
    loss, gradient = run()
    chance = logits.detach().float().softmax(dim=1)
    assert float(loss) == pytest.approx(float(-chance[torch.arange(16), targets].log().mean()), rel=1e-4)
    near(gradient, (chance - torch.nn.functional.one_hot(targets, 32)) / 16)

    run, _ = bench_streams.stream(stream("router"), CPU)
    probability, expert, counts = run()
    assert int(counts.sum()) == 16 * 8
    assert torch.equal(counts, expert.flatten().bincount(minlength=32))
    assert bool((probability.diff(dim=1) <= 0).all()) and float(probability.sum(dim=1).max()) <= 1.0


def test_permute_and_its_inverse() -> None:
    """Every token is gathered top-k times; the way back sums its rows by probability."""
    run, _ = bench_streams.stream(stream("permute", rows=32), CPU)
    tokens, _, token_of_row = run.args
    assert tokens.shape == (4, 32)
    assert token_of_row.bincount().tolist() == [8] * 4
    assert torch.equal(run(), tokens[token_of_row])

    run, _ = bench_streams.stream(stream("unpermute", rows=32), CPU)
    rows, token_of_row, probability = inside(run, "expert_out", "token_of_row", "probability")
    wanted = torch.stack([(rows * probability)[token_of_row == token].float().sum(dim=0) for token in range(4)])
    near(run(), wanted)
    near(run(), wanted)  # not added to what the last run left


def test_an_optimizer_step_moves_the_weights() -> None:
    run, how = bench_streams.stream(stream("optimizer", width=1), CPU)
    before = run().clone()
    after = run()
    assert after.dtype == torch.bfloat16 and not torch.equal(before, after)
    assert how == "fused AdamW and copy_"


def test_a_host_without_a_device_has_nothing_to_copy_to() -> None:
    with pytest.raises(UnsupportedCase, match="the device is the host"):
        kernel(Case(op="host_copy", key="host_to_device", sizes={"bytes": 8.0}), CPU)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (gemm("int4"), "no such precision"),
        (Case(op="grouped_gemm", key="fp8", sizes={"groups": 1, "m": 16, "n": 16, "k": 16}), "no such precision or direction"),
        (stream("dropout"), "no such pass"),
        (gemm(m=2**40), "cannot run: .*memory"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_a_reason(case: Case, reason: str) -> None:
    with pytest.raises(UnsupportedCase, match=reason):
        kernel(case, CPU)


def test_fp8_where_torch_does_not_offer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on newer devices\nand some more")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(UnsupportedCase, match="gemm 'fp8': torch._scaled_mm is only supported on newer devices$"):
        kernel(gemm("fp8"), CPU)
    monkeypatch.delattr(torch, "_scaled_mm")
    with pytest.raises(UnsupportedCase, match="this torch has no _scaled_mm"):
        kernel(gemm("fp8"), CPU)


def test_a_failed_device_is_no_lacking_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the device itself nothing runs any more: the case is not merely left out."""

    class AcceleratorError(RuntimeError):
        pass

    def fail(case: Case, device: torch.device) -> Any:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError)
    monkeypatch.setattr(bench_kernels, "_KERNELS", {"gemm": fail})
    with pytest.raises(AcceleratorError, match="illegal memory access"):
        kernel(gemm(), CPU)
    assert bench_support.why(RuntimeError("first\nsecond")) == "first"
    assert bench_support.why(NotImplementedError()) == "NotImplementedError"


def test_measured() -> None:
    timing, how = measured(gemm(), Clock("cpu"), 0.02)
    assert timing.seconds > 0 and len(timing.times_s) >= 3
    assert how.startswith("torch.mm")


def test_a_launch_is_timed_on_the_host() -> None:
    clock = Clock("cpu")
    asked = []
    clock.measure_host = lambda *args: asked.append(args) or "host"  # type: ignore[method-assign,assignment,func-returns-value]
    assert measured(Case(op="launch", key="kernel"), clock, 0.01) == ("host", f"add_ of one element, torch {torch.__version__}")
    run, budget_s, _ = asked[0]
    assert float(run()) == 1.0 and budget_s == 0.01


def test_every_kernel_case_has_a_kernel() -> None:
    assert {case.op for case in kernel_cases([], "cuda", 80e9)} == KERNEL_OPS


def test_the_coarse_grid_of_a_cpu_runs() -> None:
    """The real cases, the smallest of each kind."""
    first: dict[tuple[str, str], Case] = {}
    for case in sorted(kernel_cases([], "cpu", 8e9), key=lambda c: sum(c.sizes.values())):
        first.setdefault((case.op, case.key), case)
    for case in first.values():
        run, how = kernel(case, CPU)
        run()
        assert how
