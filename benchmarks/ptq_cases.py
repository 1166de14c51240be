"""The cases of `ptq.py`: models, runtimes and goals, the reasons where a goal is missed, and the peers' converters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers import Samples, ai_edge_dynamic, ai_edge_static, one_by_one, onnxruntime_dynamic, onnxruntime_static


@dataclass(frozen=True)
class Case:
    """A model in a runtime: what Tightfit is asked for, which peers there are, and what is to be reached.

    `metric`: "sqnr" (dB), "cosine" (mean over samples) or "agreement" (share of equal top-1); at least `goal`.
    `ratio`: CPU time over float's, at most; `mib`: size on disk, at most.
    """

    name: str
    model: str
    target: str
    recipe: str
    metric: str
    goal: float | None
    ratio: float | None = None
    mib: float | None = None
    peers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    device: str = "x86"  # generic-x86, or generic-x86-vnni where this machine has the instructions
    why: str = ""  # the reason printed where a goal was missed


PLAIN = "float, plain export"
ORT = (PLAIN, "onnxruntime static U8S8", "onnxruntime static S8S8", "onnxruntime dynamic per channel", "nncf static")
ORT_T = (*ORT[:4], "nncf static, transformer")
LITERT = (PLAIN, "ai-edge-quantizer static", "ai-edge-quantizer dynamic")
NO_VNNI = (
    "without VNNI, ONNX Runtime adds pairs of products in 16 bits: weights get 7 bits so that nothing saturates, which "
    "costs drift (the row for VNNI has all 8), and integer kernels gain less than on the processor the goal comes from"
)
LITERT_X86 = (
    "LiteRT's int8 kernels gain little on AVX2 (the peer's own file shows the same ratio); goals come from AVX512-VNNI"
)
CASES = (
    Case("ResNet-20 int8, ONNX Runtime", "resnet20", "onnx", "auto", "sqnr", 33.0, 0.60, peers=ORT, why=NO_VNNI),
    Case("ResNet-20 int8, ONNX Runtime with VNNI", "resnet20", "onnx", "auto", "sqnr", 33.0, device="generic-x86-vnni"),
    Case("ResNet-20 int8, LiteRT", "resnet20", "tflite", "auto", "sqnr", 33.0, 0.34, peers=LITERT, why=LITERT_X86),
    Case("ViT int8, ONNX Runtime", "vit", "onnx", "auto", "sqnr", None, 0.70, peers=ORT_T, why=NO_VNNI),
    Case("ViT int8, LiteRT", "vit", "tflite", "auto", "sqnr", None, 0.45, peers=LITERT, why=LITERT_X86),
    Case("MiniLM int8, ONNX Runtime", "minilm", "onnx", "auto", "cosine", 0.998, 0.53, peers=ORT_T, why=NO_VNNI),
    Case("MiniLM int8, ONNX Runtime with VNNI", "minilm", "onnx", "auto", "cosine", 0.998, device="generic-x86-vnni"),
    Case("MiniLM int8, LiteRT", "minilm", "tflite", "auto", "cosine", 0.9985, 0.27, peers=LITERT, why=LITERT_X86),
    Case("DeiT-tiny int8, ONNX Runtime", "deit", "onnx", "auto", "sqnr", None, 0.62,
         peers=(PLAIN, ORT[3]), why=NO_VNNI),
    Case("DeiT-tiny int8, LiteRT", "deit", "tflite", "auto", "sqnr", None, 0.45,
         peers=(PLAIN, LITERT[2]), why=LITERT_X86),
    Case("ResNet-20 W4A8, ONNX Runtime", "resnet20", "onnx", "w4a8", "agreement", 0.97),
    Case("ResNet-20 W4A8, LiteRT", "resnet20", "tflite", "w4a8", "agreement", 0.97),
    Case("MiniLM 4-bit weights, ONNX Runtime", "minilm", "onnx", "w4", "cosine", 0.985, mib=12,
         peers=(PLAIN, "hqq 4 bits")),
    Case("MiniLM 4-bit weights, LiteRT", "minilm", "tflite", "w4a8", "cosine", 0.985, mib=12,
         peers=(PLAIN, "ai-edge-quantizer dynamic 4 bits")),
)  # fmt: skip


def onnxruntime_u8s8(twin: Path, samples: Samples, path: Path) -> None:
    """Static int8 with unsigned activations, weights per channel."""
    from onnxruntime.quantization import QuantType

    onnxruntime_static(twin, samples, path, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def onnxruntime_per_channel(twin: Path, samples: Samples, path: Path) -> None:
    """Dynamic int8 with signed weights per channel."""
    from onnxruntime.quantization import QuantType

    onnxruntime_dynamic(twin, samples, path, per_channel=True, weight_type=QuantType.QInt8)


def nncf_static(twin: Path, samples: Samples, path: Path, transformer: bool = False) -> None:
    """NNCF's static int8; for a transformer with the scheme its documentation names (SmoothQuant among others)."""
    import nncf
    import onnx

    feeds = list(one_by_one(samples))
    kinds = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    onnx.save(nncf.quantize(onnx.load(twin), nncf.Dataset(feeds), subset_size=len(feeds), **kinds), path)


def nncf_transformer(twin: Path, samples: Samples, path: Path) -> None:
    """NNCF's static int8 for transformers."""
    nncf_static(twin, samples, path, transformer=True)


def hqq(twin: Path, samples: Samples, path: Path) -> None:
    """ONNX Runtime's 4-bit weights in blocks of 32, by HQQ."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

    work = MatMulNBitsQuantizer(onnx.load(twin), algo_config=HQQWeightOnlyQuantConfig(block_size=32, bits=4))
    work.process()
    work.model.save_model_to_file(str(path))


def ai_edge_dynamic4(twin: Path, samples: Samples, path: Path) -> None:
    """4-bit weights, activations quantized at run time."""
    from ai_edge_quantizer import quantizer, recipe

    path.write_bytes(quantizer.Quantizer(str(twin), recipe.dynamic_wi4_afp32()).quantize().quantized_model)


def float_as_exported(twin: Path, samples: Samples, path: Path) -> None:
    """The float model itself, as PyTorch or LiteRT Torch writes it."""
    path.write_bytes(twin.read_bytes())


PEERS: dict[str, Callable[[Path, Samples, Path], None]] = {
    "float, plain export": float_as_exported,
    "onnxruntime static S8S8": onnxruntime_static,
    "onnxruntime static U8S8": onnxruntime_u8s8,
    "onnxruntime dynamic per channel": onnxruntime_per_channel,
    "nncf static": nncf_static,
    "nncf static, transformer": nncf_transformer,
    "hqq 4 bits": hqq,
    "ai-edge-quantizer static": ai_edge_static,
    "ai-edge-quantizer dynamic": ai_edge_dynamic,
    "ai-edge-quantizer dynamic 4 bits": ai_edge_dynamic4,
}
