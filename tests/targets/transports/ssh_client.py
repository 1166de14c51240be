"""What tests of sessions by ssh share: their patience, a program that hides, another process that is the client."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ssh_server import SshServer

from targets.transports._ssh_connection import Patience

# For what shall give up.
SHORT = Patience(connect=5, greet=20, beat=0.2, silence=2, grace=3, close=10)
# For what shall succeed: a login takes seconds, of which a busy machine makes many, an emulated board more.
PATIENT = Patience(connect=20, greet=90, beat=0.5, silence=20, grace=60, close=20)
ROOT = Path(__file__).resolve().parents[3]
# Hides as a daemon does: a session of its own, no parent, deaf to polite signals.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        time.sleep(600)
    os._exit(0)
os.wait()
print("started", flush=True)
time.sleep(float(sys.argv[1]))
"""


def big(path: Path, size: int = 6 << 20) -> Path:
    path.write_bytes(os.urandom(size))
    return path


@contextlib.contextmanager
def client(server: SshServer, patience: Patience = SHORT) -> Iterator[subprocess.Popen[str]]:
    """Another Python that runs the daemon by the transport, once that has started; killed in the end."""
    program = (
        "import sys\n"
        "from targets.transports._ssh_connection import Patience\n"
        "from targets.transports.ssh import SshTransport\n"
        f"device = SshTransport({server.address()!r}, {patience!r})\n"
        "try:\n"
        "    device.open()\n"
        "    show = lambda text: print(text, flush=True)\n"
        f"    device.run([*device.python, '-c', {DAEMON!r}, '600'], seconds=600, line=show)\n"
        "finally:\n"
        "    device.close()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == "started\n"
        yield child
    finally:
        child.kill()
        child.wait()
