"""Conversions shared by every test of this folder; those the selected tests need are started at once."""

import os
from collections.abc import Iterator

import pytest
from real_conversions import JOBS, Conversions, Made, missing

PARAMETERS = ("made", "again")


@pytest.fixture(scope="session")
def conversions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversions]:
    """Starts every job that a selected test names and this machine can run.

    Where the tests are spread over processes a job starts with the first test that needs it: it may be another's.
    """
    runner = Conversions(tmp_path_factory.mktemp("conversions"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield runner
        runner.close()
        return
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    wanted = {spec.params[name] for spec in specs for name in PARAMETERS if name in spec.params}
    for name, job in JOBS.items():
        if name in wanted and not any(map(missing, job.needs)):
            runner.start(name)
    yield runner
    runner.close()


def _result(request: pytest.FixtureRequest) -> Made:
    reasons = [reason for need in JOBS[request.param].needs if (reason := missing(need))]
    if reasons:
        pytest.skip("; ".join(reasons))
    runner: Conversions = request.getfixturevalue("conversions")
    return runner.result(request.param)


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest) -> Made:
    """The job a test is parametrized with."""
    return _result(request)


@pytest.fixture(scope="session")
def again(request: pytest.FixtureRequest) -> Made:
    """A second job to compare with."""
    return _result(request)
