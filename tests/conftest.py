import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from rayhosts import hosts  # noqa: F401  a fixture

from distcache.testing import RankPool

torch.set_num_threads(1)
# Torch's store asks the resolver for the name of whoever connects, and answers nobody meanwhile: five seconds where a
# name server is slow, which is more than the limits of some tests.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# No deadlines: a shared machine is slow now and then. The blob replays a failure that was random.
settings.register_profile("distcache", deadline=None, print_blob=True)
settings.load_profile("distcache")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Warm worker processes, one pool for each test process."""
    with RankPool() as pool:
        yield pool
