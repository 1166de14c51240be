"""Train the demo's two models on scikit-learn's digits and write convert/demo_assets/.

    python benchmarks/train_demo.py

Needs scikit-learn (extra `dev`). Seeded; the same machine and thread count give the same bytes. Writes digits.npz,
digits_cnn.safetensors, digits_vit.safetensors and accuracy.json. The test part is looked at once, at the end.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from convert import demo_assets
from convert.demo_assets import demo_models

SEED = 20
TEST_SAMPLES = 500
EPOCHS = {"digits_cnn": 8, "digits_vit": 45}
LEARNING_RATE = {"digits_cnn": 4e-3, "digits_vit": 1.5e-3}
LARGEST_SHIFT = 3  # pixels of the 32x32 image, each way


def write_digits(path: Path) -> None:
    """Split the 1,797 digits once, at random, and store them as they come (uint8, values 0..16)."""
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    order = np.random.default_rng(SEED).permutation(len(labels))
    test, train = np.sort(order[:TEST_SAMPLES]), np.sort(order[TEST_SAMPLES:])
    np.savez_compressed(
        path,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch [N, 1, 32, 32] by one random offset, background in the gap."""
    down, right = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2,), generator=generator).tolist()
    padded = functional.pad(images, (LARGEST_SHIFT,) * 4, value=-1.0)
    top, left = LARGEST_SHIFT + down, LARGEST_SHIFT + right
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def train(name: str, images: Tensor, labels: Tensor, batch: int = 64) -> nn.Module:
    """Train one model from its seed: AdamW, one cycle of the learning rate, label smoothing."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model: nn.Module = getattr(demo_models, name)().train()
    steps = EPOCHS[name] * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[name], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE[name], total_steps=steps)
    for epoch in range(EPOCHS[name]):
        total = 0.0
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels) - batch + 1, batch):
            chosen = order[start : start + batch]
            logits = model(shifted(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"{name}: epoch {epoch + 1}/{EPOCHS[name]}, loss {total / (len(labels) // batch):.3f}", flush=True)
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1, in [0, 1]."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    write_digits(demo_assets.DIGITS)
    train_part = [torch.from_numpy(a) for a in demo_assets.digits_arrays("train")]
    test_part = [torch.from_numpy(a) for a in demo_assets.digits_arrays("test")]
    results = {}
    for name in demo_assets.MODELS:
        began = time.perf_counter()
        model = train(name, *train_part)
        parameters = {key: value.contiguous() for key, value in sorted(model.state_dict().items())}
        save_file(parameters, demo_assets.weights(name))
        results[name] = {
            "test_accuracy": accuracy(model, *test_part),
            "test_samples": len(test_part[1]),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        print(f"{name}: {results[name]}, {time.perf_counter() - began:.0f} s", flush=True)
    demo_assets.ACCURACY.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
