"""The pictures of tokens: well-formed, foreign text stays text, and dark cells are the tokens that are gone."""

import xml.etree.ElementTree as ElementTree
from typing import Any

from made_reports import report, result

from convert.report.html import html
from convert.report.schema import TokenFacts
from convert.report.token_pictures import counts, survivors

EVIL = '"/><script>alert(1)</script>'
# Nine patches behind a class token: after the first cut four are gone; after the second two more, and two became one.
ONE = (0, 1, -1, 2, -1, 3, -1, 4, -1, 5)
TWO = (0, 1, -1, 2, -1, 2, -1, -1, -1, -1)


def facts(grid: list[int] | None = [3, 3], image: str | None = "aGk=", **changes: Any) -> TokenFacts:  # noqa: B006
    made: dict[str, Any] = {
        "method": "evit", "form": "topk", "protected": 1, "tokens": 10, "share": 0.525, "per_block": [10, 6, 3, 2],
        "cuts": [
            {"layer": "a", "block": 2, "before": 10, "after": 6}, {"layer": "b", "block": 3, "before": 6, "after": 3},
        ],
        "changed": 1.5, "samples": [{"became": [ONE, TWO], "grid": grid, "image": image}],
    }  # fmt: skip
    return TokenFacts.model_validate(made | changes)


def elements(markup: str, tag: str, **attributes: str) -> list[ElementTree.Element]:
    """Every element of a picture, which must be well-formed."""
    found = ElementTree.fromstring(f"<root>{markup}</root>").iter(tag)
    return [e for e in found if all(e.get(k.rstrip("_")) == v for k, v in attributes.items())]


def test_every_block_has_a_bar_as_high_as_its_tokens_and_cuts_stand_out() -> None:
    picture = str(counts(facts()))
    bars = [e for c in ("float", "good") for e in elements(picture, "rect", class_=c)]
    assert len(elements(picture, "rect", class_="track")) == len(bars) == 4
    highs = sorted(float(str(e.get("height"))) for e in bars)
    full = highs[-1]
    assert [round(high / full * 10) for high in highs] == [2, 3, 6, 10]
    assert len(elements(picture, "rect", class_="good")) == 2
    assert [e.text for e in elements(picture, "text", class_="value")] == ["10", "6", "3", "2"]
    assert [e.text for e in elements(picture, "text", class_="tick")] == ["1", "2", "3", "4"]
    assert elements(picture, "svg")[0].get("aria-label") == (
        "Tokens: 10 behind block 1, 6 behind block 2, 3 behind block 3, 2 behind block 4"
    )


def test_dark_cells_are_the_tokens_that_are_gone() -> None:
    made = facts()
    panels = elements(str(survivors(made, made.samples[0])), "figure")
    dark = [[e for e in p.iter("rect") if e.get("class") == "gone"] for p in panels]
    assert [len(d) for d in dark] == [0, ONE.count(-1), TWO.count(-1)]
    # the patch behind the class token is the first cell
    places = [(int(str(e.get("x"))) // 10, int(str(e.get("y"))) // 10) for e in dark[1]]
    assert places == [((i - 1) % 3, (i - 1) // 3) for i, place in enumerate(ONE) if place < 0]
    assert [c.text for c in elements(str(survivors(made, made.samples[0])), "figcaption")] == [
        "all 10", "6 behind block 2", "3 behind block 3"
    ]  # fmt: skip


def test_tokens_that_became_one_have_one_tint_and_others_have_none() -> None:
    made = facts(samples=[{"became": [ONE, (0, 1, 1, 2, 2, 2, -1, 3, 4, 5)], "grid": [3, 3]}])
    _, first, second = elements(str(survivors(made, made.samples[0])), "figure")
    assert [e.get("fill") for e in first.iter("rect") if e.get("fill")] == []
    tints = [e.get("fill") for e in second.iter("rect") if e.get("fill")]
    assert len(tints) == 5
    assert tints[0] == tints[1] != tints[2]
    assert tints[2] == tints[3] == tints[4]


def test_text_is_a_strip_and_has_no_image() -> None:
    made = facts(grid=None, image=None)
    picture = str(survivors(made, made.samples[0]))
    assert elements(picture, "div")[0].get("class") == "panels strips"
    assert elements(picture, "svg")[0].get("viewBox") == "0 0 100 10"
    assert elements(picture, "image") == []
    assert len(elements(picture, "rect", class_="gone")) == ONE.count(-1) + TWO.count(-1)
    assert len(elements(picture, "rect", class_="kept")) == 3


def test_foreign_text_stays_text() -> None:
    made = facts(image=EVIL, method=EVIL)
    picture = str(survivors(made, made.samples[0]))
    assert elements(picture, "script") == []
    assert elements(picture, "image")[0].get("href") == f"data:image/png;base64,{EVIL}"
    page = html(report(result(tokens=made.model_dump())))
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 1


def test_the_page_shows_tokens_where_a_recipe_removed_some() -> None:
    page = html(report(result(tokens=facts().model_dump())))
    assert "Tokens that leave each block, of 10; coloured where evit removes some" in page
    assert page.count("<figure>") == 3
    assert "Tokens that leave each block" not in html(report())
