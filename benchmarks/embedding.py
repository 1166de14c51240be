"""What bits lose against float embeddings of MiniLM in search, and how fast they are searched.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/embedding.py --work FOLDER

Embeds 10,000 sentences of the documentation strings of Python's standard library, converts MiniLM by the recipe
`binary-embedding`, runs the artifact on the same sentences, and writes benchmarks/embedding_results.md. What took
minutes is kept in FOLDER and used again; the numbers of searches are always taken anew.
"""

import argparse
import ast
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import numpy as np
import packed_kernel
import torch

from calibrate.binary_embedding import EmbeddingCode, fit, sign
from calibrate.packed_codes import inverse_norms, neighbours, pack, recall, search

HERE = Path(__file__).parent
COUNT, CALIBRATION, QUERIES, K, RERANKED = 10_000, 2_000, 1_000, 10, 40
TIMED = 64
MARK = "<!-- numbers, as the command writes them -->"
TOKEN_LIMIT = models.TOKENS


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tightfit-embedding")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1: numpy's product is compared with a kernel of one thread")
    options.work.mkdir(parents=True, exist_ok=True)
    tokens = kept(options.work / "tokens.npz", tokenized)
    floats = kept(options.work / "float.npz", lambda: {"x": embedded(tokens)})["x"]
    made = kept(options.work / "artifact.npz", lambda: {"codes": converted(options.work, tokens)})["codes"]
    lines = [*recalls(floats, made), "", *speeds(floats, options.rounds)]
    page = HERE / "embedding_results.md"
    head = page.read_text(encoding="utf-8").split(MARK)[0]
    page.write_text("\n".join([head + MARK, "", *lines, ""]), encoding="utf-8")
    print("\n".join(lines))


def kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `path` holds, or what `make` gives and `path` then holds."""
    if not path.exists():
        print(f"making {path.name}", flush=True)
        np.savez(path, **make())
    with np.load(path) as arrays:
        return dict(arrays)


def docstrings(root: Path) -> Iterator[str]:
    """Every documentation string below `root`, without installed packages."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):  # the tests of the parser itself
            continue
        yield from filter(None, (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, holders)))


def tokenized() -> dict[str, np.ndarray]:
    """Ids and masks [COUNT + CALIBRATION, TOKEN_LIMIT] of distinct sentences, shuffled with seed 0."""
    from tokenizers import Tokenizer

    found: dict[str, None] = {}
    for text in docstrings(Path(sysconfig.get_paths()["stdlib"])):
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                ends = sentence[:1].isupper() and sentence[-1:] in (".", "!", "?")
                if ends and 40 < len(sentence) < 300 and len(sentence.split()) >= 7 and ">>>" not in sentence:
                    found[sentence] = None
    if len(found) < COUNT + CALIBRATION:
        sys.exit(f"this Python's documentation strings have {len(found)} sentences, too few")
    order = np.random.default_rng(0).permutation(len(found))[: COUNT + CALIBRATION]
    texts = list(found)
    tokenizer = Tokenizer.from_file(str(models.minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKEN_LIMIT)
    tokenizer.enable_padding(length=TOKEN_LIMIT)
    encoded = tokenizer.encode_batch([texts[i] for i in order])
    return {
        "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
    }


def embedded(tokens: dict[str, np.ndarray]) -> np.ndarray:
    """Float embeddings float32 [n, 384]; sentences of like length share a batch, which spares padding."""
    model = models.minilm()
    torch.set_num_threads(2)
    lengths = tokens["attention_mask"].sum(1)
    order = np.argsort(lengths, kind="stable")
    made = np.empty((len(order), 384), np.float32)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        inputs = [torch.from_numpy(tokens[k][rows, : lengths[rows].max()]) for k in ("input_ids", "attention_mask")]
        with torch.no_grad():
            made[rows] = model(*inputs).numpy()
    torch.set_num_threads(1)
    return made


def converted(work: Path, tokens: dict[str, np.ndarray]) -> np.ndarray:
    """Codes ±1 float32 [COUNT, 384] of the artifact, made by the command line from the calibration sentences."""
    import onnxruntime

    out = work / "out"
    for part, rows in (("calibration", slice(COUNT, None)), ("evaluation", slice(0, 64))):
        np.savez(work / f"{part}.npz", **{k: v[rows] for k, v in tokens.items()})
    given = ["convert", "models:minilm", "-d", "generic-x86", "--recipe", "binary-embedding", "-o", str(out), "--force"]
    data = [f"--calibration={work / 'calibration.npz'}", f"--evaluation={work / 'evaluation.npz'}"]
    program = "from convert.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    subprocess.run([sys.executable, "-c", program, *given, *data], check=True, env=environment)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(out / "generic-x86" / "minilm.onnx"), settings)
    rows = [{k: v[i : i + 1] for k, v in tokens.items()} for i in range(COUNT)]
    return np.concatenate([session.run(None, row)[0] for row in rows])


def recalls(floats: np.ndarray, made: np.ndarray) -> list[str]:
    """The table of recall@10; fitted on the calibration sentences alone."""
    base, calibration = floats[:COUNT], torch.from_numpy(floats[COUNT:])
    wanted = others(neighbours(base[:QUERIES], base, K + 1), K)
    width = base.shape[1]
    two = fit(calibration, width, planes=2)
    unturned = EmbeddingCode(torch.eye(width).double(), -calibration.double().mean(0), torch.zeros(width), 1)
    halves, scales = base.astype(np.float16), np.abs(base).max(1, keepdims=True) / 127
    eights = np.rint(base / scales) * scales
    rows = torch.from_numpy(base)
    turned = fit(calibration, width).codes(rows).numpy()
    packed = {
        "1 bit, sign alone": pack(sign(rows).numpy()),
        "1 bit, centred": pack(unturned.codes(rows).numpy()),
        "1 bit, centred, random rotation": pack(fit(calibration, width, rounds=0).codes(rows).numpy()),
        "1 bit, centred, ITQ": pack(turned),
    }
    planes = pack(two.codes(rows).numpy())
    table = [
        ("float16", 2 * width, others(neighbours(halves[:QUERIES], halves, K + 1), K)),
        ("int8, a scale per vector", width + 4, others(neighbours(eights[:QUERIES], eights, K + 1), K)),
        *((label, codes.shape[1], bit_search(codes, K)) for label, codes in packed.items()),
        ("2 planes, ITQ", planes.shape[1], bit_search(planes, K, 2)),
        (
            f"1 bit, centred, ITQ, the top {RERANKED} again in float",
            width // 8,
            reranked(packed["1 bit, centred, ITQ"], base),
        ),
        ("1 bit from the artifact (int8 model)", width // 8, bit_search(pack(made), K)),
    ]
    lines = ["| stored | bytes per vector | recall@10 |", "|---|---|---|", f"| float32 | {4 * width} | 1 |"]
    return lines + [f"| {label} | {size} | {recall(found, wanted):.3f} |" for label, size, found in table]


def others(ids: np.ndarray, k: int) -> np.ndarray:
    """Neighbours [n, k + 1] without the query itself, which is row i of the base."""
    return np.stack([row[row != i][:k] for i, row in enumerate(ids)])


def bit_search(packed: np.ndarray, k: int, planes: int = 1) -> np.ndarray:
    return others(search(packed[:QUERIES], packed, k + 1, planes)[0], k)


def reranked(packed: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The best by cosine in float of the first RERANKED that the codes find."""
    found = bit_search(packed, RERANKED)
    scores = np.einsum("qd,qkd->qk", base[:QUERIES].astype(np.float64), base[found].astype(np.float64))
    return np.take_along_axis(found, np.argsort(-scores, axis=1, kind="stable")[:, :K], 1)


def speeds(floats: np.ndarray, rounds: int) -> list[str]:
    """Queries per second of one thread: the kernel beside numpy's float32 product, taken in turns."""
    base, calibration = floats[:COUNT], torch.from_numpy(floats[COUNT:])
    queries = base[:TIMED]
    calls: dict[str, Callable[[], object]] = {
        "numpy float32, one query at a time": lambda: [float_search(q[None], base) for q in queries],
        f"numpy float32, {TIMED} queries at once": lambda: float_search(queries, base),
    }
    with tempfile.TemporaryDirectory() as folder:
        kernel, flags = packed_kernel.compiled(Path(folder))
        for planes in (1, 2):
            codes = pack(fit(calibration, base.shape[1], planes).codes(torch.from_numpy(base)).numpy())
            found, wanted = kernel(codes[:TIMED], codes, K, planes), search(codes[:TIMED], codes, K, planes)
            if not all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)):
                sys.exit("the kernel finds other neighbours than numpy")
            norms = inverse_norms(codes, planes)
            word = "1 bit" if planes == 1 else "2 planes"
            calls[f"packed kernel, {word}"] = lambda c=codes, p=planes, n=norms: kernel(c[:TIMED], c, K, p, n)
            calls[f"numpy search(), {word}"] = lambda c=codes, p=planes: search(c[:TIMED], c, K, p)
        taken = medians(calls, rounds)
    reference = taken["numpy float32, one query at a time"]
    lines = [f"Searched among {COUNT:,}, best {K}, one thread; {flags}.", ""]
    lines += ["| search | queries per second | x float, one at a time |", "|---|---|---|"]
    return lines + [f"| {n} | {TIMED / t:,.0f} | {reference / t:.1f} |" for n, t in taken.items()]


def float_search(queries: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Float32 scores, the best K sorted: the usual numpy search of unit vectors."""
    scores = queries @ base.T
    best = np.argpartition(-scores, K, axis=1)[:, :K]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds per call, the median over rounds that each time every call once."""
    taken: dict[str, list[float]] = {label: [] for label in calls}
    for number in range(rounds + 1):
        for label, call in calls.items():
            start = time.thread_time()
            call()
            if number:  # the first warms up
                taken[label].append(time.thread_time() - start)
    return {label: statistics.median(times) for label, times in taken.items()}


if __name__ == "__main__":
    main()
