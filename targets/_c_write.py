"""A `Program` as a folder of C sources."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ._c_program import Call, Constant, Program, Struct, Tensor

KERNELS = "targets.c_kernels"
ALWAYS = ("kernels.h", "driver.c")
FILES = ("int8.c", "binary.c", "floats.c", "moves.c")
LINE = 118
TYPES = {"float": "float", "int8_t": "int8_t", "int64_t": "int64_t", "int32_t": "int32_t"}


def write(program: Program, path: Path) -> None:
    """Write the folder `path`: the model, the kernels it uses, a Makefile, a driver, README and manifest."""
    path.mkdir(parents=True, exist_ok=True)
    used = _files(program)
    for name in (*ALWAYS, *used):
        (path / name).write_text(_kernel(name), encoding="utf-8")
    (path / "weights.h").write_text(_weights(program), encoding="utf-8")
    (path / "model.h").write_text(_header(program), encoding="utf-8")
    (path / "model.c").write_text(_model(program), encoding="utf-8")
    (path / "Makefile").write_text(_makefile(used), encoding="utf-8")
    (path / "manifest.json").write_text(json.dumps(_manifest(program, used), indent=1) + "\n", encoding="utf-8")
    (path / "README.md").write_text(_readme(program, used), encoding="utf-8")


def _kernel(name: str) -> str:
    return resources.files(KERNELS).joinpath(name).read_text(encoding="utf-8")


def _files(program: Program) -> list[str]:
    """The kernel files that define what the program calls, and what those call in turn."""
    texts = {name: _kernel(name) for name in FILES}
    wanted = {call.kernel for call in program.calls}
    used = [name for name in FILES if any(re.search(rf"^void {k}\(", texts[name], re.MULTILINE) for k in wanted)]
    if "binary.c" in used and "int8.c" not in used:
        used.insert(0, "int8.c")  # tf_write
    return used


def number(value: Any) -> str:
    """A number as C reads it back to the last bit: floats in hexadecimal."""
    if isinstance(value, np.floating | float):
        single = float(np.float32(value))
        if np.isnan(single):
            return "(0.0f / 0.0f)"
        if np.isinf(single):
            return "INFINITY" if single > 0 else "-INFINITY"
        mantissa, _, exponent = single.hex().partition("p")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}p{exponent}f"
    return str(int(value))


def elements(constant: Constant) -> list[str]:
    """The numbers of an array, as C reads them."""
    values = constant.values.reshape(-1)
    if constant.ctype == "float":
        return [number(v) for v in values]
    if constant.ctype == "uint64_t":
        return [f"0x{v:016x}" for v in values.tolist()]
    if constant.ctype == "int64_t":
        return [f"INT64_C({v})" if v > -(2**63) else "INT64_MIN" for v in values.tolist()]
    return [str(v) for v in values.tolist()]


def _array(constant: Constant) -> str:
    numbers = elements(constant) + ["0"] * constant.tail
    lines, line = [], ""
    for text in numbers:
        if len(line) + len(text) + 1 > LINE:
            lines.append(line)
            line = ""
        line += f"{text},"
    body = "\n".join([*lines, line])
    about = f"/* {constant.role} of {_comment(constant.layer)}, shape {list(constant.values.shape)} */\n"
    head = f"static const {constant.ctype} {constant.name}[{len(numbers)}]"
    return f"{about if constant.layer else ''}{head} = {{\n{body}\n}};\n"


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("\n", " ")


def _weights(program: Program) -> str:
    total = program.constant_bytes
    head = f"/* The constants of {_comment(program.name)}: {total:,} bytes when compiled. Made by Tightfit. */\n"
    return head + "#include <math.h>\n#include <stdint.h>\n\n" + "\n".join(_array(c) for c in program.constants)


def _field(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, Constant):
        return value.name
    if isinstance(value, Struct):
        return _fields(value)
    if isinstance(value, list | tuple):
        return "{" + ", ".join(number(v) for v in value) + "}"
    return value if isinstance(value, str) else number(value)


def _fields(struct: Struct) -> str:
    kept = {k: v for k, v in struct.fields.items() if v is not None}
    return "{" + ", ".join(f".{k} = {_field(v)}" for k, v in kept.items()) + "}"


def _place(tensor: Tensor, const: bool) -> str:
    if isinstance(tensor.home, Constant):
        return tensor.home.name
    pointer = f"{'const ' if const else ''}{tensor.ctype} *"
    if tensor.home.argument is not None:
        return f"({pointer})inputs[{tensor.home.argument}]"
    return f"({pointer})(arena.bytes + {tensor.home.offset})"


def _call(call: Call) -> str:
    words = []
    tensors = [a for a in call.arguments if isinstance(a, Tensor)]
    for argument in call.arguments:
        if isinstance(argument, Tensor):
            words.append(_place(argument, argument is not tensors[-1]))
        elif isinstance(argument, Struct):
            words.append(f"&{argument.name}")
        elif argument == "scratch":
            words.append("scratch.bytes")
        else:
            words.append(_field(argument))
    return f"    {call.kernel}({', '.join(words)}); /* {_comment(call.layer)} */\n"


def _model(program: Program) -> str:
    structs = "".join(f"static const {s.ctype} {s.name} = {_fields(s)};\n" for s in program.structs)
    calls = "".join(_call(c) for c in program.calls)
    results = "".join(
        f"    memcpy(outputs[{i}], {_place(tensor, True)}, {tensor.bytes});\n"
        for i, (_, tensor) in enumerate(program.outputs)
    )
    sizes = "".join(
        f"const size_t model_{word}_bytes[] = {{{', '.join(str(t.bytes) for t in tensors) or '0'}}};\n"
        for word, tensors in (
            ("input", [t for _, t, _ in program.inputs]),
            ("output", [t for _, t in program.outputs]),
        )
    )
    # A union with doubles: what lies in the arena may be read as any type of 8 bytes or less.
    memory = "".join(
        f"static union {{ int64_t align[{max(size, 1) // 8 + 1}]; int8_t bytes[{max(size, 1)}]; }} {name} TF_ALIGNED;\n"
        for name, size in (("arena", program.arena), ("scratch", program.scratch))
    )
    return f"""/* {_comment(program.name)}, made by Tightfit. The order of calls is the order of the layers. */
#include <string.h>

#include "kernels.h"
#include "model.h"
#include "weights.h"

#if defined(__GNUC__)
#define TF_ALIGNED __attribute__((aligned(64)))
#else
#define TF_ALIGNED
#endif

{sizes}
{memory}
{structs}
void model_run(const void *const *inputs, void *const *outputs)
{{
    (void)inputs;
    (void)scratch;
{calls}{results}}}
"""


def _header(program: Program) -> str:
    lines = [
        f"   inputs[{i}]: {_comment(name)}, {dtype} {list(tensor.shape)}"
        for i, (name, tensor, dtype) in enumerate(program.inputs)
    ]
    lines += [
        f"   outputs[{i}]: {_comment(name)}, {TYPES[tensor.ctype]} {list(tensor.shape)}"
        for i, (name, tensor) in enumerate(program.outputs)
    ]
    total_in = sum(t.bytes for _, t, _ in program.inputs)
    total_out = sum(t.bytes for _, t in program.outputs)
    about = "\n".join(lines)
    return f"""/* {_comment(program.name)}, made by Tightfit.
 *
 * model_run reads one batch and writes its outputs, arrays in C order that the caller owns:
{about}
 * It keeps its intermediate values in static memory: one call at a time.
 */
#ifndef TF_MODEL_H
#define TF_MODEL_H

#include <stddef.h>
#include <stdint.h>

#define MODEL_INPUTS {len(program.inputs)}
#define MODEL_OUTPUTS {len(program.outputs)}
#define MODEL_INPUT_BYTES {total_in}
#define MODEL_OUTPUT_BYTES {total_out}

extern const size_t model_input_bytes[];
extern const size_t model_output_bytes[];

void model_run(const void *const *inputs, void *const *outputs);

#endif
"""


def _makefile(used: list[str]) -> str:
    return f"""# make                                   for this machine
# make CC=aarch64-linux-gnu-gcc ARCH=    for another, with what its compiler assumes
CC ?= cc
ARCH ?= -march=native
CFLAGS ?= -O3
# Sums and roundings are exact only without fused multiply-adds that the source does not name.
REQUIRED = -std=c99 -ffp-contract=off
SOURCES = model.c {" ".join(used)}

driver: $(SOURCES) driver.c model.h weights.h kernels.h
\t$(CC) $(CFLAGS) $(ARCH) $(REQUIRED) $(SOURCES) driver.c -o $@ -lm

clean:
\trm -f driver
"""


def _manifest(program: Program, used: list[str]) -> dict[str, Any]:
    return {
        "version": 1,
        "name": program.name,
        "sources": ["model.c", *used],
        "inputs": [{"name": n, "shape": list(t.shape), "dtype": d} for n, t, d in program.inputs],
        "outputs": [
            {"name": n, "shape": list(t.shape), "dtype": {"float": "float32"}.get(t.ctype, t.ctype.removesuffix("_t"))}
            for n, t in program.outputs
        ],
        "constant_bytes": program.constant_bytes,
        "arena_bytes": program.arena,
        "scratch_bytes": program.scratch,
    }


def _readme(program: Program, used: list[str]) -> str:
    libm = "The float layers call the mathematics library (-lm)." if "floats.c" in used else "No library is needed."
    return f"""# {program.name}, as C99

Made by Tightfit. `make` builds `driver`, which runs samples from standard input; in a program of your own call
`model_run` of `model.h` and compile {", ".join(f"`{n}`" for n in ("model.c", *used))} with
`-std=c99 -ffp-contract=off`.

| memory | bytes |
|---|---|
| constants (flash) | {program.constant_bytes:,} |
| values between layers (static) | {program.arena:,} |
| scratch of the kernels (static) | {program.scratch:,} |

Nothing is allocated at run time. {libm} Kernels use AVX2, AVX-512 (VPOPCNTDQ) or NEON where the compiler says that
the machine has them, else portable C. Layers on codes give the same bits everywhere.
"""
