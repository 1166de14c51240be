"""`emulated:<board>`: a board whose processor is emulated here, with its own runtimes and their real kernels.

Outputs and counts of instructions are the board's, as far as the emulator is right; times say nothing.
"""

from collections.abc import Sequence

from targets.emulator.board import boards, load
from targets.emulator.machine import PYTHON, RUNTIMES, TFLITE_RUNTIME, Machine, find, remedy
from targets.errors import MissingRuntime, TargetError
from targets.transports import INSTRUCTIONS
from targets.transports.local import LocalTransport

SCHEME = "emulated:"
# The other runtime's packages are chosen by a word behind the board, for those who deploy with it.
OTHER = {"tflite-runtime": f"{TFLITE_RUNTIME}/lib/python3.11/site-packages"}


class EmulatedTransport(LocalTransport):
    """See `targets.transports.Transport`. Its folder and processes are this machine's, started under the emulator.

    A command's first word is a program of the board, by its path there; it cannot start other programs of the board.
    """

    emulated = True
    prefix = "tightfit-emulated-"

    def __init__(self, address: str, board: str, site: str) -> None:
        super().__init__(address)
        self.counts = False
        # Neither the board's nor this machine's `site` is loaded: what is installed here must not be found there.
        self.python = (PYTHON, "-S", "-s", "-B")
        self._board = board
        self._site = site
        self._machine: Machine | None = None

    def open(self) -> None:
        """Find the board, which must be built, and make the folder."""
        self._machine = machine = find(self._board)
        if not (machine.root / self._site).is_dir():
            wanted = self.address.removeprefix(SCHEME)
            raise MissingRuntime(f"{self.address}: {self._board} was built without it; `{remedy(wanted)}` adds it.")
        self.counts = machine.plugin is not None
        self.processor = (machine.board.machine, machine.board.cpu.partition(",")[0])
        super().open()

    def facts(self) -> dict[str, str]:
        """The board, its processor, the emulator and its version."""
        machine = self._opened()
        return {
            "device": f"{machine.board.title}, emulated",
            "cpu": machine.board.cpu.partition(",")[0],
            "emulator": f"qemu-user {machine.version}",
            "timing": "emulated: times say nothing about the device",
        }

    def _launch(self, command: Sequence[str], count: bool) -> tuple[list[str], dict[str, str] | None]:
        machine = self._opened()
        # The folder's name has the same length in every session, so it costs the same instructions.
        environment = machine.environment(self._site) | {"TMPDIR": str(self._there(""))}
        return machine.command(command, INSTRUCTIONS if count else None), environment

    def _opened(self) -> Machine:
        if self._machine is None:
            raise TargetError(f"{self.address} is not open.")
        return self._machine


def transport(address: str) -> EmulatedTransport:
    """The board that an address names: `emulated:raspberry-pi-4b`, or `emulated:raspberry-pi-4b/tflite-runtime`.

    Raises TargetError where it names none, with the nearest that there is.
    """
    board, slash, other = address.removeprefix(SCHEME).partition("/")
    if not address.startswith(SCHEME) or not board:
        raise TargetError(f"'{address}' names no board; there are {', '.join(SCHEME + name for name in boards())}.")
    load(board)
    if slash and other not in OTHER:
        raise TargetError(f"'{address}': behind a board may only stand /{' or /'.join(OTHER)}.")
    return EmulatedTransport(address, board, OTHER.get(other, RUNTIMES))
