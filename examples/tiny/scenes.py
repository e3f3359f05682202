"""Where the shapes of a scene go, and how they are drawn.

`lay_out` turns a scene into shapes with pixel coordinates; `render` draws a batch of scenes with flat
colours and anti-aliased edges on any device. Distances are in pixels of a 256x256 picture.
"""

import math
import random
from dataclasses import dataclass

import torch
from grammar import COLOURS, MAX_SHAPES, SHAPES, Group, Scene
from torch import Tensor

CANVAS = 256
BORDER = 8.0  # kept free at each side of the picture
GAP = 6.0  # between the boxes of two shapes
BIGGEST_RADIUS = 54.0
SIZE_FACTORS = {"small": 0.58, "medium": 0.77, "big": 1.0}
MAX_SHIFT = 10.0  # of a shape from the middle of its place

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (35, 160, 60),
    "blue": (40, 85, 220),
    "purple": (145, 50, 180),
    "black": (15, 15, 15),
    "white": (255, 255, 255),
    "gray": (130, 130, 130),
}

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the picture
HALVES: dict[str, Box] = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "above": (0.0, 0.0, 1.0, 0.5),
    "below": (0.0, 0.5, 1.0, 1.0),
}
MIRROR = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, kw_only=True)
class PlacedShape:
    group: int
    shape: str
    colour: str
    x: float
    y: float
    radius: float


def lay_out(scene: Scene, rng: random.Random) -> list[PlacedShape]:
    """Shapes of a scene; random within their places, never touching each other."""
    radius = biggest_radius(scene)
    placed = []
    for index, (group, box) in enumerate(zip(scene.groups, group_boxes(scene.arrangement), strict=True)):
        size = radius * SIZE_FACTORS[group.size]
        centres, pitch = group_centres(group, box)
        room = max(0.0, min(0.7 * ((pitch - GAP) / 2 - size), MAX_SHIFT))
        for x, y in centres:
            x, y = x + rng.uniform(-room, room), y + rng.uniform(-room, room)
            placed.append(
                PlacedShape(group=index, shape=group.shape, colour=group.colour, x=x, y=y, radius=size)
            )
    return placed


def biggest_radius(scene: Scene) -> float:
    """Radius of a big shape in this scene. All groups share it, so that sizes compare within a picture."""
    pitches = [
        group_centres(g, b)[1] for g, b in zip(scene.groups, group_boxes(scene.arrangement), strict=True)
    ]
    return min(BIGGEST_RADIUS, (min(pitches) - GAP) / 2)


def group_boxes(arrangement: tuple[str, ...]) -> list[Box]:
    """The part of the picture that each group has to itself."""
    kind = arrangement[0]
    if kind == "single":
        return [(0.0, 0.0, 1.0, 1.0)]
    if kind in HALVES:
        return [HALVES[kind], HALVES[MIRROR[kind]]]
    thirds = [(i / 3, (i + 1) / 3) for i in range(3)]
    if kind == "row":
        return [(start, 0.0, end, 1.0) for start, end in thirds]
    if kind == "column":
        return [(0.0, start, 1.0, end) for start, end in thirds]
    side, other = HALVES[arrangement[1]], HALVES[arrangement[2]]
    side_mirror, other_mirror = HALVES[MIRROR[arrangement[1]]], HALVES[MIRROR[arrangement[2]]]
    if kind == "pair":
        return [overlap(side, other_mirror), overlap(side_mirror, other_mirror), other]
    return [overlap(side, other), overlap(side_mirror, other), overlap(side, other_mirror)]


def overlap(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def group_centres(group: Group, box: Box) -> tuple[list[tuple[float, float]], float]:
    """Centres of a group's shapes inside its box, and the distance between neighbours."""
    inner = CANVAS - 2 * BORDER
    left, top, right, bottom = (BORDER + edge * inner for edge in box)
    width, height = right - left, bottom - top
    grids = [(group.count, 1), (1, group.count)] + ([(2, 2)] if group.count > 2 else [])
    columns, rows = max(grids, key=lambda grid: min(width / grid[0], height / grid[1]))
    pitch = min(width / columns, height / rows)
    rows_filled = [columns] * rows
    if group.count == 3 and (columns, rows) == (2, 2):
        rows_filled = [1, 2]
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    centres = [
        (middle_x + (i - (number - 1) / 2) * pitch, middle_y + (row - (rows - 1) / 2) * pitch)
        for row, number in enumerate(rows_filled)
        for i in range(number)
    ]
    return centres, pitch


# --- drawing ---


@dataclass(kw_only=True)
class SceneBatch:
    """Tensors of N scenes: `geometry` (N, 12, 3) x, y, radius; `shape` and `colour` (N, 12), -1 for no shape;
    `background` (N,)."""

    geometry: Tensor
    shape: Tensor
    colour: Tensor
    background: Tensor

    def to(self, device: torch.device | str) -> "SceneBatch":
        return SceneBatch(
            geometry=self.geometry.to(device),
            shape=self.shape.to(device),
            colour=self.colour.to(device),
            background=self.background.to(device),
        )

    def __getitem__(self, index: Tensor | slice) -> "SceneBatch":
        return SceneBatch(
            geometry=self.geometry[index],
            shape=self.shape[index],
            colour=self.colour[index],
            background=self.background[index],
        )


def batch_scenes(scenes: list[tuple[str, list[PlacedShape]]]) -> SceneBatch:
    """`scenes` holds the background and the placed shapes of each."""
    geometry = torch.zeros(len(scenes), MAX_SHAPES, 3)
    kinds = torch.full((2, len(scenes), MAX_SHAPES), -1, dtype=torch.int8)
    for row, (_, placed) in enumerate(scenes):
        for column, item in enumerate(placed):
            geometry[row, column] = torch.tensor((item.x, item.y, item.radius))
            kinds[0, row, column] = SHAPES.index(item.shape)
            kinds[1, row, column] = COLOURS.index(item.colour)
    background = torch.tensor([COLOURS.index(name) for name, _ in scenes])
    return SceneBatch(geometry=geometry, shape=kinds[0], colour=kinds[1], background=background)


def render(batch: SceneBatch, palettes: Tensor | None = None) -> Tensor:
    """Pictures (N, 3, 256, 256) in [0, 1]; `palettes` (N, 9, 3) replaces the palette of each scene."""
    device = batch.geometry.device
    if palettes is None:
        palettes = palette_tensor().to(device).expand(len(batch.geometry), -1, -1)
    every = torch.arange(len(batch.geometry), device=device)
    pictures = palettes[every, batch.background.long()][:, :, None, None].repeat(1, 1, CANVAS, CANVAS)
    axis = torch.arange(CANVAS, device=device, dtype=torch.float32) + 0.5
    for slot in range(int((batch.shape >= 0).sum(dim=1).max())):
        for index, name in enumerate(SHAPES):
            rows = (batch.shape[:, slot] == index).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            x, y, radius = batch.geometry[rows, slot].T[:, :, None, None]
            inside = coverage(name, axis[None, None, :] - x, axis[None, :, None] - y, radius)[:, None]
            colour = palettes[rows, batch.colour[rows, slot].long()][:, :, None, None]
            pictures[rows] = torch.lerp(pictures[rows], colour, inside)
    return pictures


def palette_tensor() -> Tensor:
    """The nine colours (9, 3) in [0, 1]."""
    return torch.tensor([PALETTE[name] for name in COLOURS], dtype=torch.float32) / 255


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of a pixel at (x, y) from the centre a shape covers: its signed distance, one pixel wide."""
    return (0.5 - DISTANCES[shape](x, y, radius)).clamp(0, 1)


def circle_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - radius


def square_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88 * radius


def triangle_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Equilateral, point up; the middle of its box lies at the centre."""
    bottom = y - 0.8625 * radius
    slant = 0.8660254 * x.abs() - 0.5 * (y - 0.2875 * radius) - 0.575 * radius
    return torch.maximum(bottom, slant)


STAR_RADIUS = 1.05
STAR_INNER = 0.44  # inner corners, as a fraction of the outer ones


def star_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Five points, one up."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    length = torch.sqrt(x * x + y * y)
    across, along = length * torch.sin(angle), length * torch.cos(angle)
    inner = STAR_INNER * math.sin(sector / 2), 1 - STAR_INNER * math.cos(sector / 2)
    return (across * inner[1] + (along - STAR_RADIUS * radius) * inner[0]) / math.hypot(*inner)


def heart_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """A square on its corner with a half circle on each upper side."""
    x, y = x.abs(), y + 0.175 * radius
    half = 0.82 * radius  # of the square's diagonal
    middle = 0.26 * radius
    square = (x + (y - middle).abs() - half) * math.sqrt(0.5)
    lobe = torch.sqrt((x - half / 2) ** 2 + (y - middle + half / 2) ** 2) - half * math.sqrt(0.5)
    return torch.minimum(square, lobe)


DISTANCES = {
    "circle": circle_distance,
    "square": square_distance,
    "triangle": triangle_distance,
    "star": star_distance,
    "heart": heart_distance,
}
