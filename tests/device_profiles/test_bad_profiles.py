"""A wrong profile is refused with file, line, field and a next step."""

from pathlib import Path

import pytest

import device_profiles
from device_profiles import ProfileError

GOOD = """\
# My board
version = 1
name = "my-board"
title = "My board"
family = "Mine"
summary = "A board on my desk."
default_target = "tflite"

[cpu]
arch = "aarch64"
model = "Cortex-A55"
cores = 4
dotprod = true

[reach]
transports = ["ssh"]

[targets.onnx]
opset = 17
quantize_inputs = [
  "conv",
  "linear",
]

[targets.tflite.fixed_output]
softmax = { scale = 0.00390625, zero_point = -128 }

[[targets.tflite.unsupported]]
op = "topk"
reason = "not there"

[[targets.tflite.unsupported]]
op = "sort"
reason = "not there either"

[sources]
cpu = "the maker's data sheet"
"targets.onnx" = "unverified: a guess"
"targets.tflite" = "unverified: a guess"
"""


def refusal(folder: Path, old: str, new: str) -> str:
    """The message for the good profile with one change."""
    assert GOOD.count(old) == 1, f"the change must hit one place: {old!r}"
    path = folder / "my-board.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ProfileError) as refused:
        device_profiles.load(str(path))
    return str(refused.value)


def test_a_users_own_board_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my-board.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    profile = device_profiles.load("./my-board.toml")
    assert profile.cpu.cores == 4
    assert profile.rules("onnx").opset == 17
    assert profile.rules("onnx").quantize_inputs == ("conv", "linear")
    assert [limit.op for limit in profile.rules("tflite").unsupported] == ["topk", "sort"]
    assert set(profile.rules("tflite").fixed_output) == {"softmax", "sigmoid", "tanh", "log_softmax"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("cores = 4", "coers = 4", "my-board.toml, line 12, cpu.coers: unknown field 'coers'; did you mean 'cores'?"),
        ("opset = 17", 'opset = "x"', "my-board.toml, line 19, targets.onnx.opset: expected an integer, got 'x'."),
        ("cores = 4", "cores = true", "my-board.toml, line 12, cpu.cores: expected an integer, got True."),
        (
            "dotprod = true",
            'dotprod = "yes"',
            "my-board.toml, line 13, cpu.dotprod: expected true or false",
        ),
        (
            '"aarch64"',
            '"arm64"',
            "my-board.toml, line 10, cpu.arch: expected one of aarch64, armv7, riscv64, x86_64",
        ),
        ('  "linear",', '  "liner",', "my-board.toml, line 22, targets.onnx.quantize_inputs[1]: expected one of "),
        ('op = "sort"', 'op = "sorted"', "my-board.toml, line 33, targets.tflite.unsupported[1].op: expected one of "),
        (
            "zero_point = -128",
            "zero = -128",
            "my-board.toml, line 26, targets.tflite.fixed_output.softmax.zero: unk",
        ),
        (
            "softmax = {",
            "softmaxx = {",
            "my-board.toml, line 26, targets.tflite.fixed_output.softmaxx: expected",
        ),
        (
            "[targets.onnx]",
            "[targets.onxn]",
            "my-board.toml, line 18, targets.onxn: there is no target 'onxn'; did",
        ),
        (
            'get = "tflite"',
            'get = "tfl"',
            "my-board.toml, line 7, default_target: there is no target 'tfl'; did",
        ),
        ('title = "My board"\n', "", "my-board.toml, line 1, title: this field is required."),
        (
            "opset = 17",
            "opset = 12",
            "my-board.toml, line 19, targets.onnx.opset: Input should be greater",
        ),
        ("version = 1", "version = 2", "my-board.toml, line 2, version: expected one of 1, got 2"),
        ('"my-board"', '"../../up"', "my-board.toml, line 3, name: String should match pattern"),
        ("[reach]", "[reach", "my-board.toml, line 15: not valid TOML:"),
        ('"ssh"]', '"telnet"]', "my-board.toml, line 16, reach.transports[0]: expected one of local, ssh, adb"),
        ("opset = 17", 'target = "onnx"', "my-board.toml, line 19, targets.onnx.target: the table says it"),
    ],
    ids=lambda text: text.strip()[:30] if isinstance(text, str) else None,
)
def test_a_bad_field_is_named_with_file_line_and_field(tmp_path: Path, old: str, new: str, told: str):
    assert refusal(tmp_path, old, new).startswith(told)


def test_a_misspelt_word_gets_the_nearest_one(tmp_path: Path):
    assert refusal(tmp_path, '  "linear",', '  "liner",').endswith("did you mean 'linear'?")
    assert refusal(tmp_path, "[targets.onnx]", "[targets.onxn]").endswith("did you mean 'onnx'?")


def test_a_fact_without_a_source_is_refused(tmp_path: Path):
    told = refusal(tmp_path, 'cpu = "the maker\'s data sheet"\n', "")
    assert told.startswith('my-board.toml, line 10, cpu.arch: no source; add "cpu.arch"')


def test_an_overridden_rule_without_a_source_is_refused(tmp_path: Path):
    told = refusal(tmp_path, '"targets.onnx" = "unverified: a guess"\n', "")
    assert told.startswith("my-board.toml, line 19, targets.onnx.opset: no source;")


def test_a_source_of_nothing_is_refused(tmp_path: Path):
    told = refusal(tmp_path, 'cpu = "the', '"memory.ram_mib" = "x"\ncpu = "the')
    assert "line 37, sources.memory.ram_mib: this file states no such fact" in told


def test_a_prefix_of_a_word_is_no_prefix_of_a_field(tmp_path: Path):
    told = refusal(tmp_path, 'cpu = "the', 'cp = "the')
    assert "cpu.arch: no source" in told


def test_an_unquoted_dotted_source_is_explained(tmp_path: Path):
    told = refusal(tmp_path, 'cpu = "the', 'cpu.arch = "the')
    assert "line 37, sources.cpu: expected a text; quote a dotted field" in told


@pytest.mark.parametrize("name", device_profiles.names())
def test_removing_any_source_of_a_built_in_profile_is_noticed(name: str, tmp_path: Path):
    text = Path(device_profiles.__file__).with_name(f"{name}.toml").read_text()
    head, sources = text.split("[sources]\n")
    path = tmp_path / f"{name}.toml"
    lines = sources.splitlines(keepends=True)
    for removed in range(len(lines)):
        rest = lines[:removed] + lines[removed + 1 :]
        path.write_text(f"{head}[sources]\n{''.join(rest)}")
        key = lines[removed].split(" = ")[0].strip('"')
        if any(key.startswith(other.split(" = ")[0].strip('"') + ".") for other in rest):
            continue  # a wider entry still covers it
        with pytest.raises(ProfileError, match="no source"):
            device_profiles.load(str(path))


def test_further_problems_are_counted(tmp_path: Path):
    path = tmp_path / "my-board.toml"
    path.write_text(GOOD.replace("cores = 4", "cores = 0").replace("dotprod = true", "dotprod = 1"))
    with pytest.raises(ProfileError, match=r"\(1 more after this one\)"):
        device_profiles.load(str(path))


def test_an_unknown_device_suggests_the_nearest():
    with pytest.raises(ProfileError, match="no device 'raspberry-pi4'; did you mean raspberry-pi-4b"):
        device_profiles.load("raspberry-pi4")


def test_a_name_that_is_near_nothing_lists_all_devices():
    with pytest.raises(ProfileError, match="there are apple-m4, coral-edgetpu"):
        device_profiles.load("zzzz")


def test_an_unknown_target_suggests_the_nearest():
    with pytest.raises(ProfileError, match="no target 'tflit'; did you mean 'tflite'"):
        device_profiles.load("generic-x86").rules("tflit")


def test_a_missing_file_and_one_that_is_no_text_are_told_apart(tmp_path: Path):
    with pytest.raises(ProfileError, match="there is no profile file"):
        device_profiles.load(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="UTF-8"):
        device_profiles.load(str(tmp_path / "binary.toml"))


def test_the_example_of_the_readme_loads(tmp_path: Path):
    readme = Path(device_profiles.__file__).with_name("README.md").read_text()
    path = tmp_path / "my-board.toml"
    path.write_text(readme.split("```toml\n")[1].split("```")[0])
    assert device_profiles.load(str(path)).title == "My board"
