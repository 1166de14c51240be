"""What ssh says when it does not get through, in a paragraph: the cause, and what to do next."""

import re
from collections.abc import Sequence

from targets.errors import MissingRuntime, TargetError
from targets.transports._ssh_address import Address
from targets.transports._ssh_boot import OLDEST
from targets.transports._ssh_frames import NO_PYTHON, OLD_PYTHON

KEY = re.compile(r"debug1: Server host key: (\S+ \S+)")
SERVER = re.compile(r"debug1: Remote protocol version [0-9.]+, remote software version (.+)")


def host_key(said: Sequence[str]) -> str | None:
    """Type and fingerprint of the key that the last host on the way presented."""
    return _last(KEY, said)


def server(said: Sequence[str]) -> str | None:
    """The name and version of the server."""
    return _last(SERVER, said)


def _last(pattern: re.Pattern[str], said: Sequence[str]) -> str | None:
    found = [match[1] for text in said if (match := pattern.match(text))]
    return found[-1].strip() if found else None


def plain(said: Sequence[str]) -> list[str]:
    """What ssh and the device wrote to stderr, without what -v adds."""
    noise = re.compile(r"debug\d: |OpenSSH_|Authenticated to |Transferred: |Bytes per second: |Authenticating to ")
    return [text for text in said if text.strip() and not noise.match(text)]


def refused(address: Address, said: Sequence[str], printed: bytes, seconds: float) -> TargetError:
    """Why no session came about: `said` on stderr, `printed` on stdout. `seconds`: how long it was waited for."""
    where, by_hand = address.name, f"ssh {address.login} python3 --version"
    text = "\n".join(plain(said))
    if NO_PYTHON in printed:
        return _no_python(address)
    if OLD_PYTHON in printed:
        version = printed.partition(OLD_PYTHON)[2].split()[0].decode("utf-8", "replace")
        return MissingRuntime(
            f"the Python on '{where}' is {version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed. If a newer one is "
            "installed there, give its path in the address: ssh://host/path/to/python."
        )
    for sign, make in _CAUSES:
        if re.search(sign, text):
            return make(address, said, text)
    told = _one_line("\n".join([*plain(said)[-5:], printed.decode("utf-8", "replace")[-300:]]))
    what = f"It said: {told}" if told else f"It said nothing within {seconds:g} s."
    return TargetError(
        f"logging in to '{where}' did not start a session. {what} See whether `{by_hand}` works "
        "by hand; the login shell must run commands and print nothing but their output."
    )


def _no_python(address: Address) -> TargetError:
    wanted = f"'{address.python}' is not there" if address.python else "there is no python3 on its PATH"
    return MissingRuntime(
        f"the device '{address.name}' has no Python to run with: {wanted}. Install it (Debian, Raspberry Pi OS: "
        "apt-get install python3), or give the path in the address: ssh://host/home/pi/venv/bin/python."
    )


def _unknown_name(address: Address, said: Sequence[str], text: str) -> TargetError:
    return TargetError(
        f"the name '{address.host}' means no machine: {_sentence(text, 'resolve')} See the spelling and that the "
        "device is on; on a home network its address (ssh://192.168.…) may do where its name, or name.local, does not."
    )


def _no_way(address: Address, said: Sequence[str], text: str) -> TargetError:
    return TargetError(
        f"'{address.name}' does not answer: {_one_line(text)} See that the device is on and in the same network, "
        "that ssh is enabled on it (Raspberry Pi: raspi-config, Interface Options, SSH), and that host and port are "
        "right."
    )


def _no_key(address: Address, said: Sequence[str], text: str) -> TargetError:
    unsafe = (
        " A private key is not used because others may read its file: chmod 600 it." if "UNPROTECTED" in text else ""
    )
    return TargetError(
        f"'{address.name}' refused the login: {_sentence(text, 'Permission denied|Too many auth')}{unsafe} No "
        "password is ever asked for here: a key must do. See the user's name, put your key there with `ssh-copy-id "
        f"{address.login}`, or name the key to use under `Host {address.host}` in ~/.ssh/config (IdentityFile); a key "
        "with a passphrase must be in the agent (ssh-add)."
    )


def _unknown_key(address: Address, said: Sequence[str], text: str) -> TargetError:
    key = host_key(said)
    shown = f" It shows the key {key}." if key else ""
    return TargetError(
        f"the host key of '{address.name}' is not known here, so nothing tells whether it is your device.{shown} "
        "Compare with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` (or the file of that type) prints on the "
        f"device itself, then take it on: run `ssh {address.login}` once and answer yes, or `ssh-keyscan"
        f"{f' -p {address.port}' if address.port else ''} {address.host} >> ~/.ssh/known_hosts`."
    )


def _changed_key(address: Address, said: Sequence[str], text: str) -> TargetError:
    key = host_key(said)
    shown = f" It shows {key}." if key else ""
    known = re.search(r"Offending \S+ key in (\S+?):?(\d*)$", text, re.MULTILINE)
    stored = f" (line {known[2]} of {known[1]})" if known and known[2] else ""
    name = f"[{address.host}]:{address.port}" if address.port else address.host
    told = re.search(r"^ *(ssh-keygen .*-R .*)$", text, re.MULTILINE)
    forget = told[1] if told else f"ssh-keygen -R '{name}'"
    return TargetError(
        f"the host key of '{address.name}' is NOT the one stored for it{stored}.{shown} Either the device was set up "
        "anew, or somebody is between you and it and would read and change what is sent: nothing was sent. Only if you "
        f"know that it was set up anew, forget the old key with `{forget}`, run `ssh {address.login}` "
        "once, and compare the fingerprint that it shows with the device's own."
    )


def _configuration(address: Address, said: Sequence[str], text: str) -> TargetError:
    return TargetError(f"ssh does not accept its configuration: {_one_line(text)} Mend that file, then run again.")


# In this order: a changed key also fails the verification, a broken key file also ends in a denied permission.
_CAUSES = (
    (r"Bad configuration option|terminating, \d+ bad|Bad owner or permissions|Can't open user config", _configuration),
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|HOST IDENTIFICATION HAS CHANGED", _changed_key),
    (r"key is known for .* strict checking|Host key verification failed", _unknown_key),
    (r"Could not resolve hostname", _unknown_name),
    (r"Permission denied|Too many authentication failures|No more authentication methods", _no_key),
    (
        r"Connection refused|timed out|No route to host|Network is unreachable|Connection (closed|reset) by|"
        r"Connection to .* (closed|timeout)|kex_exchange_identification|Host is down",
        _no_way,
    ),
)


def _sentence(text: str, sign: str) -> str:
    return _one_line("\n".join(line for line in text.splitlines() if re.search(sign, line)))


def _one_line(text: str) -> str:
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return joined if not joined or joined.endswith(".") else joined + "."
