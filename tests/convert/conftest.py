"""Makes `made_reports` importable in every test below this folder (pytest puts a conftest's folder on the path)."""
