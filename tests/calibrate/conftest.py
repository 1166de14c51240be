"""Makes `small_graphs` importable in every test below this folder (pytest puts a conftest's folder on the path)."""

import torch

torch.set_num_threads(1)
