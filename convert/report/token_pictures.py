"""Pictures of the tokens in the HTML report: how many each block has, and which of a sample's survive."""

from collections import Counter
from collections.abc import Iterator

from markupsafe import Markup

from .schema import TokenFacts, TokenSample

_HEIGHT = 84  # pixels of a bar that holds every token
_CELL = 10  # units of a patch in its panel


def counts(facts: TokenFacts) -> Markup:
    """The number of tokens that leave each block, one upright bar each; blocks with a cut stand out."""
    cut = {c.block for c in facts.cuts}
    width = 100 / len(facts.per_block)
    parts = []
    for index, count in enumerate(facts.per_block):
        high = _HEIGHT * count / facts.tokens
        middle = (index + 0.5) * width
        parts += [
            Markup('<rect class="track" x="{:.2f}%" y="16" width="{:.2f}%" height="{}"/>').format(
                index * width + width * 0.1, width * 0.8, _HEIGHT
            ),
            Markup('<rect class="{}" x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{:.1f}"/>').format(
                "good" if index + 1 in cut else "float",
                index * width + width * 0.1,
                16 + _HEIGHT - high,
                width * 0.8,
                high,
            ),
            Markup('<text class="value" x="{:.2f}%" y="12" text-anchor="middle">{}</text>').format(middle, count),
            Markup('<text class="tick" x="{:.2f}%" y="{}" text-anchor="middle">{}</text>').format(
                middle, _HEIGHT + 30, index + 1
            ),
        ]
    spoken = ", ".join(f"{n} behind block {i}" for i, n in enumerate(facts.per_block, 1))
    return Markup('<svg class="picture" role="img" aria-label="Tokens: {}" width="100%" height="{}">{}</svg>').format(
        spoken, _HEIGHT + 36, Markup().join(parts)
    )


def survivors(facts: TokenFacts, sample: TokenSample) -> Markup:
    """The sample as it is, then after each cut: dark where a token is gone, tinted alike where some became one."""
    panels = [_panel(sample, None, f"all {facts.tokens}")]
    for cut, became in zip(facts.cuts, sample.became, strict=True):
        panels.append(_panel(sample, became, f"{cut.after} behind block {cut.block}"))
    kind = "panels" if sample.grid else "panels strips"
    return Markup('<div class="{}">{}</div>').format(kind, Markup().join(panels))


def _panel(sample: TokenSample, became: tuple[int, ...] | None, title: str) -> Markup:
    tokens = len(sample.became[0])
    rows, columns = sample.grid or (1, tokens)
    front = tokens - rows * columns
    wide, high = columns * _CELL, rows * _CELL
    image = Markup()
    if sample.image:
        image = Markup('<image href="data:image/png;base64,{}" width="{}" height="{}"/>').format(
            sample.image, wide, high
        )
    covers = Markup().join(_covers(became, front, columns, bool(sample.image)) if became else ())
    picture = Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {} {}" preserveAspectRatio="none">{}{}</svg>'
    ).format(title, wide, high, image or Markup('<rect class="kept" width="100%" height="100%"/>'), covers)
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(picture, title)


def _covers(became: tuple[int, ...], front: int, columns: int, pictured: bool) -> Iterator[Markup]:
    members = Counter(place for place in became if place >= 0)
    for index, place in enumerate(became[front:]):
        x, y = index % columns * _CELL, index // columns * _CELL
        if place < 0:
            yield Markup('<rect class="gone" x="{}" y="{}" width="{}" height="{}"/>').format(x, y, _CELL, _CELL)
        elif members[place] > 1:
            # Neighbouring places get hues far apart.
            tint = Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="hsl({} 70% 50%)" fill-opacity="{}"/>')
            yield tint.format(x, y, _CELL, _CELL, place * 137 % 360, 0.55 if pictured else 1)
