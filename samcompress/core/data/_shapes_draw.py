"""How a scene is drawn: outlines as distance functions, textures as functions of the plane.

Everything is plain numpy on the object's own window, so a scene is the same on every machine and a
128 x 128 one takes a few milliseconds. Coordinates are pixel centres; lengths are in pixels.
"""

# numpy types the arithmetic of arrays as Any
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1  # raised with every change that changes a pixel; goes into the fingerprint

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Rng = np.random.Generator

# ------------------------------------------------------------------------------------ outlines
# Each takes local coordinates (u, v), a radius and the generator, and returns a function of the
# plane that is negative inside and grows about one a pixel, so that it gives edges and shading.


def _ellipse(u: Array, v: Array, r: float, rng: Rng) -> Array:
    a, b = r, r * rng.uniform(0.45, 1.0)
    return (np.hypot(u / a, v / b) - 1) * b


def _rectangle(u: Array, v: Array, r: float, rng: Rng) -> Array:
    a, b = r, r * rng.uniform(0.3, 1.0)
    corner = b * rng.choice([0.0, 0.0, 0.2, 0.6])
    qu, qv = np.abs(u) - a + corner, np.abs(v) - b + corner
    outside = np.hypot(np.maximum(qu, 0), np.maximum(qv, 0))
    return outside + np.minimum(np.maximum(qu, qv), 0) - corner


def _polygon(u: Array, v: Array, r: float, rng: Rng) -> Array:
    sides = int(rng.integers(3, 7))
    angles = (np.arange(sides) + rng.uniform(-0.25, 0.25, sides)) * (2 * np.pi / sides)
    reach = r * rng.uniform(0.55, 0.9, sides)
    edges = [u * np.cos(t) + v * np.sin(t) - d for t, d in zip(angles, reach, strict=True)]
    return np.maximum(np.maximum.reduce(edges), np.hypot(u, v) - 1.35 * r)


def _blob(u: Array, v: Array, r: float, rng: Rng) -> Array:
    angle = np.arctan2(v, u)
    edge = np.full_like(u, 0.8)
    for k in range(2, 6):
        edge += rng.uniform(0, 0.3 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return (np.hypot(u, v) - r * edge) * 0.85


def _star(u: Array, v: Array, r: float, rng: Rng) -> Array:
    points = int(rng.integers(4, 8))
    inner = rng.uniform(0.4, 0.65)
    step = np.pi / points
    fold = np.abs(np.mod(np.arctan2(v, u), 2 * step) - step)  # 0 in a notch, step at a tip
    # the straight edge from notch (inner, 0) to tip (1, step), as distance along its normal
    tip, notch = np.array([np.cos(step), np.sin(step)]), np.array([inner, 0.0])
    normal = np.array([tip[1] - notch[1], notch[0] - tip[0]])
    normal /= np.hypot(*normal)
    d = np.hypot(u, v)
    return d * (np.cos(fold) * normal[0] + np.sin(fold) * normal[1]) - r * notch @ normal


def _ring(u: Array, v: Array, r: float, rng: Rng) -> Array:
    half = r * rng.uniform(0.14, 0.28)
    return np.abs(_ellipse(u, v, r - half, rng)) - half


def _crescent(u: Array, v: Array, r: float, rng: Rng) -> Array:
    bite = np.hypot(u - r * rng.uniform(0.45, 0.75), v) - r * rng.uniform(0.7, 0.9)
    return np.maximum(np.hypot(u, v) - r, -bite)


def _bar(u: Array, v: Array, r: float, rng: Rng) -> Array:
    half = r * rng.uniform(0.12, 0.25)
    reach = r * 1.2 - half
    bend = v - rng.uniform(-0.3, 0.3) * u * np.abs(u) / r
    return np.hypot(u - np.clip(u, -reach, reach), bend) - half


_OUTLINES: tuple[Callable[[Array, Array, float, Rng], Array], ...] = (
    _ellipse,
    _rectangle,
    _polygon,
    _blob,
    _star,
    _ring,
    _crescent,
    _bar,
)
KINDS = {number: f.__name__.strip("_") for number, f in enumerate(_OUTLINES, 1)}

# ------------------------------------------------------------------------------------ textures


def _noise(u: Array, v: Array, scale: float, rng: Rng) -> Array:
    """Smooth value noise in [0, 1] with cells of ``scale`` pixels."""
    table = rng.random((16, 16), np.float32)
    u, v = u / scale, v / scale
    i, j = np.floor(u), np.floor(v)
    fu, fv = u - i, v - j
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    i, j = i.astype(np.intp) & 15, j.astype(np.intp) & 15
    k, m = (i + 1) & 15, (j + 1) & 15
    top = table[j, i] * (1 - fu) + table[j, k] * fu
    low = table[m, i] * (1 - fu) + table[m, k] * fu
    return top * (1 - fv) + low * fv


def _texture(u: Array, v: Array, r: float, rng: Rng) -> Array:
    """Where the second colour shows, in [0, 1]; lengths follow the object's radius."""
    kind = rng.choice(6, p=[0.22, 0.22, 0.16, 0.1, 0.12, 0.18])
    turn = rng.uniform(0, np.pi)
    a, b = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    period = max(4.0, r * rng.uniform(0.25, 0.7))
    depth = rng.uniform(0.25, 0.9)
    wave = 2 * np.pi / period
    if kind == 0:  # plain
        return np.zeros_like(u)
    if kind == 1:  # gradient
        return np.clip(0.5 + 0.5 * a / r, 0, 1)
    if kind == 2:  # stripes
        return depth * (0.5 + 0.5 * np.tanh(4 * np.sin(a * wave)))
    if kind == 3:  # checks
        return depth * (0.5 + 0.5 * np.tanh(6 * np.sin(a * wave) * np.sin(b * wave)))
    if kind == 4:  # spots
        return depth * (0.5 + 0.5 * np.tanh(5 * (np.cos(a * wave) * np.cos(b * wave) - 0.3)))
    return depth * (0.6 * _noise(u, v, period, rng) + 0.4 * _noise(u, v, period / 3, rng))


def _colour(rng: Rng) -> Array:
    """An RGB colour in [0, 1], as often pale or dark as in photographs."""
    hue, chroma, light = rng.random(), rng.beta(1.6, 1.8), rng.uniform(0.18, 0.95)
    wheel = np.clip(np.abs(np.mod(hue * 6 + np.array([0, 4, 2]), 6) - 3) - 1, 0, 1)
    return (light * (1 - chroma + chroma * wheel)).astype(np.float32)


# --------------------------------------------------------------------------------------- scene


def draw(rng: Rng, height: int, width: int) -> tuple[Bytes, Bytes, list[int]]:
    """Draw one scene.

    Returns:
        image (H, W, 3) uint8; labels (H, W) uint8, 0 the background and k the visible part of the
        k-th object; and the kind of each object, in drawing order.
    """
    side = min(height, width)
    x = np.arange(width, dtype=np.float32)[None] + 0.5
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    canvas, ground = _background(rng, x, y, side)
    labels = np.zeros((height, width), np.uint8)
    light = rng.uniform(0, 2 * np.pi)
    count = int(rng.integers(3, 10))
    radii = side * np.exp(rng.uniform(np.log(0.055), np.log(0.34), count))
    radii[int(rng.integers(count))] = side * rng.uniform(0.16, 0.34)
    # Mostly large before small, as otherwise the small ones vanish.
    radii = radii[np.argsort(-radii * np.exp(rng.normal(0, 0.5, count)))]
    kinds: list[int] = []
    centre = np.array([width, height]) / 2
    for radius in radii:
        if kinds and rng.random() < 0.3:  # a part on, or a neighbour of, what is already there
            centre = centre + rng.normal(0, 0.1 * side, 2)
        else:
            centre = rng.uniform(0.04, 0.96, 2) * (width, height)
        kind = int(rng.integers(len(_OUTLINES)))
        _paint(rng, canvas, labels, len(kinds) + 1, kind, centre, radius, light, ground)
        kinds.append(kind + 1)
    canvas *= (1 + rng.uniform(0, 0.3) * _ramp(x, y, rng))[..., None]
    canvas += rng.uniform(0, 0.035) * rng.standard_normal(canvas.shape, np.float32)
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image, labels, kinds


def _ramp(x: Array, y: Array, rng: Rng) -> Array:
    """A slope over the picture in [-0.5, 0.5], in a drawn direction."""
    turn = rng.uniform(0, 2 * np.pi)
    return 0.7 * (np.cos(turn) * (x / x.max() - 0.5) + np.sin(turn) * (y / y.max() - 0.5))


def _background(rng: Rng, x: Array, y: Array, side: int) -> tuple[Array, Array]:
    first, second = _colour(rng), _colour(rng)
    second = first + (second - first) * rng.uniform(0.2, 0.8)
    u, v = np.broadcast_arrays(x, y)
    share = 0.5 + _ramp(x, y, rng)
    cell = side * rng.uniform(0.12, 0.5)
    share = share + rng.uniform(0, 0.7) * (_noise(u, v, cell, rng) - 0.5)
    share = share + rng.uniform(0, 0.5) * (_noise(u, v, cell / 4, rng) - 0.5)
    if rng.random() < 0.35:
        share = share + rng.uniform(0.1, 0.5) * (_texture(u, v, side / 3, rng) - 0.5)
    canvas = first + (second - first) * np.clip(share, 0, 1)[..., None]
    return canvas.astype(np.float32), canvas.mean((0, 1))


def _paint(
    rng: Rng,
    canvas: Array,
    labels: Bytes,
    number: int,
    kind: int,
    centre: NDArray[np.float64],
    radius: float,
    light: float,
    ground: Array,
) -> None:
    """Put one object on top: its shadow, its picture with soft edges, its exact label."""
    reach = 1.4 * radius + 2
    x0, y0 = np.maximum(np.floor(centre - reach), 0).astype(int)
    x1, y1 = (int(v) for v in np.ceil(centre + reach))
    window = np.s_[y0 : max(y1, y0), x0 : max(x1, x0)]
    part = canvas[window]
    height, width = part.shape[:2]
    dx = np.arange(x0, x0 + width, dtype=np.float32)[None] + np.float32(0.5 - centre[0])
    dy = np.arange(y0, y0 + height, dtype=np.float32)[:, None] + np.float32(0.5 - centre[1])
    turn = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = dx * c + dy * s, dy * c - dx * s
    f = _OUTLINES[kind](u, v, radius, rng)
    if kind < 4 and radius > 10 and rng.random() < 0.2:  # a hole, through which one sees
        hole = rng.uniform(-0.25, 0.25, 2) * radius
        f = np.maximum(f, radius * rng.uniform(0.15, 0.3) - np.hypot(u - hole[0], v - hole[1]))
    colour = max((_colour(rng) for _ in range(3)), key=lambda k: np.abs(k - ground).sum())
    if rng.random() < 0.3:
        colour = _colour(rng)  # now and then nearly the ground's own
    other = _colour(rng)
    texture = _texture(u, v, radius, rng)[..., None]
    picture = colour + (other - colour) * texture
    # Light from one side for the whole scene, and darker towards the edge, as if rounded.
    slope = (dx * np.cos(light) + dy * np.sin(light)) / radius
    rim = np.exp(np.minimum(f, 0) / (0.12 * radius))
    shade = 1 + rng.uniform(0, 0.35) * slope - rng.uniform(0, 0.45) * rim
    shadow = rng.uniform(0, 0.45) * np.exp(-np.maximum(f, 0) / (0.1 * radius + 1))
    part *= (1 - shadow * (f > 0))[..., None]
    cover = np.clip(0.5 - f, 0, 1)[..., None]
    part += (picture * shade[..., None] - part) * cover
    labels[window][f < 0] = number
