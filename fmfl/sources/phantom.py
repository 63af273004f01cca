"""Synthetic chest X-rays with exact lung masks, ages, sites and patients.

A picture is made as a radiograph is. Body, lungs, heart, bones and devices are smooth shapes in the
patient's own coordinates; the lengths of their paths along the beam add up to one map of attenuation (Beer-
Lambert), to which scatter, blur, noise and the site's contrast curve are applied. The mask is the outline
of the same lungs, drawn as the V7 annotators draw it: each lung field is one region from apex to diaphragm
that takes in the part behind the heart and every opacity, but not the mediastinum and the spine between the
two.

Patient's coordinates: x grows to the picture's right (the patient's left), y downwards; the inner half-
width of the thorax is 1 and y = 0 is the apex of the lungs. Side -1 is the patient's right lung, at the
picture's left. No random draw depends on the size of the picture, so one seed gives the same picture at
every size. Proportions and how they change with age are set by eye and by the V7 masks; they are not
measurements of people.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import comb, cos, exp, sin
from numbers import Integral
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from fmfl.errors import UserError
from fmfl.sources.metadata import GIVEN

Array = NDArray[np.float32]

LICENCE = "CC BY 4.0"
SIDES = (-1, 1)
FINDINGS = ("normal", "ground glass", "patchy opacities", "consolidation", "effusion", "whiteout")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Typical properties of one hospital's chest X-rays."""

    name: str
    share: float  # of all patients
    ages: tuple[tuple[float, float, float], ...]  # (share, from, to) in years
    findings: tuple[float, ...]  # shares, in the order of FINDINGS
    supine: float  # share of AP pictures; the others are PA
    devices: float  # mean number of tubes, wires and clips
    formats: tuple[tuple[int, int], ...]  # stored width, height; squeezed to a square later, as real sets are
    padded: float  # share of pictures padded to a square instead
    collimated: float  # share with visible collimation borders
    contrast: float  # slope of the display curve
    gamma: float  # > 1 darkens the middle tones
    detail: float  # edge enhancement
    scatter: float  # scattered over primary radiation
    noise: float  # standard deviation, of the display range
    lettering: tuple[str, ...]  # burned-in words besides the side mark
    lettering_from: tuple[float, float] = (0.02, 0.1)  # range of x where they begin


SITES = (
    Site(
        name="children",
        share=0.32,
        ages=((0.7, 0.5, 6.0), (0.25, 6.0, 17.0), (0.05, 17.0, 40.0)),
        findings=(0.28, 0.1, 0.3, 0.2, 0.07, 0.05),
        supine=0.9,
        devices=0.5,
        formats=((1422, 1152), (1468, 993), (1596, 1156), (1096, 832), (1776, 1416)),
        padded=0.0,
        collimated=0.15,
        contrast=0.95,
        gamma=1.1,
        detail=0.15,
        scatter=0.5,
        noise=0.008,
        lettering=("A-P",),
    ),
    Site(
        name="clinic",
        share=0.28,
        ages=((0.1, 2.0, 18.0), (0.5, 18.0, 60.0), (0.4, 60.0, 90.0)),
        findings=(0.42, 0.18, 0.14, 0.13, 0.1, 0.03),
        supine=0.05,
        devices=0.2,
        formats=((2000, 2000), (2022, 1990), (1800, 2000), (2336, 2048)),
        padded=0.0,
        collimated=0.1,
        contrast=1.15,
        gamma=1.0,
        detail=0.6,
        scatter=0.25,
        noise=0.008,
        lettering=(),
    ),
    Site(
        name="intensive",
        share=0.22,
        ages=((0.1, 0.5, 3.0), (0.25, 18.0, 50.0), (0.65, 50.0, 90.0)),
        findings=(0.08, 0.27, 0.22, 0.13, 0.15, 0.15),
        supine=1.0,
        devices=3.0,
        formats=((2500, 2048), (2048, 2048), (2544, 3056)),
        padded=0.1,
        collimated=0.4,
        contrast=0.8,
        gamma=0.85,
        detail=0.3,
        scatter=0.9,
        noise=0.016,
        lettering=("AP", "SUPINE", "MOBILE"),
        lettering_from=(0.66, 0.76),
    ),
    Site(
        name="archive",
        share=0.18,
        ages=((0.25, 0.5, 16.0), (0.5, 16.0, 55.0), (0.25, 55.0, 85.0)),
        findings=(0.33, 0.1, 0.15, 0.21, 0.15, 0.06),
        supine=0.3,
        devices=0.4,
        formats=((1024, 1024), (880, 1024), (1024, 836)),
        padded=0.5,
        collimated=0.6,
        contrast=1.0,
        gamma=1.35,
        detail=0.0,
        scatter=0.4,
        noise=0.014,
        lettering=("12:48",),
    ),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patient:
    """Anatomy of one person, which all of their pictures share. Lengths in half-widths of the thorax."""

    number: int
    site: Site
    age: float  # years
    sex: str
    finding: str
    height: float  # of the lungs, apex to right dome
    apex: float  # x of the apex
    shoulder: float  # exponent of the upper lateral border
    medial: tuple[float, float]  # x of the medial border: right, left
    dome_drop: tuple[float, float]  # how far the costophrenic angle lies below the dome
    dome_top: float  # u of the dome's top
    waves: NDArray[np.float64]  # [5, 3, 3]: the lateral, two medial and two lower borders, see `_wave`
    left_dome: float  # how far the left dome lies below the right
    heart_width: float  # over the width of the thorax (cardiothoracic ratio)
    heart_tilt: float  # radians
    calcium: float  # of the aortic arch, 0 none .. 0.7
    aorta: float  # radius of the knob; grows as the aorta unfolds with age
    vessels: float  # half-width of the upper mediastinum
    thymus: float  # 0 none .. 1 large
    rib_drop: float  # from spine to front end
    rib_width: float
    bone: float
    scoliosis: float
    fat: float  # thickness of the soft tissue outside the ribs
    breast: float
    air: float  # 1 normal, more in emphysema
    anatomy_seed: tuple[int, ...]


def _draw_patient(seed: int, number: int) -> Patient:
    rng = default_rng([seed, 1, number])
    site = SITES[rng.choice(len(SITES), p=[site.share for site in SITES])]
    band = site.ages[rng.choice(len(site.ages), p=[share for share, *_ in site.ages])]
    age = round(float(rng.uniform(*band[1:])), 1)
    sex = "F" if rng.random() < 0.48 else "M"
    finding = FINDINGS[rng.choice(len(FINDINGS), p=site.findings)]
    grown = 1 - exp(-age / 6)
    old = float(np.clip((age - 50) / 40, 0, 1))
    emphysema = old * (rng.random() < 0.4) * rng.uniform(0.3, 1)
    return Patient(
        number=number,
        site=site,
        age=age,
        sex=sex,
        finding=finding,
        **_draw_lungs(rng, sex, grown, old, emphysema),
        heart_width=0.57 - 0.11 * grown + 0.05 * old - 0.07 * emphysema + rng.normal(0, 0.03),
        heart_tilt=0.55 + 0.15 * grown + rng.normal(0, 0.1),
        calcium=max(0.0, old - 0.3) * rng.uniform(0, 1),
        aorta=0.1 + 0.02 * grown + 0.06 * old * rng.uniform(0.3, 1),
        vessels=rng.normal(0.2, 0.025),
        thymus=max(0.0, 1 - age / 3) * rng.uniform(0, 1),
        rib_drop=0.26 + 0.36 * grown + 0.06 * old + rng.normal(0, 0.03),
        rib_width=0.043 + rng.normal(0, 0.003),
        bone=(0.75 + 0.25 * grown - 0.3 * old) * rng.uniform(0.85, 1.15),
        scoliosis=rng.normal(0, 0.015 + 0.03 * old),
        fat=rng.gamma(3, 0.02 + 0.03 * grown) + 0.05,
        breast=rng.uniform(0.3, 1) if sex == "F" and age > 13 else 0.0,
        air=1 + 0.2 * emphysema,
        anatomy_seed=(seed, 2, number),
    )


def _draw_lungs(rng: Generator, sex: str, grown: float, old: float, emphysema: float) -> dict[str, Any]:
    """Draw the borders of the lungs; the order of the draws is part of every picture."""
    kyphosis = old * rng.uniform(0, 1)  # a bent back shortens the lungs in the picture
    height = 1.2 + grown * (0.37 if sex == "F" else 0.42) + 0.2 * emphysema - 0.12 * kyphosis
    return {
        "height": height + rng.normal(0, 0.06),
        "apex": rng.normal(0.42, 0.025),
        "shoulder": rng.uniform(1.4, 2.15),
        "medial": tuple(rng.normal((0.15, 0.17), 0.028).tolist()),
        "dome_drop": tuple(
            ((0.17 + 0.12 * grown) * (1 - 0.6 * emphysema) * rng.uniform(0.75, 1.3, 2)).tolist()
        ),
        "dome_top": rng.uniform(0.36, 0.52),
        "waves": np.stack(
            [
                rng.normal(0, 0.009, (5, 3)) * np.array([1, 1.9, 1.9, 1.6, 1.6])[:, None],
                rng.uniform((2, 4, 7), (4, 7, 12), (5, 3)),
                rng.uniform(0, 2 * np.pi, (5, 3)),
            ],
            -1,
        ),
        "left_dome": rng.normal(0.06, 0.06),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Geometry of one picture of a patient, and the posture and breath of that day."""

    supine: bool
    width: int  # of the stored picture, pixels
    height: int
    frame: tuple[float, float, float, float]  # exposed part of the square picture: x0 y0 x1 y1 in 0..1
    place: NDArray[np.float64]  # 2 x 3: patient's coordinates to the unit square
    breath: float  # how far the diaphragm lies below its usual place
    turn: float  # of the patient about the long axis; moves front against back
    arms: float  # 0 down, 1 raised


def _draw_view(patient: Patient, rng: Generator) -> View:
    site = patient.site
    supine = bool(rng.random() < site.supine)
    width, height = site.formats[rng.integers(len(site.formats))]
    breath = rng.normal(-0.08 if supine else 0.0, 0.06) * patient.height / 1.5
    frame = (0.0, 0.0, 1.0, 1.0)
    aspect = width / height
    if rng.random() < site.padded:
        margin = rng.uniform(0.02, 0.12)
        frame = (margin, 0.0, 1 - margin, 1.0) if rng.random() < 0.6 else (0.0, margin, 1.0, 1 - margin)
        width = height = max(width, height)
        aspect = 1.0
    if rng.random() < site.collimated:
        x0, y0, x1, y1 = np.array(frame) + np.array([1, 1, -1, -1]) * rng.uniform(0, 0.06, 4)
        frame = (float(x0), float(y0), float(x1), float(y1))
    # pictures per unit of x: the lungs take the share of the picture that they take in the V7 set
    total = patient.height + breath + max(patient.dome_drop)
    scale = rng.normal(0.8, 0.07) / 2 * (frame[2] - frame[0])
    scale = min(scale, rng.normal(0.82, 0.1) / total / aspect)
    angle = rng.normal(0, 0.05)
    turn_matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = np.diag([scale, scale * aspect]) @ turn_matrix
    centre = np.array([0.5, 0.49]) + rng.normal(0, (0.03, 0.045))
    offset = centre - linear @ [0.0, total / 2]
    return View(
        supine=supine,
        width=width,
        height=height,
        frame=frame,
        place=np.column_stack([linear, offset]),
        breath=breath,
        turn=rng.normal(0, 0.07),
        arms=float(rng.random() < 0.5) if patient.age < 6 else 0.0,
    )


def _wave(at: NDArray[np.float64] | float, wave: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a sum of sines; wave [n, 3] holds amplitudes, angular frequencies and phases."""
    amplitude, frequency, phase = wave.T
    return np.sin(np.multiply.outer(at, frequency) + phase) @ amplitude


# The lungs' borders. u = side * x is the distance from the midline.


def _lateral(patient: Patient, y: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return u of the chest wall's inner border at height y."""
    rise = np.clip(1 - y / (0.82 * patient.height), 0, 1)
    return (
        patient.apex + (1 - patient.apex) * (1 - rise**patient.shoulder) ** 0.53 + _wave(y, patient.waves[0])
    )


def _medial(patient: Patient, view: View, side: int, y: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return u of the border to the mediastinum, as annotators draw it: nearly vertical, beside the spine."""
    straight = (
        patient.medial[(side + 1) // 2] + side * view.turn * 0.5 + _wave(y, patient.waves[1 + (side > 0)])
    )
    straight = np.maximum(straight, 0.04)  # however turned, the lungs do not meet
    curl = np.clip(1 - y / (0.16 * patient.height), 0, 1)
    return straight + (patient.apex - straight) * (1 - np.sqrt(1 - curl**2))


def _dome(patient: Patient, view: View, side: int, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return y of the diaphragm at distance u from the midline."""
    top = patient.dome_top
    lateral = np.clip((u - top) / (1 - top), 0, 1.1)
    medial = np.clip((top - u) / top, 0, 1.5)
    height = patient.height + view.breath + (patient.left_dome if side > 0 else 0.0)
    drop = patient.dome_drop[(side + 1) // 2]
    return height + drop * lateral**2.3 + 0.06 * medial**2 + _wave(u, patient.waves[3 + (side > 0)])


def _outline(patient: Patient, view: View, side: int) -> NDArray[np.float64]:
    """Return the closed border of one lung field, [n, 2] in the patient's coordinates."""
    heights = 1.5 * patient.height * np.linspace(0, 1, 90) ** 2  # closest together where the apex curves
    corner = patient.height + patient.dome_drop[(side + 1) // 2]
    bottom_u = np.linspace(_lateral(patient, corner), _medial(patient, view, side, patient.height), 60)
    bottom = np.column_stack([bottom_u, _dome(patient, view, side, bottom_u)])
    lateral = np.column_stack([_lateral(patient, heights), heights])
    medial = np.column_stack([_medial(patient, view, side, heights), heights])[::-1]
    border = np.concatenate(
        [lateral[lateral[:, 1] < bottom[0, 1]], bottom, medial[medial[:, 1] < bottom[-1, 1]]]
    )
    return border * (side, 1)


def _draw_mask(patient: Patient, view: View, size: int) -> NDArray[np.uint8]:
    """Draw a lung mask [H, W] at four times the size; a pixel counts where half of it is lung."""
    fine = np.zeros((4 * size, 4 * size), np.uint8)
    for side in SIDES:
        points = _outline(patient, view, side) @ view.place[:, :2].T + view.place[:, 2]
        cv2.fillPoly(fine, [np.round((points * 4 * size - 0.5) * 256).astype(np.int32)], 255, shift=8)
    x0, y0, x1, y1 = np.round(np.array(view.frame) * 4 * size).astype(int)
    fine[:y0] = fine[y1:] = fine[:, :x0] = fine[:, x1:] = 0
    return (cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA) >= 128).astype(np.uint8)


class Tubes:
    """Sum of the shadows of tubes (ribs, vessels, wires): points spread over each tube, then one histogram.

    Spreading the mass keeps thin tubes right at every size of picture: half a pixel wide, half the shadow.
    """

    def __init__(self, to_pixels: NDArray[np.float64], size: int):
        self.to_pixels = to_pixels.astype(np.float32)
        self.size = size
        self.pixels = np.float32(abs(np.linalg.det(to_pixels[:, :2])))  # in a unit square of the patient
        self.step = 0.85 / np.sqrt(self.pixels)
        self.places: list[Array] = []
        self.masses: list[Array] = []

    def add(self, centre: Array, radius: Array | float, weight: Array | float, *, wall: float = 1.0) -> None:
        """Add k tubes: centre [k, n, 2], radius and weight (scalar, [m], [k, 1] or [k, m]; evenly spaced).

        The weight is the shadow in the middle of a solid tube; wall < 1 makes the inside hollow, as bone is.
        """
        centre = np.asarray(centre, np.float32)
        length = np.sqrt(np.square(centre[:, 1:] - centre[:, :-1]).sum(2)).sum(1).max()
        samples = max(int(np.ceil(length / self.step)), 2)
        centre = _resample(centre, samples + 1)
        along = centre[:, 1:] - centre[:, :-1]
        centre = 0.5 * (centre[:, 1:] + centre[:, :-1])
        radius, weight = (
            _resample(np.atleast_2d(values).astype(np.float32)[..., None], samples)
            for values in (radius, weight)
        )
        step = np.sqrt(np.square(along).sum(2, keepdims=True)) + np.float32(1e-9)
        normal = along[..., ::-1] * (np.array([-1, 1], np.float32) / step * radius)
        rows = max(int(np.ceil(2 * float(radius.max()) / self.step)), 1)
        across = ((np.arange(rows, dtype=np.float32) + 0.5) / rows) * 2 - 1
        chord = np.sqrt(1 - across**2)
        if wall < 1:
            chord = chord - 0.75 * np.sqrt(np.clip((1 - wall) ** 2 - across**2, 0, None))
        places = centre[:, :, None] + normal[:, :, None] * across[:, None]
        self.places.append(places.reshape(-1, 2))
        self.masses.append(((weight * step * radius * np.float32(2 / rows)) * chord).ravel())

    def render(self) -> Array:
        """Return the summed shadows, [H, W]."""
        if not self.places:
            return np.zeros((self.size, self.size), np.float32)
        places = np.concatenate(self.places)
        a = self.to_pixels
        x = a[0, 0] * places[:, 0] + a[0, 1] * places[:, 1] + a[0, 2]
        y = a[1, 0] * places[:, 0] + a[1, 1] * places[:, 1] + a[1, 2]
        last = self.size - 1.001
        mass = np.concatenate(self.masses) * self.pixels
        mass *= (x > 0) & (x < last) & (y > 0) & (y < last)
        x, y = np.clip(x, 0, last), np.clip(y, 0, last)
        column, row = x.astype(np.int32), y.astype(np.int32)
        right, down = x - column, y - row
        index = row * self.size + column
        low = mass * down
        high = mass - low
        pieces = (
            (0, high - high * right),
            (1, high * right),
            (self.size, low - low * right),
            (self.size + 1, low * right),
        )
        total = sum(np.bincount(index + shift, piece, self.size**2) for shift, piece in pieces)
        return total.astype(np.float32).reshape(self.size, self.size)


def _resample(values: Array, samples: int) -> Array:
    """Interpolate [k, n, c] to [k, samples, c], linearly in the index."""
    count = values.shape[1]
    if count == 1:
        return values
    at = np.arange(samples, dtype=np.float32) * np.float32((count - 1) / (samples - 1))
    low = np.minimum(at.astype(np.intp), count - 2)
    share = (at - low)[None, :, None]
    first = values[:, low]
    return first + (values[:, low + 1] - first) * share


@lru_cache
def _basis(degree: int, samples: int) -> NDArray[np.float64]:
    t = np.linspace(0, 1, samples)[:, None]
    return np.concatenate([comb(degree, i) * t**i * (1 - t) ** (degree - i) for i in range(degree + 1)], 1)


def _bezier(*knots: NDArray[np.float64], samples: int = 16) -> NDArray[np.float64]:
    """Return Bezier curves [k, samples, 2] with these control points, each [k, 2] or [2]."""
    points = np.stack([np.atleast_2d(knot) for knot in knots], 1)
    return _basis(len(knots) - 1, samples) @ points


def _ball(
    x: Array, y: Array, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0
) -> Array:
    """Return the path through an ellipsoid, 1 in its middle."""
    dx, dy = x - centre[0], y - centre[1]
    c, s = cos(angle), sin(angle)
    a = c / radii[0] * dx + s / radii[0] * dy
    b = c / radii[1] * dy - s / radii[1] * dx
    return np.sqrt(np.clip(1 - a * a - b * b, 0, None))


def _bump(value: Array, width: float) -> Array:
    """Return a smooth hump of height 1 about zero that ends at +- width * sqrt(2)."""
    v = np.clip(1 - 0.5 * np.square(value * np.float32(1 / width)), 0, 1)
    return v * v


def _along(function: Callable[[NDArray[np.float64]], NDArray[np.float64]], at: Array) -> Array:
    """Return function(at) from a fine table: thousands of pixels have the same coordinate."""
    low, high = float(at.min()), float(at.max())
    table = function(np.linspace(low, high, 2048)).astype(np.float32)
    return table[((at - low) * np.float32(2047 / (high - low))).astype(np.int32)]


def _rise(value: Array, width: float) -> Array:
    """Return 0 below zero, 1 above width, and between them the path through a round edge."""
    v = np.clip(value / width, 0, 1)
    return np.sqrt(v * (2 - v))


def _step(value: Array, width: float) -> Array:
    """Return a smooth step from 0 to 1 over +- width."""
    v = np.clip(value / (2 * width) + 0.5, 0, 1)
    return v * v * (3 - 2 * v)


def _ribs(patient: Patient, view: View, bones: Tubes) -> None:
    number = np.arange(12)
    start = (number - 0.4) * patient.height / 9.8 - 0.06
    drop = patient.rib_drop * np.interp(number, [0, 2, 6, 11], [0.45, 0.75, 1.1, 1.2])
    reach = _lateral(patient, np.maximum(start + drop * 0.5, 0.04)) + patient.rib_width * 0.9
    last = np.interp(number, [0, 1, 4, 7, 9, 10, 11], [2.7, 2.75, 2.45, 2.2, 2.0, 1.5, 1.0])[:, None]
    phi = last * np.linspace(0.06, 1, 40)  # 0 at the spine, pi/2 at the side, pi at the breastbone
    front = 0.5 * (1 - np.cos(phi))
    u = reach[:, None] * np.sin(phi) ** 0.85 + 0.03
    y = start[:, None] + drop[:, None] * front + 0.12 * patient.rib_drop * np.sin(phi)
    centre = np.concatenate([np.stack([side * u + view.turn * (front - 0.5), y], -1) for side in SIDES])
    # a rib runs along the beam at the side of the chest: more bone in the same shadow
    oblique = 1 / np.sqrt(np.cos(phi) ** 2 + 0.6)
    fading = np.interp(phi / last, [0, 0.9, 1], [1, 1, 0.4])
    weight = np.tile(0.15 * patient.bone * oblique * fading * np.where(phi > 1.57, 0.62, 1), (2, 1))
    radius = np.tile(patient.rib_width * (0.7 + 0.3 * np.abs(np.cos(phi)) + 0.2 * (phi > 1.9)), (2, 1))
    bones.add(centre, radius, weight, wall=0.3)


def _shoulders(patient: Patient, view: View, bones: Tubes) -> None:
    lift = 0.1 if view.supine else 0.0
    mirror = np.array([[-1, 1], [1, 1]])
    turn = np.array([view.turn, 0])
    clavicle = [(0.14, 0.16 - lift), (0.5, 0.1 - lift), (0.7, -0.16 - lift), (1.2, -0.16 - lift)]
    knots = [mirror * knot + turn * share for knot, share in zip(clavicle, (1, 0.7, 0.3, 0), strict=True)]
    bones.add(_bezier(*knots), np.array([0.055, 0.04, 0.04, 0.055]), 0.3 * patient.bone, wall=0.3)
    out = 0.08 if view.supine else 0.22
    top, tip, inner = np.array([(1.1 + out, 0.02), (0.78 + out, 0.72), (0.62 + out, 0.1)])
    ends = np.array([(top, tip), (inner, tip), (inner, top)])
    ends = np.concatenate([ends * [-1, 1], ends])
    bones.add(ends, np.array([0.05, 0.03]), np.array([[0.17], [0.08], [0.1]] * 2) * patient.bone, wall=0.4)
    head, elbow = _arm(view)
    arms = _bezier(mirror * head, mirror * (head + elbow) / 2, mirror * elbow)
    bones.add(arms, np.array([0.12, 0.075, 0.07]), 0.35 * patient.bone, wall=0.3)


def _arm(view: View) -> NDArray[np.float64]:
    """Return the shoulder joint and the elbow of the left arm, [2, 2]."""
    return np.array([(1.36, 0.05), (1.95, -0.5) if view.arms else (1.65, 1.3)])


def _spine(patient: Patient, view: View, x: Array, y: Array) -> Array:
    level = y * np.float32(9.6 / patient.height)
    phase = np.abs(level - np.floor(level) - 0.5) * 2  # 0 mid vertebra, 1 disc
    middle = _along(lambda at: patient.scoliosis * np.sin(2.2 * at) - view.turn * 0.5, y)
    across = np.abs((x - middle) / (0.11 + 0.014 * y + 0.012 * phase))
    edge = _step(1 - across, 0.12)
    body = edge * (0.65 + 0.35 * _step(0.78 - phase, 0.1))
    plates = edge * _bump(phase - 0.74, 0.12)
    pedicles = _bump(across - 0.62, 0.26) * _bump(phase - 0.35, 0.4)
    spinous = _bump(across, 0.22) * _bump(phase - 0.2, 0.6)
    return (0.065 * body + 0.03 * plates + 0.05 * pedicles + 0.045 * spinous) * np.float32(patient.bone)


def _vessels(patient: Patient, tubes: Tubes, rng: Generator) -> None:
    """Add two trees from the hila, each branch parting in two."""
    trunks = 8
    mirror = np.repeat([-1.0, 1.0], trunks)
    angle = np.tile(np.linspace(-1.4, 1.5, trunks), 2) + rng.normal(0, 0.15, 2 * trunks)
    start = np.array([0.24, 0.47 * patient.height]) + rng.normal(0, (0.03, 0.07), (2 * trunks, 2))
    start[:, 1] += 0.15 * np.sin(angle)  # the arteries leave the hilum one below the other, not from a point
    length, radius = rng.uniform(0.18, 0.3, 2 * trunks), rng.uniform(0.014, 0.026, 2 * trunks)
    for _ in range(5):
        way = np.stack([np.cos(angle), np.sin(angle)], 1)
        bend = rng.normal(0, 0.14, (len(angle), 1))
        end = start + length[:, None] * way
        middle = start + 0.5 * length[:, None] * (way + bend * way[:, ::-1] * [-1, 1])
        curves = _bezier(start, middle, end, samples=8)
        curves[..., 0] *= mirror[:, None]
        tubes.add(curves, np.stack([radius, 0.75 * radius], 1), 5.5 * radius[:, None])
        parting = rng.uniform(0.1, 0.6, (2, len(angle))) * [[-1], [1]]
        angle = (angle + parting).ravel()
        start, mirror = np.concatenate([end, end]), np.tile(mirror, 2)
        radius = np.tile(0.74 * radius, 2) * rng.uniform(0.8, 1.1, len(angle))
        length = np.tile(0.78 * length, 2) * rng.uniform(0.7, 1.2, len(angle))


def _airways(patient: Patient, view: View, tubes: Tubes) -> None:
    """Add windpipe and main bronchi: less tissue in the beam."""
    shift = np.array([view.turn * 0.5, 0.0])
    fork = np.array([0.0, 0.38 * patient.height]) + shift
    tubes.add(np.array([[(0.0, -1.2), fork]]), 0.075, np.array([-0.1, -0.1, -0.03]))
    ends = np.array([(-0.24, 0.48), (0.28, 0.5)]) * [1, patient.height] + shift
    tubes.add(_bezier(np.tile(fork, (2, 1)), (fork + ends) / 2, ends), np.array([0.06, 0.04]), -0.06)


def _texture(rng: Generator, view: View, size: int, cells: int) -> Array:
    """Draw smooth noise fixed to the patient, [H, W], about N(0, 1); one grain is 3.6 / cells wide."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    to_grid = np.array([[cells / 3.6, 0, cells / 2], [0, cells / 3.6, cells * 0.2]])
    inverse = _compose(to_grid, _from_pixels(view, size))
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(grid, inverse, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT)


def _to_pixels(view: View, size: int) -> NDArray[np.float64]:
    return view.place * size - [[0, 0, 0.5], [0, 0, 0.5]]


def _from_pixels(view: View, size: int) -> NDArray[np.float64]:
    return cv2.invertAffineTransform(_to_pixels(view, size))


def _compose(outer: NDArray[np.float64], inner: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2] + outer[:, 2]])


def _opacity(patient: Patient, view: View, x: Array, y: Array, severity: float, size: int) -> Array:
    """Return the share of the air that disease has replaced, 0..1."""
    rng = default_rng([*patient.anatomy_seed, 7])
    cloud = 0.6 * _texture(rng, view, size, 14) + 0.4 * _texture(rng, view, size, 34)
    t = y / patient.height
    share = np.zeros_like(x)
    sides = SIDES if rng.random() < 0.5 else (SIDES[rng.integers(2)],)
    for side in sides:
        here = _step(side * x, 0.05)
        u = side * x
        if patient.finding == "ground glass":
            share += here * severity * 0.6 * _step(t - rng.uniform(0.1, 0.5) + 0.35 * cloud, 0.35)
        elif patient.finding == "patchy opacities":
            for _ in range(rng.integers(2, 6)):
                at = rng.uniform((0.25, 0.2), (0.9, 0.95)).tolist()
                reach = rng.uniform(0.1, 0.28)
                blob = 1 - np.hypot(u - at[0], (t - at[1]) * patient.height) / reach + 0.5 * cloud
                share = np.maximum(share, here * severity * rng.uniform(0.4, 0.95) * _step(blob, 0.5))
        elif patient.finding == "consolidation":
            edge = rng.uniform(0.4, 0.65) + rng.uniform(-0.2, 0.2) * u
            upper = -1 if rng.random() < 0.4 else 1
            lobe = _step(upper * (t - edge) + 0.05 * cloud, rng.uniform(0.03, 0.15)) * _step(
                0.9 + 0.6 * cloud, 0.6
            )
            share += here * lobe * severity * rng.uniform(0.6, 1)
        elif patient.finding == "effusion":
            level = 0.98 - 0.3 * severity * rng.uniform(0.3, 1)
            share += here * _step(
                t - level + 0.3 * np.square(np.clip(u - 0.3, 0, None)) + 0.015 * cloud, 0.05
            )
        elif patient.finding == "whiteout":
            share += here * np.clip(severity * (0.9 + 0.15 * cloud), 0, 0.97)
    return np.clip(share, 0, 0.98)


def _air(patient: Patient, view: View, x: Array, y: Array, disease: Array) -> Array:
    """Return the path through air in the lungs, 0..1; disease is the share that something else fills."""
    u = np.abs(x)
    wall = _along(lambda at: _lateral(patient, np.maximum(at, 0)), y) - u
    dome = (
        _along(lambda at: np.where(at < 0, *(_dome(patient, view, side, np.abs(at)) for side in SIDES)), x)
        - y
    )
    inner = u - np.where(
        x < 0,
        *(_along(lambda at, side=side: _medial(patient, view, side, np.maximum(at, 0)), y) for side in SIDES),
    )
    air = _rise(wall, 0.45) * _along(lambda at: (0.4 + 0.6 * _rise(at, 0.45)) * _rise(at, 0.04), y)
    # the lung reaches down behind the dome of the diaphragm
    air *= np.where(dome > 0, 0.45 + 0.55 * _rise(dome, 0.35), 0.12 * np.exp(np.minimum(dome, 0) * 9))
    air *= _step(inner - 0.01, 0.05)
    air *= 1 - 0.75 * _heart(patient, view, x, y)
    air *= 1 - 0.8 * _great_vessels(patient, view, x, y)
    t = y * np.float32(1 / patient.height)
    air *= 1 - 0.4 * _bump(u - 0.27, 0.1) * _bump(t - 0.48, 0.12)  # the hila
    return air * (1 - disease)


def _heart(patient: Patient, view: View, x: Array, y: Array) -> Array:
    half = patient.heart_width * (1.08 if view.supine else 1.0)
    floor = patient.height + view.breath + 0.1
    middle = view.turn * 0.8
    ventricle = _ball(
        x, y, (middle + 0.5 * half, floor - 0.55 * half), (0.98 * half, 0.66 * half), patient.heart_tilt
    )
    atrium = _ball(x, y, (middle - 0.2 * half, floor - 0.48 * half), (0.46 * half, 0.64 * half))
    trunk = _ball(x, y, (middle + 0.17, floor - 1.35 * half), (0.15, 0.24))
    return np.sqrt(np.maximum(np.maximum(ventricle, atrium), 0.7 * trunk))


def _knob(patient: Patient, view: View) -> tuple[float, float]:
    """Return the centre of the aortic knob."""
    return 0.16 + view.turn * 0.5, 0.25 * patient.height


def _great_vessels(patient: Patient, view: View, x: Array, y: Array) -> Array:
    band = _step(patient.vessels - np.abs(x - 0.5 * view.turn), 0.035)
    great = np.maximum(band, _ball(x, y, _knob(patient, view), (patient.aorta, patient.aorta * 1.1)))
    if patient.thymus > 0.1:
        reach = 0.28 + 0.3 * patient.thymus
        great = np.maximum(great, _ball(x, y, (view.turn, 0.28 * patient.height), (reach, 0.42)))
    return great


def _calcified_arch(patient: Patient, view: View, bones: Tubes) -> None:
    if patient.calcium > 0:
        angle = np.linspace(-1.9, 0.6, 24)
        rim = _knob(patient, view) + 0.93 * patient.aorta * np.stack([np.cos(angle), 1.1 * np.sin(angle)], 1)
        bones.add(rim[None], 0.012, 0.35 * patient.calcium)


def _body(patient: Patient, view: View, x: Array, y: Array) -> Array:
    """Return the length of the path through the whole body, 1 about the middle of the chest."""
    knots = np.array([-1.5, -0.55, -0.42, -0.3, -0.15, 0.0, 0.2, 0.5, 0.8, 5.0])
    half = np.array([0.4, 0.38, 0.42, 0.65, 1.2, 1.42, 1.4, 1.14, 1.1, 1.1]) + patient.fat * (knots > -0.3)
    inverse = _along(lambda at: 1 / np.interp(at, knots, half), y)
    trunk = np.sqrt(np.clip(1 - np.square(np.square(x * inverse)), 0, None))
    trunk *= _along(lambda at: np.interp(at, [-0.6, 0.1, 1.0], [0.72, 0.9, 1.0]), y)
    head, elbow = _arm(view).astype(np.float32)
    way = elbow - head
    dx, dy = np.abs(x) - head[0], y - head[1]
    share = np.clip((dx * way[0] + dy * way[1]) / (way @ way), 0, 1)
    gap = np.square(dx - share * way[0]) + np.square(dy - share * way[1])
    arms = 0.5 * np.sqrt(np.clip(1 - gap / (0.2 + patient.fat) ** 2, 0, None))
    return np.maximum(trunk, arms) + 0.25 * np.minimum(trunk, arms)


def _abdomen_gas(patient: Patient, view: View, x: Array, y: Array, rng: Generator) -> Array:
    """Return the path through gas below the diaphragm: the stomach's bubble, most often, and bowel."""
    base = patient.height + view.breath + patient.left_dome
    bubble = _ball(x, y, (rng.uniform(0.4, 0.6), base + 0.22), tuple(rng.uniform(0.1, 0.22, 2).tolist()))
    gas = bubble * (0.4 if rng.random() < 0.6 else 0.0)
    for _ in range(rng.integers(0, 4)):
        at = (rng.uniform(-0.2, 0.8), base + rng.uniform(0.3, 0.6))
        gas = gas + 0.2 * _ball(x, y, at, tuple(rng.uniform(0.05, 0.15, 2).tolist()), rng.uniform(0, 3))
    return gas


DEVICES = {
    "wire": 0.27,
    "electrode": 0.31,
    "central line": 0.16,
    "airway": 0.12,
    "gastric tube": 0.1,
    "pacemaker": 0.04,
}


def _devices(patient: Patient, metal: Tubes, rng: Generator) -> None:
    h = patient.height

    def path(*knots: NDArray[np.float64] | tuple[float, float]) -> NDArray[np.float64]:
        return _bezier(*map(np.array, knots), samples=40)

    for _ in range(rng.poisson(patient.site.devices)):
        kind = rng.choice(list(DEVICES), p=list(DEVICES.values()))
        if kind == "wire":
            metal.add(path(*rng.uniform((-1.2, -0.2), (1.2, h + 0.3), (4, 2))), 0.008, 0.2)
        elif kind == "electrode":
            at = np.array([rng.choice(SIDES) * rng.uniform(0.4, 1.1), rng.uniform(0.0, h + 0.2)])
            angle = np.linspace(0, 2 * np.pi, 20)
            metal.add((at + 0.05 * np.stack([np.cos(angle), np.sin(angle)], 1))[None], 0.011, 0.28)
            metal.add(path(at, at + rng.normal(0, 0.4, 2), at + rng.normal(0, 0.9, 2)), 0.008, 0.2)
        elif kind == "central line":
            metal.add(path((-0.6, -0.3), (-0.1, -0.05), (-0.2, 0.2), (-0.17, 0.5 * h)), 0.011, 0.22)
        elif kind == "airway":
            metal.add(path((0.0, -0.8), (0.02, -0.2), (0.0, 0.25 * h)), 0.03, 0.16, wall=0.3)
        elif kind == "gastric tube":
            metal.add(path((0.0, -0.8), (0.03, 0.5), (-0.02, h), (0.45, h + 0.3)), 0.014, 0.2)
        else:
            metal.add(path((0.54, 0.2), (0.62, 0.2), (0.7, 0.2)), 0.09, 0.45)
            metal.add(path((0.62, 0.2), (0.0, 0.0), (-0.3, 0.6 * h), (0.25, 0.9 * h)), 0.011, 0.28)


def _lettering(site: Site, size: int, rng: Generator) -> Array:
    """Draw burned-in marks, [H, W] in 0..1; at one fixed size first, so that they are the same at any."""
    side = 384
    page = np.zeros((side, side), np.uint8)
    scale, low = rng.uniform(0.6, 1.1), int(rng.uniform(0.08, 0.4) * side)
    mark, x = ("R", rng.uniform(0.02, 0.12)) if rng.random() < 0.7 else ("L", rng.uniform(0.86, 0.93))
    if rng.random() < 0.85:
        cv2.putText(page, mark, (int(x * side), low), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 2, cv2.LINE_AA)
    for row, word in enumerate(site.lettering):
        at = (int(rng.uniform(*site.lettering_from) * side), 22 + 18 * row)
        if rng.random() < 0.6:
            cv2.putText(page, word, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1, cv2.LINE_AA)
    return cv2.resize(page, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _blur(image: Array, width: float) -> Array:
    """Blur by a Gaussian, the width as a share of the picture."""
    return cv2.GaussianBlur(image, (0, 0), max(width * image.shape[0], 0.01))


def _develop(site: Site, view: View, attenuation: Array, body: Array, rng: Generator) -> Array:
    """Return grey values 0..1 of an attenuation: scatter, blur, edges, display curve, noise, borders."""
    size = attenuation.shape[0]
    primary = np.exp(-3.2 * attenuation)
    small = cv2.resize(primary, (32, 32), interpolation=cv2.INTER_AREA)
    veil = cv2.resize(_blur(small, 0.12), (size, size), interpolation=cv2.INTER_LINEAR)
    density = -np.log(primary + 0.5 * site.scatter * rng.uniform(0.7, 1.3) * veil + 1e-3)
    density = _blur(density, rng.uniform(0.0015, 0.004))
    if site.detail:
        fine, coarse = density - _blur(density, 0.02), density - _blur(density, 0.08)
        density += site.detail * (fine + 0.4 * coarse)
    # the display's window: from the thinnest to the thickest part of the body, then exposure and taste
    shown = density[body > 0.1]
    low, high = np.percentile(shown, [1, 99]).tolist() if shown.size else (0.0, 1.0)
    grey = np.clip(0.08 + 0.86 * (density - low) / (high - low + 1e-6), 0, 1)
    grey = 0.5 + site.contrast * rng.uniform(0.5, 1.15) * (grey - 0.5) + rng.normal(0, 0.08)
    grey = 0.05 + (np.clip(grey, 0, 1) ** (site.gamma * rng.uniform(0.8, 1.25)) - 0.05) * _step(
        body - 0.08, 0.08
    )
    noise = cv2.resize(
        rng.standard_normal((256, 256), dtype=np.float32), (size, size), interpolation=cv2.INTER_AREA
    )
    grey += site.noise * rng.uniform(0.5, 1.6) * (0.5 + grey) * noise
    across = np.linspace(-1, 1, size, dtype=np.float32)
    vignette = rng.uniform(0.05, 0.25) if rng.random() < 0.4 else 0.0
    grey *= 1 - vignette * (np.square(across)[:, None] + np.square(across)) / 2
    frame = size * np.array(view.frame, np.float32)[:, None]
    pixel = np.arange(size, dtype=np.float32)
    columns, rows = np.clip(pixel + 1 - frame[:2], 0, 1) * np.clip(frame[2:] - pixel, 0, 1)
    return grey * rows[:, None] * columns


def _draw_image(patient: Patient, view: View, size: int, rng: Generator) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    back = _from_pixels(view, size).astype(np.float32)
    x = back[0, 0] * columns + back[0, 1] * rows + back[0, 2]
    y = back[1, 0] * columns + back[1, 1] * rows + back[1, 2]
    to_pixels = _to_pixels(view, size)
    bones, vessels = Tubes(to_pixels, size), Tubes(to_pixels, size)
    _ribs(patient, view, bones)
    _shoulders(patient, view, bones)
    _calcified_arch(patient, view, bones)
    _airways(patient, view, bones)
    _devices(patient, bones, rng)
    _vessels(patient, vessels, default_rng([*patient.anatomy_seed, 5]))
    body = _body(patient, view, x, y)
    severity = rng.uniform(0.55, 1.1)
    air = _air(patient, view, x, y, _opacity(patient, view, x, y, severity, size))
    total = body - 0.62 * patient.air * air
    tissue = default_rng([*patient.anatomy_seed, 6])
    grain, unevenness = _texture(tissue, view, size, 80), _texture(tissue, view, size, 9)
    total += 0.025 * unevenness * body
    total += (np.minimum(vessels.render(), 0.3) + 0.012 * grain) * np.minimum(air * 1.6, 1)
    total -= _abdomen_gas(patient, view, x, y, rng)
    if patient.breast:
        at = (0.6, (0.72 + 0.15 * (patient.age > 50)) * patient.height)
        total += 0.13 * patient.breast * _ball(np.abs(x), y, at, (0.48, 0.42))
    total += _spine(patient, view, x, y) + bones.render()
    grey = _develop(patient.site, view, np.maximum(total, 0) * _step(body - 0.05, 0.05), body, rng)
    grey = np.maximum(grey, rng.uniform(0.8, 1) * _lettering(patient.site, size, rng))
    return np.clip(np.round(255 * grey), 0, 255).astype(np.uint8)


def _patients_of_images(seed: int, num_images: int) -> Iterator[tuple[Patient, int]]:
    """Yield each image's patient, and the picture's number among that patient's."""
    number = made = 0
    while made < num_images:
        patient = _draw_patient(seed, number)
        for picture in range(default_rng([seed, 3, number]).choice([1, 2, 3], p=[0.75, 0.17, 0.08])):
            yield patient, picture
            made += 1
            if made == num_images:
                return
        number += 1


def generate(
    num_images: int, size: int = 128, seed: int = 0, *, workers: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], pd.DataFrame]:
    """Draw synthetic chest X-rays with lung masks.

    Image i depends on seed and i only: a longer set begins with the shorter one, whatever the number of
    workers, and another size gives the same pictures.

    Args:
        num_images: N >= 0.
        size: side of the square pictures in pixels, >= 16.
        seed: >= 0.
        workers: threads; by default one a core.

    Returns:
        Images [N, H, W] uint8, masks [N, H, W] uint8 in {0, 1}, and a table with one row an image and the
        columns `metadata.GIVEN`: age is in years, 0.5 to 90; original_width and original_height are the
        format that the square was squeezed from.

    Raises:
        UserError: a number is not whole or out of range.
    """
    workers = workers or os.cpu_count() or 1
    for name, value, least in (
        ("num_images", num_images, 0),
        ("size", size, 16),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if not isinstance(value, Integral) or value < least:
            raise UserError(f"{name} is {value!r}: give a whole number of at least {least}")
    jobs = list(_patients_of_images(seed, num_images))
    images = np.empty((num_images, size, size), np.uint8)
    masks = np.empty_like(images)

    def make(i: int) -> View:
        patient, picture = jobs[i]
        rng = default_rng([seed, 4, patient.number, picture])
        view = _draw_view(patient, rng)
        masks[i] = _draw_mask(patient, view, size)
        images[i] = _draw_image(patient, view, size, rng)
        return view

    with ThreadPoolExecutor(workers) as pool:
        views = list(pool.map(make, range(num_images)))
    return images, masks, _table([patient for patient, _ in jobs], views, seed)


def table(num_images: int, seed: int = 0) -> pd.DataFrame:
    """Return the table of `generate` without its pictures, in a thousandth of the time."""
    jobs = list(_patients_of_images(seed, num_images))
    views = [_draw_view(one, default_rng([seed, 4, one.number, picture])) for one, picture in jobs]
    return _table([patient for patient, _ in jobs], views, seed)


def _table(patients: list[Patient], views: list[View], seed: int) -> pd.DataFrame:
    rows = [
        {
            "image_id": f"phantom-{seed}-{i:05d}",
            "patient_id": f"phantom-{seed}-p{patient.number:05d}",
            "age": patient.age,
            "age_source": "record",
            "sex": patient.sex,
            "finding": patient.finding,
            "site": patient.site.name,
            "view": "AP" if view.supine else "PA",
            "original_width": view.width,
            "original_height": view.height,
            "licence": LICENCE,
        }
        for i, (patient, view) in enumerate(zip(patients, views, strict=True))
    ]
    return pd.DataFrame(rows, columns=GIVEN)
