"""Random numbers by key, so that arms, engines and devices see the same batches."""

import numpy as np
import torch

#: Stand where a client's number stands in a random key; no client is called that.
PROXY = 2**32 - 1  # training on the proxy set
POOLED = 2**32 - 2  # the centralised arm's one client
SAMPLING = 2**32 - 3  # the choice of a round's clients
LABELS = 2**32 - 4  # the choice of the proxy images that have masks


def generator(*key: int) -> torch.Generator:
    """Return a generator that depends on the key alone: the same on every device, for every initial state.

    Args:
        key: whole numbers >= 0, such as (seed, client, round, epoch).
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)
