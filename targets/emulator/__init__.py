"""Emulated boards: their system from Debian and PyPI packages in a cache folder, and what counts instructions."""
