"""The benches' own arithmetic and honesty: costs, matching, turns, memory, the tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent.parent))

from benches import (
    adaptformer,
    auto,
    crossover,
    harness,
    noise,
    patched,
    report,
    test_bottleneck,
    test_cross_modal_attention,
    test_end_to_end,
    test_grouped,
    test_multimodal,
    test_sequence_fusion,
    workloads,
)
from fastadapters import backends, functional
from fastadapters.crossover import LIMITS, Limit
from fastadapters.modules import BottleneckAdapter

MODULES = (test_bottleneck, test_cross_modal_attention, test_multimodal, test_sequence_fusion)
SMALL = [(module, w.small()) for module in MODULES for w in module.WORKLOADS]
KINDS = list({(m, type(w), w._replace(name="", quick=False)): (m, w) for m, w in SMALL}.values())


def name(value: object) -> str:
    return getattr(value, "name", getattr(value, "__name__", str(value)))


def draws(workload: object) -> bool:
    """Whether the baselines draw masks of their own."""
    return any(getattr(workload, name, 0.0) for name in ("dropout", "input_dropout"))


def small_case(workload: workloads.Bottleneck | None = None) -> harness.Case:
    workload = workload or workloads.BOTTLENECK[0].small()
    case = test_bottleneck.case(workload, "cpu", torch.float32)
    return case._replace(costs=workload.costs(training=True))


def test_table_covers_every_op_and_is_unambiguous() -> None:
    assert [module.__name__.removeprefix("benches.test_") for module in MODULES] == list(
        backends.KERNELS
    )
    for module in MODULES:
        assert any(w.quick for w in module.WORKLOADS)
        assert len(set(module.WORKLOADS)) == len(module.WORKLOADS)
    assert len(workloads.CLASSES) == 11


def test_bottleneck_cost_by_hand() -> None:
    w = workloads.Bottleneck("", 2, 3, 4, 2, cpu_batch=1)
    weights = 2 * 8 + 2 + 4
    assert w.costs(training=True) == [
        workloads.Cost(24 + 24 + weights, 2 * 6 * 4 * 2 * 2),
        workloads.Cost(24 + 24 + 24 + 2 * weights, 4 * 6 * 4 * 2 * 2),
    ]
    other = w._replace(residual="other", bias=False)
    assert other.costs(training=False) == [workloads.Cost(3 * 24 + 16, 192)]


@pytest.mark.parametrize(("module", "workload"), KINDS, ids=name)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_flops_are_those_of_the_products(module, workload, training) -> None:
    """PyTorch's own count of the leanest form: exact, for the head's many small terms nearly."""
    case = module.case(workload, "cpu", torch.float32)
    eager = case.candidates["eager"]
    outputs = harness.as_tuple(eager(**case.inputs))
    cotangents = tuple(map(torch.randn_like, outputs)) if training else None
    with FlopCounterMode(display=False) as counter:
        harness.stepper(eager, case.inputs, cotangents)()
    flops = sum(cost.flops for cost in workload.costs(training))
    counted = counter.get_total_flops()
    tolerance = 0.3 if module is test_multimodal else 0.0  # eagerly |u|^2 is found twice
    assert counted == pytest.approx(flops, rel=tolerance, abs=0)


@pytest.mark.parametrize(("module", "workload"), KINDS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_every_workload_matches(module, workload, dtype) -> None:
    case = module.case(workload, "cpu", dtype)
    out = case.candidates["ours"](**case.inputs)
    cotangents = tuple(map(torch.randn_like, harness.as_tuple(out)))
    assert harness.match(case, cotangents) == "yes"
    if not draws(workload):
        for form in ("reference", "eager"):
            as_ours = case._replace(candidates={"ours": case.candidates[form]})
            assert harness.match(as_ours, cotangents) == "yes", form


@pytest.mark.parametrize("form", ["ours", "eager", "loop over eager"])
def test_every_form_of_grouped_adapters_matches(form) -> None:
    case = test_grouped.case(workloads.GROUPED[0].small(), "cpu", torch.float32)
    case = case._replace(candidates={"ours": case.candidates[form]})
    assert harness.match(case, (torch.randn_like(case.inputs["x"]),)) == "yes"


@pytest.mark.parametrize("workload", [w for m, w in KINDS if m is test_bottleneck], ids=name)
def test_every_form_matches_under_autocast(workload: workloads.Bottleneck) -> None:
    case = test_bottleneck.case(workload, "cpu", torch.float32)
    case = harness.autocast(case, "cpu", torch.bfloat16)
    out = case.candidates["ours"](**case.inputs)
    assert out.dtype == torch.float32
    cotangents = (torch.randn_like(out),)
    for form in ("ours",) if draws(workload) else ("ours", "reference", "eager"):
        as_ours = case._replace(candidates={"ours": case.candidates[form]})
        assert harness.match(as_ours, cotangents) == "yes", form
    if workload.scale > 0.1:  # what rounding the residual costs does not show
        return
    rounded = case._replace(
        candidates={"ours": lambda **tensors: case.candidates["ours"](**tensors).bfloat16().float()}
    )
    assert harness.match(rounded, cotangents) != "yes"


def test_rows_under_autocast_say_so() -> None:
    compiled = ("compiled reference", "compiled eager")  # takes a minute
    case = harness.autocast(small_case(), "cpu", torch.bfloat16)
    case = case._replace(untrainable=dict.fromkeys(compiled, "left out"))
    row, _ = harness.run(case, training=True, device="cpu", threads=1, budget=0.0, full=False)
    assert row.dtype == "autocast" and row.match == "yes"
    assert {"ours", "reference", "eager"} <= row.seconds.keys()
    assert row.bytes == 4 * sum(cost.elements for cost in case.costs)


def test_the_limit_admits_no_point_that_loses() -> None:
    points = {(8, 4): 2.0, (8, 64): 1.1, (8, 128): 0.9, (64, 4): 1.5, (64, 16): 1.0, (64, 32): 0.8}
    limit = crossover.sum_up(points, "here")
    assert limit == Limit(64, 1024, "here")
    for (d, r), ratio in points.items():
        assert (limit.exceeded(d, r) is None) == (ratio >= crossover.EQUAL)
    assert crossover.sum_up({(8, 4): 0.5}, "here") == Limit(0, 0, "here")


def test_the_table_is_as_the_script_writes_it() -> None:
    assert crossover.render(LIMITS) == crossover.TABLE.read_text()
    key = ("bottleneck", "cpu", "another", torch.float32)
    text = crossover.render({**LIMITS, key: Limit(1, 2, "here")})
    namespace: dict[str, object] = {}
    exec(text, namespace)
    assert namespace["LIMITS"] == {**LIMITS, key: (1, 2, "here")}


def test_the_ratio_of_the_crossover_is_the_worst(monkeypatch) -> None:
    times = iter([(1.0, 3.0), (1.0, 2.0), (2.0, 1.0), (1.0, 4.0)])  # ours and eager's, in turn
    monkeypatch.setattr(crossover, "_thread_times", lambda candidates, budget: next(times))
    assert crossover.worst_ratio(8, 4, torch.float32, 16, 0.0) == 0.5


def test_commands_of_the_crossover(monkeypatch, tmp_path) -> None:
    """As its docstring has them."""
    asked: list[list[str]] = []
    monkeypatch.setattr(crossover, "measure", lambda dtype, budget: asked.append(["cpu"]) or {})
    monkeypatch.setattr(crossover, "modelled", lambda dtypes, ops: asked.append([*ops]) or {})
    monkeypatch.setattr(crossover, "render", lambda limits: "written")
    monkeypatch.setattr(crossover, "TABLE", tmp_path / "table.py")
    for arguments in ([], ["--gpu"], ["--gpu", "multimodal"]):
        monkeypatch.setattr("sys.argv", ["crossover", "--dtype", "float32", *arguments])
        crossover.main()
    assert asked == [["cpu"], crossover.MODELLED, ["multimodal"]]
    assert crossover.TABLE.read_text() == "written"


def test_definition_in_parts_is_the_definition() -> None:
    workload = workloads.MULTIMODAL[0].small()
    case = test_multimodal.case(workload, "cpu", torch.float32)
    dy = (torch.randn(workload.batch, workload.classes),)
    whole, parts = (
        harness.evaluate(case.definition, case.inputs, dy, torch.float64, case.batched, part)
        for part in (None, 2)
    )
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_result_has_no_speed(training: bool) -> None:
    case = small_case()
    right = case.candidates["ours"]
    wrong = {**case.candidates, "ours": lambda **tensors: right(**tensors) * 1.0001}
    row, samples = harness.run(
        case._replace(candidates=wrong),
        training=training, device="cpu", threads=1, budget=0.0, full=False,
    )  # fmt: skip
    assert row.match != "yes" and "error" in row.match
    assert row.seconds == {} and samples == []
    line = report.tables([row]).splitlines()[-1]
    assert line.split(" | ")[4:10] == ["-"] * 6 and row.match in line


def test_a_wrong_gradient_does_not_match() -> None:
    case = small_case()
    right = case.candidates["ours"]

    def ours(x: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        return right(x=x.detach(), **rest) + (x - x.detach())

    dy = (torch.randn_like(case.inputs["x"]),)
    wrong = case._replace(candidates={"ours": ours})
    assert harness.match(wrong, None) == "yes"
    assert harness.match(wrong, dy).startswith("gradient of x")


def test_candidates_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    names = ["a", "b", "c"]
    samples = harness.measure(
        {n: lambda n=n: calls.append(n) for n in names}, budget=0.0, min_rounds=20, calls=1
    )
    assert {n: len(s) for n, s in samples.items()} == dict.fromkeys(names, 20)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == names for turn in rounds)
    assert len(set(rounds)) > 2


def ticking(monkeypatch: pytest.MonkeyPatch, step: float) -> Callable[[], None]:
    """A call that takes so many seconds by the clock of the harness."""
    now = 0.0

    def wait() -> None:
        nonlocal now
        now += step

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    return wait


def test_measure_gives_the_time_of_one_call(monkeypatch) -> None:
    wait = ticking(monkeypatch, 0.25)
    samples = harness.measure({"f": wait}, budget=0.0, min_rounds=3, calls=8)
    assert samples == {"f": [0.25] * 3}


def test_peak_memory_counts_what_is_held() -> None:
    def fn() -> None:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(2 << 20, dtype=torch.uint8)
        del a
        c = torch.empty(1 << 19, dtype=torch.uint8)
        del b, c

    assert harness.peak_bytes(fn, "cpu") == 3 << 20


def test_published_adapter_takes_our_parameters() -> None:
    ours = BottleneckAdapter(48, 8, scale=0.3, init="bert")
    published = adaptformer.Adapter(48, 8, 0.3)
    published.load_state_dict(ours.state_dict())
    x, residual = torch.randn(2, 2, 5, 48)
    torch.testing.assert_close(published(x, residual=residual), ours(x, residual))


def row(seconds: dict[str, float], **changes: object) -> harness.Row:
    base = harness.Row(
        "bottleneck", "w", "forward", "float32", "cpu", 2, "default", "cpu", "yes", seconds, {},
        {"ours": 1 << 20, "eager": 2 << 20}, roof="memory", roof_seconds=0.001,
    )  # fmt: skip
    return base._replace(**changes)


def test_table_shows_losses_both_mallocs_and_the_best_compiled() -> None:
    seconds = {
        "ours": 0.002, "reference": 0.006, "eager": 0.001,
        "compiled reference": 0.005, "compiled eager": 0.004,
    }  # fmt: skip
    kept = row({**seconds, "reference": 0.003}, malloc="kept")
    skipped = row({"ours": 0.002}, workload="v", skipped={"reference": "needs about 9 GiB"})
    text = report.tables([row(seconds), kept, skipped])
    line = text.splitlines()[4]
    for cell in ("2 (cpu)", "3.00 [1.50]", "**0.50** [**0.50**]", "2.00 [2.00]", "50% memory"):
        assert f"| {cell} |" in line
    assert "reference on v: needs about 9 GiB" in text


def test_auto_measures_until_it_is_settled() -> None:
    assert not auto.settled([1.5, 1.4])
    assert auto.settled([1.5, 1.4, 1.3]) and auto.settled([0.8, 0.7, 0.6])
    assert not auto.settled([1.5, 1.4, 1.0])  # one round near: more are taken
    assert not auto.settled([1.05] * 5) and auto.settled([1.05] * 6)
    assert auto.settled([1.05] * 13 + [0.9] * 3)
    assert not auto.settled([1.05, 0.9] * 20)


def test_auto_compares_what_it_would_run_with_eager(monkeypatch) -> None:
    ran: list[str] = []

    def call(name: str) -> Callable[..., torch.Tensor]:
        def fn(**inputs: torch.Tensor) -> torch.Tensor:
            ran.append(backends._selected)
            return functional.bottleneck(**inputs)

        return fn

    inputs = {
        "x": torch.randn(3, 8),
        "down_weight": torch.randn(2, 8),
        "up_weight": torch.randn(8, 2),
    }
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    forms = {"ours": call("ours"), "eager": call("eager")}
    case = harness.Case("bottleneck", "w", inputs, forms, call("definition"))
    found = list(auto.cells(case, "float32", [1], 0.01))
    assert [c.direction for c in found] == ["forward", "training step"]
    assert [c.compiled for c in found] == [None, None]
    assert {"auto", "eager"} <= set(ran)

    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    case = case._replace(untrainable={"compiled eager": "crashes"})
    forward, step = auto.cells(case, "float32", [1], 0.01, compiles=True)
    assert forward.compiled is not None and step.compiled is None


def test_the_table_of_auto_marks_what_loses() -> None:
    cell = auto.Cell("bottleneck", "w", "float32", "forward", 2, "cpu", 1.5, 3)
    losing = cell._replace(threads=1, ratio=0.95)
    other = cell._replace(workload="v", dtype="autocast", backend="eager", ratio=1.0, rounds=0)
    other = other._replace(compiled=1.25)
    lines = auto.table([cell, losing, other]).splitlines()
    assert lines[2] == "| bottleneck | w | float32 | cpu | **0.95** | 1.50 |"
    assert lines[3] == "| bottleneck | v | autocast | eager | - | 1.00 / 1.25 |"
    assert lines[-1] == "1 of 3 below 0.97 of eager."


def test_an_interval_holds_the_median_of_95_in_100() -> None:
    draws = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0)).tolist()
    held = sum(low < 0.0 < high for low, high in map(noise.interval, draws))
    assert 0.94 < held / len(draws) < 0.98
    assert noise.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert noise.interval(range(6)) == (0, 5)
    assert noise.interval(range(9)) == (1, 7)


def test_what_noise_hides_is_measured_for_longer(monkeypatch) -> None:
    wait = ticking(monkeypatch, 1.0)
    for settled, rounds in ((True, 6), (False, 16)):
        samples = harness.measure(
            {"f": wait}, budget=5.0, min_rounds=2, settled=lambda samples, is_it=settled: is_it
        )
        assert len(samples["f"]) == rounds


def test_the_table_says_where_noise_decides() -> None:
    seconds = {"ours": 0.002, "reference": 0.0021, "eager": 0.0019}
    noisy = row(seconds, ratios={"reference": (0.9, 1.2), "eager": (0.9, 0.99)})
    line = report.tables([noisy]).splitlines()[4]
    assert "| even (0.90 to 1.20) | **0.95** | - |" in line


def test_a_share_below_the_noise_is_called_so() -> None:
    samples = {
        "ours": [1.0] * 6,
        "reference": [1.0, 0.9, 1.1, 1.0, 1.0, 1.0],
        "without adapters": [0.99, 1.0, 1.0, 0.9, 1.0, 1.0],
    }
    gain = noise.ratios(samples, ["reference"])["reference"]
    hidden = test_end_to_end.said(test_end_to_end.share(samples), gain)
    assert "below the noise, -11.1% to 10.0%" in hidden and "0.90 to 1.10 x" in hidden
    shown = test_end_to_end.said((0.05, 0.2), (1.01, 1.02))
    assert "5.0% to 20.0%" in shown and "1.25 x" in shown and "noise" not in shown


def test_report_writes_readme_and_plot(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "measured.md"
    for file in (readme, page):
        file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    seconds = {"ours": 0.002, "reference": 0.006, "eager": 0.003}
    rows = [row(seconds), row(seconds, direction="training step"), row({}, match="no", roof="")]
    data = {
        "rows": [row._asdict() for row in rows],
        "machine_info": {
            "cpu": {"brand_raw": "A CPU", "count": 2},
            "fastadapters": {"torch": "2.x", "malloc": "default"},
        },
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(data))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(file)])
    report.main()
    printed = capsys.readouterr().out
    assert "A CPU, 2 cores" in printed and "3.00" in printed
    assert "old" in readme.read_text()
    monkeypatch.setattr(sys, "argv", ["report", "--write", str(file)])
    report.main()
    for text in (readme.read_text(), page.read_text()):
        assert text.startswith("before\n") and text.endswith("after\n")
        assert "old" not in text and "A CPU, 2 cores" in text
    assert printed.strip() in page.read_text()
    assert readme.read_text().count("| bottleneck | w | float32 |") == 1
    for picture in ("bench.svg", "speed.svg"):
        assert (tmp_path / "docs" / picture).read_text().count("<svg") == 1


def test_the_page_has_every_client_that_is_measured() -> None:
    text = patched.PAGE.read_text().partition(patched.BEGIN)[2].partition(patched.END)[0]
    names = [row.split(" | ")[0].removeprefix("| ") for row in text.strip().splitlines()[2:]]
    assert names == list(patched.CLIENTS)
