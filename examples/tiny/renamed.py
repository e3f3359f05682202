"""A colour that the model does not know, made of one that it knows.

Scenes whose purple is drawn and called otherwise, so that the judge, told the new colour, decides from the
pixels. `python evaluate.py --new-colour "light blue" 70 175 250` judges such pictures,
`examples/model_training/new_colour.py` teaches the colour.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grammar import Caption, Scene, sample_scene, write_caption
from judge import Verdict
from scenes import PALETTE

OLD = "purple"


@dataclass(frozen=True, kw_only=True)
class NewColour:
    """A colour in the place of purple.

    Attributes:
        name: in captions.
        rgb: 0 to 255.
    """

    name: str
    rgb: tuple[int, int, int]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, what the grammar calls purple is drawn, and judged, in this colour."""
        before = PALETTE[OLD]
        PALETTE[OLD] = self.rgb
        try:
            yield
        finally:
            PALETTE[OLD] = before

    def scenes(self, number: int, seed: int, *, held_out: bool, share: float) -> list[tuple[Scene, Caption]]:
        """Scenes of one group, and their captions.

        `share` is the chance that a scene in the new colour is taken, and that one in another colour is not;
        one in nine that are drawn is in the new colour.
        """
        draw = random.Random(seed)
        found = []
        while len(found) < number:
            scene = sample_scene(draw, num_groups=1, held_out=held_out)
            wanted = draw.random() < share
            if scene.background == OLD or (scene.groups[0].colour == OLD) != wanted:
                continue
            caption = write_caption(scene, draw)
            text = re.sub(r"\b(purple|violet)\b", self._called, caption.text, flags=re.IGNORECASE)
            found.append((scene, Caption(text=text, relations=caption.relations)))
        return found

    def _called(self, match: re.Match[str]) -> str:
        word = match[0]
        if word.isupper():
            return self.name.upper()
        return self.name.capitalize() if word[0].isupper() else self.name


def is_coloured(verdict: Verdict) -> bool:
    """Whether the judge saw things of the new colour, and of no other, on the right background."""
    things = verdict.found.rpartition(" on ")[0]
    return "background" not in verdict.faults and all(f" {OLD} " in thing for thing in things.split(", "))
