"""Makes `operator_cases` importable in the tests of this folder (pytest puts a conftest's folder on the path)."""
