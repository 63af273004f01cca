"""Epsilon by the definition of differential privacy."""

import math

import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fmfl.config import FlowerConfig
from fmfl.flower import privacy


@pytest.mark.parametrize(("noise", "rounds", "delta"), [(1.0, 1, 1e-5), (2.0, 5, 1e-5), (8.0, 20, 1e-3)])
def test_epsilon_is_the_exact_one_of_the_gaussian_mechanism(noise, rounds, delta):
    """By its definition: delta is the mass of one output's density above e^epsilon times the other's."""
    e = privacy.epsilon(noise, rounds, delta)
    mu = rounds**0.5 / noise

    def beyond(x: float) -> float:
        return max(0.0, norm.pdf(x, mu) - math.exp(e) * norm.pdf(x, 0))

    crossing = e / mu + mu / 2
    mass, _ = quad(beyond, crossing, crossing + 40, limit=200)
    assert mass == pytest.approx(delta, rel=1e-4)


def test_epsilon_falls_with_noise_and_rises_with_rounds():
    spent = [privacy.epsilon(noise, rounds, 1e-5) for noise, rounds in ((8, 1), (8, 5), (1, 5), (1, 100))]
    assert spent == sorted(spent) and spent[0] > 0
    assert privacy.epsilon(1.0, 0, 1e-5) == 0


def test_more_noise_than_delta_asks_for_spends_nothing():
    assert privacy.epsilon(1e6, 1, 1e-3) == 0


def test_a_record_without_privacy_says_nothing_of_it():
    assert privacy.spent(FlowerConfig(), 5) == {}
    said = privacy.spent(FlowerConfig(privacy="dp", dp_noise=2.0, dp_delta=1e-4), 7)
    assert said["epsilon"] == privacy.epsilon(2.0, 7, 1e-4) and said["rounds"] == 7


def test_runs_with_the_same_clients_compose_as_their_rounds_do():
    cfg = FlowerConfig(privacy="dp", dp_noise=4.0)
    said = privacy.spent(cfg, 5, runs=9)
    assert said["epsilon"] == privacy.spent(cfg, 5)["epsilon"] < said["epsilon_of_all_runs"]
    assert said["epsilon_of_all_runs"] == privacy.spent(cfg, 45)["epsilon"]
