"""What differential privacy has cost: epsilon of the rounds that were noised, by the exact formula."""

import math
from typing import Any

import scipy  # its parts are loaded when they are first used

from fmfl.config import FlowerConfig


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """What some rounds of noise have spent, exactly: (epsilon, delta) of the Gaussian mechanism.

    Rounds with noise z C on a sum in which one client counts at most C are together one Gaussian mechanism
    with mu = sqrt(rounds) / z (Dong, Roth & Su 2022, arXiv 1905.02383, corollary 3.3), which is
    (epsilon, delta)-private where (Balle & Wang 2018, arXiv 1805.06530, theorem 8)

        delta = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)

    Neighbours are two runs that differ in one client's updates being all zero. That only some clients are
    asked in a round is not counted in favour.

    Args:
        noise: z.
        rounds: those in which a client may have taken part.
        delta: in 0..1.
    """
    if rounds == 0:
        return 0.0
    mu = rounds**0.5 / noise

    normal = scipy.stats.norm

    def beyond(e: float) -> float:
        return normal.cdf(mu / 2 - e / mu) - math.exp(e + normal.logcdf(-mu / 2 - e / mu)) - delta

    if beyond(0.0) <= 0:
        return 0.0
    high = 1.0
    while beyond(high) > 0:
        high *= 2
    return float(scipy.optimize.brentq(beyond, 0.0, high, xtol=1e-10))


def spent(cfg: FlowerConfig, rounds: int, runs: int = 1) -> dict[str, Any]:
    """What a run's record says of privacy: empty without it.

    Args:
        rounds: of one run.
        runs: how many runs with the same clients are published, each with noise of its own.
    """
    if cfg.privacy == "none":
        return {}
    return {
        "mechanism": "gaussian, clients",
        "epsilon": epsilon(cfg.dp_noise, rounds, cfg.dp_delta),
        "delta": cfg.dp_delta,
        "noise": cfg.dp_noise,
        "clipping": cfg.dp_clipping,
        "rounds": rounds,
        "runs": runs,
        "epsilon_of_all_runs": epsilon(cfg.dp_noise, rounds * runs, cfg.dp_delta),
    }
