"""One errand from beginning to end: pack, send, run, fetch, and read what came back."""

import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from targets.agent.main import ANSWER, ERROR, OUTPUTS, TIMES
from targets.errors import MissingRuntime, TargetError
from targets.transports import INSTRUCTIONS, Finished, Transport

from . import _benchmark_binary, answers, pack
from .nouns import Answer, Errand

Progress = Callable[[str, int | None, int | None], None]


def carry_out(transport: Transport, errand: Errand, progress: Progress) -> Answer:
    """Have the agent do an errand on an open transport; `progress` is told the stage, what is done, and of how much.

    Instructions are counted where the transport can. Raises ValueError for timing an emulated device, and for inputs
    that are no whole batches; MissingRuntime where the device lacks a runtime; TargetError for all else that failed
    there, a wrong answer too.
    """
    _demand_sense(transport, errand)
    if _benchmark_binary.suits(transport):
        return _benchmark_binary.carry_out(transport, errand, progress)
    count = errand.count > 0 and transport.counts
    with tempfile.TemporaryDirectory(prefix="tightfit-errand-") as name:
        folder = Path(name)
        files, identity = pack.packed(errand, folder, count=count, processor=transport.processor)
        progress("send", None, None)
        transport.push(files)
        seconds = errand.seconds + (errand.timing.sustained_minutes * 60 if errand.timing else 0)
        finished = transport.run(
            [*transport.python, pack.AGENT, pack.JOB], seconds=seconds, line=_listener(progress), count=count
        )
        progress("fetch", None, None)
        return _answer(transport, errand, finished, identity, folder / "back", count)


def _demand_sense(transport: Transport, errand: Errand) -> None:
    if transport.emulated and errand.timing is not None:
        raise ValueError(f"{transport.address} is emulated: its time says nothing about the device")
    lengths = {len(array) for array in errand.inputs.values()}
    if len(lengths) != 1 or not min(lengths) or min(lengths) % errand.batch:
        raise ValueError(f"inputs of {sorted(lengths)} samples are no whole batches of {errand.batch}")
    if not transport.python and not _benchmark_binary.suits(transport):
        raise MissingRuntime(
            f"{transport.address}: there is no Python on the device, which the agent needs. Install python3 there, "
            "with numpy and the artifact's runtime."
        )


def _answer(transport: Transport, errand: Errand, finished: Finished, identity: str, back: Path, count: bool) -> Answer:
    back.mkdir()
    if finished.code not in (0, ERROR):
        raise TargetError(f"{transport.address}: {crashed(finished)}")
    transport.fetch(ANSWER, back / ANSWER)
    found = answers.read(back / ANSWER, identity, transport.address)
    if found.error is not None:
        kind = MissingRuntime if found.error.kind == "missing_runtime" else TargetError
        raise kind(f"{transport.address}: {found.error.text}")
    transport.fetch(OUTPUTS, back / OUTPUTS)
    if errand.timing is not None:
        transport.fetch(TIMES, back / TIMES)
    if count:
        transport.fetch(INSTRUCTIONS, back / INSTRUCTIONS)
    return answers.whole(
        found,
        errand,
        outputs=back / OUTPUTS,
        times=back / TIMES if errand.timing is not None else None,
        counts=back / INSTRUCTIONS if count else None,
        address=transport.address,
        emulated=transport.emulated,
    )


def _listener(progress: Progress) -> Callable[[str], None]:
    """Hears the agent's lines. What is no progress, as runtimes print it, is passed over."""

    def line(text: str) -> None:
        try:
            said = json.loads(text)
            stage, done, total = said["stage"], said["done"], said["total"]
        except (ValueError, TypeError, KeyError):
            return
        if isinstance(stage, str) and all(n is None or isinstance(n, int) for n in (done, total)):
            progress(stage[:200], done, total)

    return line


def crashed(finished: Finished) -> str:
    """How an agent ended that could not even say why, in words."""
    number = -finished.code if finished.code < 0 else finished.code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = ""
    last = " ".join(finished.errors.strip().splitlines()[-3:])[:1000]
    said = f" It said: {last}" if last else ""
    if name == "SIGKILL":
        return f"the agent was killed there: the device may have run out of memory.{said}"
    if name:
        return f"the agent crashed there ({name}), most likely in its runtime; try another version of that.{said}"
    if "No module named" in last or "SyntaxError" in last:
        return f"the agent does not start there; it needs Python 3.9 or newer.{said}"
    return f"the agent ended there with exit code {finished.code}, without an answer.{said}"
