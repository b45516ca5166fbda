"""Options of `pytest benches/`, and the fixture that turns a case into a row.

pytest-benchmark is given the samples of ours, which the harness took in turns with those of the
baselines, on a clock that counts nothing else; its JSON carries the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import harness, report

ROWS = pytest.StashKey[list[harness.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastadapters")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption(
        "--dtype",
        default="float32,bfloat16,autocast",
        help="comma-separated; autocast: float32 tensors, bfloat16 products",
    )
    group.addoption(
        "--threads",
        default=str(torch.get_num_threads()),
        help="numbers of CPU threads, comma-separated; by default PyTorch's",
    )
    group.addoption(
        "--full", action="store_true", help="every workload, and max-autotune among the baselines"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    table = getattr(metafunc.module, "WORKLOADS", ())
    dtypes = option("--dtype").split(",")
    if not option("--full"):
        dtypes = [name for name in dtypes if name in getattr(metafunc.module, "QUICK", dtypes)]
    if not getattr(metafunc.module, "AUTOCAST", False):
        dtypes = [name for name in dtypes if name != "autocast"]
    values: dict[str, list[Any]] = {
        "workload": [w.on(option("--device")) for w in table if w.quick or option("--full")],
        "dtype": [name if name == "autocast" else getattr(torch, name) for name in dtypes],
        "direction": ["forward", "training"],
        "threads": [int(n) for n in option("--threads").split(",")],
    }
    for name, value in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, value, ids=lambda v: str(getattr(v, "name", v)))


class Clock:
    """Time that passes only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def record(benchmark: Any, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Keep a row and give pytest-benchmark the samples of ours; fail where ours does not match."""

    def keep(row: harness.Row, samples: list[float]) -> None:
        pytestconfig.stash[ROWS].append(row)
        if row.match != "yes":
            pytest.fail(row.match)
        remaining = iter(samples)

        def replay() -> None:
            CLOCK.now += next(remaining)

        benchmark.pedantic(replay, rounds=len(samples))

    return keep


@pytest.fixture
def bench(record: Callable[..., None], request: pytest.FixtureRequest) -> Callable[..., None]:
    def run(make_case: Callable[..., harness.Case], workload: Any) -> None:
        param = request.node.callspec.params
        option = request.config.getoption
        training = param["direction"] == "training"
        device, dtype = option("--device"), param["dtype"]
        if dtype == "autocast":
            case = harness.autocast(
                make_case(workload, device, torch.float32), device, torch.bfloat16
            )
        else:
            case = make_case(workload, device, dtype)
        row, samples = harness.run(
            case._replace(costs=workload.costs(training)),
            training=training,
            device=option("--device"),
            threads=param["threads"],
            budget=6.0 if option("--full") else 1.5,
            full=option("--full"),
        )
        record(row, samples)

    return run


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastadapters"] = harness.machine()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["rows"] = [row._asdict() for row in config.stash[ROWS]]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.write_line(report.tables(config.stash[ROWS]))
