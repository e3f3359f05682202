"""Does a picture show what its caption says? Decided from the pixels alone.

The background must have the named colour and be flat. What differs from it falls into connected pieces;
each piece gets a colour (nearest of the palette to its inner pixels), a shape (best overlap with the
five shapes in its box) and a size (its area, against the three sizes of such a scene). The pieces must
be exactly those of the scene, and lie as the caption says.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from grammar import COLOURS, SHAPES, Caption, Scene
from numpy.typing import NDArray
from scenes import PALETTE, SIZE_FACTORS, biggest_radius, coverage

Pixels = NDArray[np.float64]  # (256, 256, 3), 0 to 255
Mask = NDArray[np.bool_]

FOREGROUND_DISTANCE = 60.0  # from the background's colour, in RGB
COLOUR_DISTANCE = 45.0  # of a piece's median from its palette colour; the closest two colours are 80 apart
FLATNESS = 10.0  # mean distance of background pixels from their colour
SPECK_AREA = 30  # smaller pieces are specks; more than so many pixels of specks is a fault
MIN_OVERLAP = 0.85  # sum of minima over sum of maxima with the best shape
RELATION_MARGIN = 16.0

Piece = tuple[str, str, str]  # size, colour, shape


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`faults` is empty if the picture is right; `found` names what was seen."""

    faults: tuple[str, ...]
    found: str

    @property
    def right(self) -> bool:
        return not self.faults


@dataclass(frozen=True, kw_only=True)
class Object:
    kind: Piece
    x: float
    y: float
    overlap: float


def judge(picture: NDArray[np.uint8], scene: Scene, caption: Caption) -> Verdict:
    """`picture` is (256, 256, 3) RGB."""
    pixels = picture.astype(np.float64)
    background = np.array(PALETTE[scene.background], dtype=np.float64)
    seen = nearest_colour(np.median(border(pixels), axis=0))
    if seen[0] != scene.background or seen[1] > COLOUR_DISTANCE:
        return Verdict(faults=("background",), found=f"{seen[0]} background")
    foreground = np.linalg.norm(pixels - background, axis=-1) > FOREGROUND_DISTANCE
    pieces = connected_pieces(foreground)
    faults = background_faults(pixels, background, foreground, pieces)
    radius = biggest_radius(scene)
    objects = [see(pixels, background, piece, radius) for piece in pieces if piece.sum() >= SPECK_AREA]
    faults += kind_faults(objects, scene) or relation_faults(objects, scene, caption)
    counts = Counter(item.kind for item in objects)
    found = ", ".join(f"{number} {' '.join(kind)}" for kind, number in sorted(counts.items()))
    return Verdict(faults=tuple(faults), found=f"{found} on {seen[0]}")


def border(pixels: Pixels) -> Pixels:
    return np.concatenate(
        [pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)]
    )


def background_faults(
    pixels: Pixels, background: NDArray[np.float64], foreground: Mask, pieces: list[Mask]
) -> list[str]:
    faults = []
    if sum(int(piece.sum()) for piece in pieces if piece.sum() < SPECK_AREA) > SPECK_AREA:
        faults.append("specks")
    away = ~grow(grow(foreground))
    if np.linalg.norm(pixels[away] - background, axis=-1).mean() > FLATNESS:
        faults.append("uneven background")
    return faults


def kind_faults(objects: list[Object], scene: Scene) -> list[str]:
    wanted: Counter[Piece] = Counter()
    for group in scene.groups:
        wanted[(group.size, group.colour, group.shape)] += group.count
    found = Counter(item.kind for item in objects)
    if found == wanted:
        return []
    faults = []
    for index, name in enumerate(("size", "colour", "shape")):
        if part(found, index) != part(wanted, index):
            faults.append(name)
    if found.total() != wanted.total():
        faults = ["count"]
    return faults or ["binding"]


def part(kinds: Counter[Piece], index: int) -> Counter[str]:
    result: Counter[str] = Counter()
    for kind, number in kinds.items():
        result[kind[index]] += number
    return result


def relation_faults(objects: list[Object], scene: Scene, caption: Caption) -> list[str]:
    places = []
    for group in scene.groups:
        kind = (group.size, group.colour, group.shape)
        places.append(np.array([(item.x, item.y) for item in objects if item.kind == kind]))
    return [f"relation {side}" for i, side, j in caption.relations if not lies(places[i], side, places[j])]


def lies(a: NDArray[np.float64], side: str, b: NDArray[np.float64]) -> bool:
    """Whether every member of `a` lies on that side of every member of `b`."""
    if side == "beside":
        return lies(a, "left", b) or lies(a, "right", b)
    axis = 0 if side in ("left", "right") else 1
    first, second = (a, b) if side in ("left", "above") else (b, a)
    return bool(first[:, axis].max() + RELATION_MARGIN < second[:, axis].min())


# --- seeing one piece ---


def see(pixels: Pixels, background: NDArray[np.float64], piece: Mask, biggest: float) -> Object:
    inner = piece
    for _ in range(2):
        shrunk = ~grow(~inner)
        inner = shrunk if shrunk.sum() >= 12 else inner
    median = np.median(pixels[inner], axis=0)
    colour, distance = nearest_colour(median)
    if distance > COLOUR_DISTANCE or np.linalg.norm(pixels[inner] - median, axis=-1).mean() > COLOUR_DISTANCE:
        colour = "mixed"
    # How far each pixel is on the way from the background to the piece's colour.
    way = median - background
    share = np.clip((pixels - background) @ way / (way @ way), 0, 1) * grow(grow(piece))
    shape, overlap, x, y, radius = nearest_shape(share)
    size = min(SIZE_FACTORS, key=lambda name: abs(math.log(radius / (biggest * SIZE_FACTORS[name]))))
    name = shape if overlap >= MIN_OVERLAP else "blob"
    return Object(kind=(size, colour, name), x=x, y=y, overlap=overlap)


def nearest_colour(colour: NDArray[np.float64]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(colour - np.array(PALETTE[name]))) for name in COLOURS}
    name = min(distances, key=lambda key: distances[key])
    return name, distances[name]


def nearest_shape(share: NDArray[np.float64]) -> tuple[str, float, float, float, float]:
    """The best of the five shapes, drawn with the area and centre of mass of `share` (256, 256) in [0, 1].

    Returns its name, the overlap (sum of minima over sum of maxima), its centre and its radius.
    """
    rows, columns = np.nonzero(share)
    top, left = max(0, rows.min() - 3), max(0, columns.min() - 3)
    window = torch.from_numpy(share[top : rows.max() + 4, left : columns.max() + 4])
    y = torch.arange(window.shape[0], dtype=torch.float64)[:, None] + top + 0.5
    x = torch.arange(window.shape[1], dtype=torch.float64)[None] + left + 0.5
    area = float(window.sum())
    mass_x, mass_y = float((window * x).sum()) / area, float((window * y).sum()) / area
    found = []
    for shape in SHAPES:
        unit_area, unit_y = unit_mass(shape)
        radius = math.sqrt(area / unit_area)
        centre_y = mass_y - radius * unit_y
        drawn = coverage(shape, x - mass_x, y - centre_y, torch.tensor(radius, dtype=torch.float64))
        overlap = float(torch.minimum(drawn, window).sum() / torch.maximum(drawn, window).sum())
        found.append((overlap, shape, centre_y, radius))
    overlap, shape, centre_y, radius = max(found)
    return shape, overlap, mass_x, centre_y, radius


@cache
def unit_mass(shape: str) -> tuple[float, float]:
    """Area and height of the centre of mass of the shape of radius 1."""
    axis = torch.arange(-128.0, 128.0, dtype=torch.float64) + 0.5
    drawn = coverage(shape, axis[None], axis[:, None], torch.tensor(100.0, dtype=torch.float64))
    area = float(drawn.sum())
    return area / 100.0**2, float((drawn * axis[:, None]).sum()) / area / 100.0


# --- masks ---


def grow(mask: Mask) -> Mask:
    """Adds the four neighbours of every pixel."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def connected_pieces(mask: Mask) -> list[Mask]:
    """Pieces of pixels that touch by their sides, found by joining the runs of neighbouring rows."""
    runs = [(row, start, end) for row in range(mask.shape[0]) for start, end in row_runs(mask[row])]
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_row: dict[int, list[int]] = {}
    for i, (row, start, end) in enumerate(runs):
        for j in by_row.get(row - 1, []):
            if runs[j][1] < end and start < runs[j][2]:
                parent[root(i)] = root(j)
        by_row.setdefault(row, []).append(i)
    pieces: dict[int, Mask] = {}
    for i, (row, start, end) in enumerate(runs):
        pieces.setdefault(root(i), np.zeros_like(mask))[row, start:end] = True
    return list(pieces.values())


def row_runs(row: NDArray[np.bool_]) -> Sequence[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
