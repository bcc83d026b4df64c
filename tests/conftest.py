from collections.abc import Iterator

import pytest
import torch

from distcache.testing import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Warm worker processes, one pool for each test process."""
    with RankPool() as pool:
        yield pool
