"""Boards are data: every file of the folder is one, and says what a kernel of it would say."""

from pathlib import Path

import pytest

from targets.emulator import board as boards
from targets.errors import TargetError


def test_the_folder_is_the_list() -> None:
    assert boards.boards() == ["raspberry-pi-4b", "raspberry-pi-5", "x86-no-vnni"]


def test_an_unknown_board_is_answered_with_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"no board 'raspberry-pi4'.*Did you mean 'raspberry-pi-4b'"):
        boards.load("raspberry-pi4")


@pytest.mark.parametrize("name", boards.boards())
def test_a_board_is_told_by_its_files(name: str, tmp_path: Path) -> None:
    board = boards.load(name)
    boards.write(board, tmp_path)
    text = (tmp_path / "proc/cpuinfo").read_text()
    assert [line for line in text.splitlines() if line.startswith("processor")] == [
        f"processor\t: {core}" for core in range(board.cores)
    ]
    assert "{" not in "".join(boards.files(board).values()), "nothing is left to be filled in"
    cpus = tmp_path / "sys/devices/system/cpu"
    assert (cpus / "online").read_text() == "0-3\n"
    for core in range(board.cores):
        here = cpus / f"cpu{core}"
        assert (here / "topology/core_id").read_text() == f"{core}\n"
        for index in here.glob("cache/index*"):
            sizes = [int((index / part).read_text()) for part in ("number_of_sets", "ways_of_associativity")]
            line = int((index / "coherency_line_size").read_text())
            size = (index / "size").read_text().strip()
            assert sizes[0] * sizes[1] * line == int(size.removesuffix("K")) * 1024, "a cache is as large as its parts"


def test_dot_products_are_what_tells_the_two_boards_apart() -> None:
    four, five = (boards.load(name).cpuinfo_of_core for name in ("raspberry-pi-4b", "raspberry-pi-5"))
    assert "asimddp" not in four
    assert "asimddp" in five


def test_the_device_tree_is_where_a_login_sees_it_too() -> None:
    files = boards.files(boards.load("raspberry-pi-5"))
    assert files["sys/firmware/devicetree/base/model"] == files["proc/device-tree/model"]
