"""Scenes and the English captions that describe them.

A `Scene` is a background colour, one to three groups of equal shapes, and how the groups lie to each
other. `write_caption` phrases a scene in one of many ways and returns, beside the text, the relations it
states, so that a picture is judged only by what its caption says. README.md beside this file documents
the grammar for people.
"""

import random
import zlib
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white", "gray")
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = ("small", "medium", "big")
SIDES = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# What the background is when a caption names none: the first of these that no shape has.
DEFAULT_BACKGROUNDS = ("white", "gray", "black", "blue")

MAX_GROUPS = 3
MAX_COUNT = 4
MAX_SHAPES = 6  # in a picture
HELD_OUT_PARTS = 20  # one in so many combinations is kept from training

CORNERS = tuple((a, b) for a in SIDES for b in SIDES if (a in SIDES[:2]) != (b in SIDES[:2]))
# All arrangements by number of groups. `("left",)` is "the first left of the second". `("row",)` is the three
# groups from left to right. `("pair", a, b)`: first a of second, third b of both. `("corner", a, b)`: first a
# of second and b of third.
ARRANGEMENTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("single",),),
    2: tuple((side,) for side in SIDES),
    3: (
        ("row",),
        ("column",),
        *(("pair", a, b) for a, b in CORNERS),
        *(("corner", a, b) for a, b in CORNERS),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` equal shapes."""

    shape: str
    colour: str
    size: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    background: str
    groups: tuple[Group, ...]
    arrangement: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Caption:
    """`relations` holds (i, side, j): group i lies on that side of group j; "beside" is left or right."""

    text: str
    relations: tuple[tuple[int, str, int], ...]


def sample_scene(rng: random.Random, *, num_groups: int | None = None, held_out: bool = False) -> Scene:
    """A random scene from the training combinations, or from those held out of training."""
    while True:
        number = num_groups or rng.choices((1, 2, 3), weights=(25, 45, 30))[0]
        groups = tuple(sample_group(rng) for _ in range(number))
        if sum(group.count for group in groups) > MAX_SHAPES:
            continue
        arrangement = sample_arrangement(rng, number)
        free = [colour for colour in COLOURS if all(colour != group.colour for group in groups)]
        background = default_background(groups) if rng.random() < 0.35 else rng.choice(free)
        scene = Scene(background=background, groups=groups, arrangement=arrangement)
        kinds = {(group.shape, group.colour, group.size) for group in groups}
        if len(kinds) == number and is_held_out(scene) == held_out:
            return scene


def sample_group(rng: random.Random) -> Group:
    return Group(
        shape=rng.choice(SHAPES),
        colour=rng.choice(COLOURS),
        size=rng.choice(SIZES),
        count=rng.choices((1, 2, 3, 4), weights=(46, 18, 18, 18))[0],
    )


def sample_arrangement(rng: random.Random, num_groups: int) -> tuple[str, ...]:
    """From left to right comes twice as often as others: so lie also groups whose places no words give."""
    if num_groups < 3:
        return rng.choice(ARRANGEMENTS[num_groups][:1] + ARRANGEMENTS[num_groups])
    kind = rng.choice(("row", "row", "column", "pair", "corner"))
    return rng.choice([arrangement for arrangement in ARRANGEMENTS[3] if arrangement[0] == kind])


def default_background(groups: tuple[Group, ...]) -> str:
    used = {group.colour for group in groups}
    return next(colour for colour in DEFAULT_BACKGROUNDS if colour not in used)


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of background and groups is kept from training, in every arrangement."""
    groups = sorted(f"{g.count} {g.size} {g.colour} {g.shape}" for g in scene.groups)
    key = " | ".join([scene.background, *groups])
    return zlib.crc32(key.encode()) % HELD_OUT_PARTS == 0


# --- captions ---

NUMBER_WORDS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
SIZE_WORDS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "medium": ("", "", "", "", "medium", "medium-sized"),
    "big": ("big", "big", "large", "large", "huge"),
}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {
    "gray": ("gray", "grey"),
    "purple": ("purple", "purple", "purple", "violet"),
}
SHAPE_WORDS = {
    "circle": ("circle",) * 18 + ("disc", "ball"),
    "square": ("square",) * 19 + ("box",),
    "triangle": ("triangle",),
    "star": ("star",) * 19 + ("five-pointed star",),
    "heart": ("heart",),
}
PLURALS = {"box": "boxes"}
SIDE_PHRASES = {
    "left": ("to the left of", "to the left of", "left of", "on the left of", "on the left side of"),
    "right": ("to the right of", "to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "beneath", "underneath"),
}
PLACE_PHRASES = {
    "left": ("on the left", "on the left side", "at the left", "to the left"),
    "right": ("on the right", "on the right side", "at the right", "to the right"),
    "above": ("at the top", "on top", "on the top"),
    "below": ("at the bottom", "on the bottom", "below"),
}
ITS_PHRASES = {
    "left": ("to its left", "on its left", "on the left", "to the left", "to the left of it"),
    "right": ("to its right", "on its right", "on the right", "to the right", "to the right of it"),
    "above": ("above it", "above", "over it", "on top of it", "on top"),
    "below": ("below it", "below", "under it", "beneath it", "underneath"),
}
PREFIXES = (
    "a picture of,an image of,a drawing of,draw,draw,please draw,paint,show,show me,an illustration of,"
    "a photo of,generate an image of,create a picture of,picture of,image of,make,a simple drawing of,"
    "an image with,a picture showing,an image showing,i want"
).split(",")
SUFFIXES = (
    ", flat colors",
    ", minimalist",
    ", simple shapes",
    ", high quality",
    ", vector art",
    ", flat design",
    ", Ultra HD, 4K, cinematic composition",
)
NEGATIVES = ("", "", "", " ", " ", " ", "low quality", "blurry", "ugly, blurry, low quality", "worst quality")


def write_caption(scene: Scene, rng: random.Random) -> Caption:
    """One of the many phrasings of a scene, in lower, sentence, title or upper case."""
    names = [name_group(group, rng) for group in scene.groups]
    if len(names) == 1:
        body, relations = write_single(names[0], scene.groups[0], rng)
    elif len(names) == 2:
        body, relations = write_two(names, scene, rng)
    else:
        body, relations = write_three(names, scene, rng)
    named = scene.background != default_background(scene.groups) or rng.random() < 0.15
    text = add_background(add_prefix(body, rng), scene.background, rng) if named else add_prefix(body, rng)
    if rng.random() < 0.06:
        text += rng.choice(SUFFIXES)
    if rng.random() < 0.25:
        text += "."
    return Caption(text=change_case(" ".join(text.split()), rng), relations=relations)


def name_group(group: Group, rng: random.Random) -> str:
    """ "two big red stars", "a small circle in blue", "circle" without article, and so on."""
    noun = rng.choice(SHAPE_WORDS[group.shape])
    if group.count > 1:
        noun = PLURALS.get(noun, noun + "s")
    size, colour = rng.choice(SIZE_WORDS[group.size]), rng.choice(COLOUR_WORDS[group.colour])
    order = rng.random()
    if order < 0.90:
        words = f"{size} {colour} {noun}"
    elif order < 0.95:
        words = f"{colour} {size} {noun}"
    else:
        words = f"{size} {noun} in {colour}"
    return " ".join(f"{count_word(group.count, words, rng)} {words}".split())


def count_word(count: int, words: str, rng: random.Random) -> str:
    if count > 1:
        if count == 2 and rng.random() < 0.06:
            return rng.choice(("a pair of", "a couple of"))
        return NUMBER_WORDS[count][rng.random() < 0.25]
    article = "an" if words.strip()[0] in "aeiou" else "a"
    return rng.choices((article, "one", "1", "a single", "", "the"), weights=(64, 8, 4, 3, 18, 3))[0]


def be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


Relations = tuple[tuple[int, str, int], ...]


def write_single(name: str, group: Group, rng: random.Random) -> tuple[str, Relations]:
    forms = [name] * 8 + [
        f"there {be(group)} {name}",
        f"{name} in the middle",
        f"just {name}",
        f"only {name}",
    ]
    return rng.choice(forms), ()


def write_two(names: list[str], scene: Scene, rng: random.Random) -> tuple[str, Relations]:
    a, b = names
    side = scene.arrangement[0]
    if side == "left" and rng.random() < 0.5:
        forms = [f"{a} and {b}"] * 4 + [f"{a}, {b}", f"{a} with {b}", f"{a} & {b}"]
        return rng.choice(forms), ()
    if side == "left" and rng.random() < 0.3:
        words = rng.choice(("next to", "beside", "by the side of"))
        return rng.choice([f"{a} {words} {b}"] * 3 + [f"{a} and {b} side by side"]), ((0, "beside", 1),)
    return write_relation(a, b, side, scene.groups[0], scene.groups[1], rng), ((0, side, 1),)


def write_relation(a: str, b: str, side: str, first: Group, second: Group, rng: random.Random) -> str:
    """Phrases for "a is on that side of b"."""
    phrase, other = rng.choice(SIDE_PHRASES[side]), OPPOSITE[side]
    here, there = rng.choice(PLACE_PHRASES[side]), rng.choice(PLACE_PHRASES[other])
    form = rng.random()
    if form < 0.50:
        return f"{a} {phrase} {b}"
    if form < 0.60:
        return rng.choice((f"there {be(first)} {a} {phrase} {b}", f"{a} {be(first)} {phrase} {b}"))
    if form < 0.68:
        return rng.choice(
            (f"{phrase} {b} {be(first)} {a}", f"{phrase} {b} there {be(first)} {a}", f"{phrase} {b}, {a}")
        )
    if form < 0.84:
        joint = rng.choice((" and ", ", ", " and ", ", and "))
        return rng.choice((f"{a} {here}{joint}{b} {there}", f"{here} {a}{joint}{there} {b}"))
    if form < 0.90:
        short = {"left": "left", "right": "right", "above": "top", "below": "bottom"}
        return f"{short[side]}: {a}, {short[other]}: {b}"
    its = rng.choice(ITS_PHRASES[other]) if first.count == 1 else f"{rng.choice(SIDE_PHRASES[other])} them"
    return rng.choice((f"{a} with {b} {its}", f"{a} and {b} {its}", f"{a}, {b} {its}"))


def write_three(names: list[str], scene: Scene, rng: random.Random) -> tuple[str, Relations]:
    a, b, c = names
    kind = scene.arrangement[0]
    if kind == "row" and rng.random() < 0.5:
        forms = ["{}, {} and {}"] * 3 + ["{}, {}, and {}", "{}, {}, {}", "{} and {} and {}"]
        return rng.choice(forms).format(*names), ()
    if kind in ("row", "column"):
        return write_line(names, kind, rng)
    side, other = scene.arrangement[1:]
    first, second = rng.choice(SIDE_PHRASES[side]), rng.choice(SIDE_PHRASES[other])
    if kind == "corner":
        joint = rng.choice((" and ", ", and ", " and "))
        return f"{a} {first} {b}{joint}{second} {c}", ((0, side, 1), (0, other, 2))
    if rng.random() < 0.25:
        return f"{c} {second} {a} and {b}", ((2, other, 0), (2, other, 1))
    both = rng.choice(("them", "them", "both", "both of them"))
    joint = rng.choice((" and ", ", and ", ", ", " with ", ", with "))
    return f"{a} {first} {b}{joint}{c} {second} {both}", ((0, side, 1), (2, other, 0), (2, other, 1))


def write_line(names: list[str], kind: str, rng: random.Random) -> tuple[str, Relations]:
    """Three groups from left to right or from top to bottom."""
    a, b, c = names
    side = "left" if kind == "row" else "above"
    relations = ((0, side, 1), (1, side, 2))
    words = "from left to right" if kind == "row" else "from top to bottom"
    form = rng.random()
    listed = rng.choice((f"{a}, {b} and {c}", f"{a}, {b}, {c}", f"{a}, {b}, and {c}"))
    if form < 0.35:
        return rng.choice((f"{listed} {words}", f"{words}: {listed}", f"{words} {listed}")), relations
    if form < 0.60:
        phrase = rng.choice(SIDE_PHRASES[side])
        return f"{a} {phrase} {b} {phrase} {c}", relations
    if form < 0.75:
        before, after = rng.choice(PLACE_PHRASES[side]), rng.choice(PLACE_PHRASES[OPPOSITE[side]])
        return f"{a} {before}, {b} in the middle{rng.choice((' and', ',', ', and'))} {c} {after}", relations
    if form < 0.88 and kind == "row":
        return f"{b} between {a} and {c}", relations
    side_a, side_c = rng.choice(SIDE_PHRASES[side]), rng.choice(SIDE_PHRASES[OPPOSITE[side]])
    return f"{b} with {a} {side_a} it and {c} {side_c} it", relations


def add_prefix(body: str, rng: random.Random) -> str:
    return f"{rng.choice(PREFIXES)} {body}" if rng.random() < 0.30 else body


def add_background(text: str, colour: str, rng: random.Random) -> str:
    word = rng.choice(COLOUR_WORDS[colour])
    article = "an" if word[0] in "aeiou" else "a"
    form = rng.random()
    if form < 0.72:
        phrases = [f"on {article} {word} background"] * 4 + [
            f"on {word}",
            f"with {article} {word} background",
            f"against {article} {word} background",
            f"on {word} background",
            f"in front of {article} {word} background",
            f"with the background {word}",
        ]
        return f"{text}{rng.choice(('', '', '', ','))} {rng.choice(phrases)}"
    if form < 0.86:
        joint, start = rng.choice((", ", ", ", ". ")), rng.choice(("", "", article + " ", "the "))
        return f"{text}{joint}{start}{word} background"
    if form < 0.90:
        return f"{text}, the background is {word}"
    start = rng.choice(
        (f"on {article} {word} background, ", f"{word} background, ", f"{word} background with ")
    )
    return start + text


def change_case(text: str, rng: random.Random) -> str:
    case = rng.random()
    if case < 0.55:
        return text
    if case < 0.82:
        return text[0].upper() + text[1:]
    return text.title() if case < 0.90 else text.upper()
