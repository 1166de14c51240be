"""Emulated boards: their system from Debian and PyPI packages in a cache folder, and what counts instructions."""

from targets.emulator.board import boards
from targets.emulator.building import build
from targets.emulator.machine import Machine, find, is_built, login_command

__all__ = ["Machine", "boards", "build", "find", "is_built", "login_command"]
