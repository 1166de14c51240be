"""Which tokens of a few samples survive, cut by cut: facts for the report."""

import base64
import io
from collections.abc import Iterator

import numpy as np

from calibrate.graph import run
from calibrate.samples import Array, Batch, CalibrationSet
from convert.compress import batch_size, tensors
from convert.pruning import Pruned
from convert.report import schema

SAMPLES = 4
# Pixels of the longer side of a sample's picture.
PIXELS = 112


def token_facts(pruned: Pruned, data: CalibrationSet) -> schema.TokenFacts:
    """What was removed where, and what became of the tokens of the first samples of `data`."""
    schedule = pruned.schedule
    counts = [schedule.tokens, *(keep for _, keep in schedule.cuts)]
    return schema.TokenFacts(
        method=pruned.pruner.name,
        form=pruned.form,
        protected=pruned.pruner.protected,
        tokens=schedule.tokens,
        share=schedule.share,
        per_block=schedule.leaving,
        cuts=tuple(
            schema.TokenCut(layer=layer, block=block + 1, before=before, after=keep)
            for layer, (block, keep), before in zip(pruned.layers, schedule.cuts, counts, strict=False)
        ),
        changed=pruned.scored.drop,
        samples=tuple(_samples(pruned, data)) if schedule.cuts else (),
    )


def _samples(pruned: Pruned, data: CalibrationSet) -> Iterator[schema.TokenSample]:
    captured = pruned.captured
    batch = next(iter(data.batches(batch_size(captured, SAMPLES))))
    graph = pruned.pruner.graph(pruned.schedule, traced=True)
    origins = run(graph, tensors(batch, captured.inputs))[len(captured.outputs) :]
    became = [_became(origin.numpy()) for origin in origins]
    for index in range(min(SAMPLES, len(became[0]))):
        pixels = _pixels(batch, index)
        grid = None if pixels is None else _grid(pixels, pruned.schedule.tokens, pruned.pruner.protected)
        yield schema.TokenSample(
            became=tuple(tuple(int(v) for v in cut[index]) for cut in became),
            grid=grid,
            image=_png(pixels) if pixels is not None and grid else None,
        )


def _became(origin: Array) -> Array:
    """From shares [B, K, N] of N tokens in K to the place that holds most of each, [B, N]; -1: none has any."""
    return np.where(origin.max(1) > 0, origin.argmax(1), -1)


def _pixels(batch: Batch, index: int) -> Array | None:
    """The sample's image [H, W, C], 0 to 1, where an input is one."""
    for value in batch.values():
        if value.ndim == 4 and value.shape[1] in (1, 3) and np.issubdtype(value.dtype, np.floating):
            image = value[index].transpose(1, 2, 0).astype(np.float64)
            low, high = image.min(), image.max()
            return (image - low) / (high - low) if high > low else image * 0
    return None


def _grid(pixels: Array, tokens: int, protected: int) -> tuple[int, int] | None:
    """Rows and columns of the patches behind the tokens in front; None where the numbers do not fit."""
    height, width = pixels.shape[:2]
    for front in dict.fromkeys((protected, 0, 1, 2, 5)):
        count = tokens - front
        rows = round((max(count, 1) * height / width) ** 0.5)
        if rows and count % rows == 0 and height % rows == 0 and height // rows * (count // rows) == width:
            return rows, count // rows
    return None


def _png(pixels: Array) -> str:
    from PIL import Image

    values = (pixels * 255).round().astype(np.uint8)
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    scale = PIXELS / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    image.save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()
