"""The table [tokens] of a recipe, and names in which `auto` stands beside recipes that prune."""

from dataclasses import replace
from pathlib import Path

import pytest

from convert import recipes
from convert.errors import TightfitError
from convert.options import Options
from convert.recipes import Tokens, automatic, load, resolved
from convert.refusals import refuse_contradictions, spends_on_tokens

STEPS = 'steps = ["fold_batchnorm"]\n'
PRUNING = [name for name in recipes.names() if load(name).tokens]


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(STEPS + text)
    return str(path)


def test_every_recipe_that_prunes_quantizes_nothing_by_itself() -> None:
    assert set(PRUNING) >= {
        "prune-evit",
        "prune-text",
        "prune-zero-tprune",
        "merge-tome",
        "merge-mctf",
        "cluster-tokens",
    }
    for name in PRUNING:
        assert not any(recipes.quantizes(step) for step in load(name).steps)
        assert load(name).summary


def test_joined_recipes_keep_what_is_cut_and_what_is_quantized() -> None:
    joined = load("prune-evit+int8-dynamic")
    assert joined.tokens == load("prune-evit").tokens
    assert joined.steps == load("int8-dynamic").steps
    assert load("int8").tokens is None


def test_two_recipes_that_prune_are_refused() -> None:
    with pytest.raises(TightfitError, match=r"removes tokens twice \(prune-evit, merge-tome\); name one of them"):
        load("prune-evit+merge-tome")


def test_a_table_of_tokens_is_read(tmp_path: Path) -> None:
    text = '[tokens]\nmethod = "evit"\nkeep = 0.55\noptions = { fuse = false }\n'
    assert load(written(tmp_path, text)).tokens == Tokens("evit", 0.55, {"fuse": False})
    assert load(written(tmp_path, '[tokens]\nmethod = "even"\n')).tokens == Tokens("even", 0.7, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tokens]\nkeep = 0.5\n", "method always"),
        ('[tokens]\nmethod = "evit"\nshare = 0.5\n', "takes keep, method, options"),
        ('tokens = "evit"\n', "takes keep, method, options"),
        ('[tokens]\nmethod = "best"\n', "tokens.method = 'best'; it takes"),
        ('[tokens]\nmethod = "evit"\nkeep = 1.0\n', "tokens.keep = 1.0; it takes a share between 0 and 1"),
        ('[tokens]\nmethod = "evit"\nkeep = 0.0\n', "a share between 0 and 1"),
        ('[tokens]\nmethod = "evit"\nkeep = true\n', "a share between 0 and 1"),
        ('[tokens]\nmethod = "evit"\nkeep = "half"\n', "a share between 0 and 1"),
        ('[tokens]\nmethod = "evit"\noptions = { fused = 1 }\n', "evit has no option 'fused' .* it has fuse, prop"),
        ('[tokens]\nmethod = "even"\noptions = { a = 1 }\n', "even has no option 'a' .* it has none"),
        ('[tokens]\nmethod = "evit"\noptions = 3\n', "tokens.options = 3; it takes a table"),
    ],
)
def test_a_table_of_tokens_that_makes_no_sense_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match=words):
        load(written(tmp_path, text))


@pytest.mark.parametrize("name", ["auto", "prune-evit+auto", "auto + merge-tome"])
def test_auto_among_names_leaves_the_quantizing_to_us(name: str) -> None:
    assert automatic(name)
    assert "auto" not in resolved(name, "int8")
    assert "int8" in resolved(name, "int8").split("+")


def test_other_names_are_carried_out_as_they_are() -> None:
    assert not automatic("prune-evit+int8")
    assert not automatic("./autobahn.toml")
    assert resolved("prune-evit + int8", "float32") == "prune-evit+int8"
    assert resolved("prune-evit+auto", "int8-dynamic") == "prune-evit+int8-dynamic"


@pytest.mark.parametrize(
    ("recipe", "spends"),
    [("prune-evit", True), ("prune-evit+int8", True), ("int8", False), ("prune-evit+auto", False), ("auto", False),
     ("prune-evit+mixed", False)],
)  # fmt: skip
def test_a_budget_of_time_is_met_by_tokens_where_nothing_else_can(recipe: str, spends: bool) -> None:
    assert spends_on_tokens(recipe) == spends


ASKED = Options("net.pt2", ("generic-x86",), Path("out"), synthetic=True, recipe="prune-evit")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "int8", "keep": 0.6}, "--keep says how many tokens .* the recipe int8 removes none"),
        ({"recipe": "auto", "max_drop": 1.0}, "--max-drop says .* the recipe auto removes none"),
        ({"keep": 1.5}, "--keep 1.5 is out of range: give a number between 0 and 1"),
        ({"keep": 0.0}, "--keep 0 is out of range"),
        ({"keep": float("nan")}, "--keep nan is out of range"),
        ({"max_drop": 0.0}, "--max-drop 0 is out of range: give a number between 0 and 100"),
        ({"max_drop": 100.0}, "--max-drop 100 is out of range"),
        ({"keep": 0.6, "max_drop": 1.0}, "--keep and --max-drop both say"),
        ({"keep": 0.6, "budget_ms": 3.0}, "--keep and --budget-ms both say"),
        ({"budget_ms": 0.0}, "--budget-ms 0 is no budget"),
        ({"budget_mib": 1.0}, "--budget-mib lets layers get formats of their own: .* mixed or auto"),
        ({"recipe": "int8", "budget_ms": 3.0}, "mixed or auto, or with one that prunes"),
    ],
)
def test_options_for_tokens_that_contradict_each_other_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(TightfitError, match=words):
        refuse_contradictions(replace(ASKED, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 0.6},
        {"max_drop": 0.5},
        {"budget_ms": 3.0},
        {"budget_ms": 3.0, "max_drop": 1.0},
        {"recipe": "prune-evit+auto", "keep": 0.6, "budget_ms": 3.0},  # the budget is for the layers' formats there
        {"recipe": "prune-evit+mixed", "keep": 0.6, "budget_mib": 1.0},
    ],
)
def test_options_that_go_together_are_taken(changes: dict[str, object]) -> None:
    refuse_contradictions(replace(ASKED, **changes))  # type: ignore[arg-type]


STAGES = """steps = ["quantize_static", "binarize_activations", "finetune:signs", "binarize", "finetune"]
[parameters."finetune:signs"]
iterations = 7
[parameters.finetune]
iterations = 9
"""


def test_a_step_named_twice_keeps_its_places_and_its_own_parameters(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(STAGES)
    found = load(str(path))
    assert found.steps == ("quantize_static", "binarize_activations", "finetune:signs", "binarize", "finetune")
    assert [found.parameters[s]["iterations"] for s in found.steps if s.startswith("finetune")] == [7, 9]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ('["quantize_static", "finetune", "finetune"]', "names the step finetune twice: .*such as finetune:signs"),
        ('["quantize_static", "binarize:late"]', "are for steps that may run several times, .*; write binarize"),
        ('["quantize_static", "finetune:"]', "write finetune"),
        ('["quantize_static", "finetunes:late"]', "a step 'finetunes:late' that does not exist"),
    ],
)
def test_names_that_would_not_run_as_written_are_refused(steps: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"steps = {steps}\n")
    with pytest.raises(TightfitError, match=words):
        load(str(path))
