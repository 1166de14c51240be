"""With `pytest -n`, a file stays in one process, and the end-to-end tests in one: they share what they made."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its group, before pytest-xdist looks for it."""
    for item in items:
        path = item.path.relative_to(HERE)
        group = path.parts[0] if path.parts[0] == "end_to_end" else path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
