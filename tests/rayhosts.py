"""A Ray cluster of two raylets on this machine, for a whole test session: two hosts, as far as Ray knows."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# What an actor of a test asks for. CPUs there are none, so that the machine's own number of them decides nothing.
SLOT = {"slot": 1}
STORE_BYTES = 200 * 2**20

# Whoever has no token is turned away. Ray reads this when it's imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@dataclass
class Hosts:
    """The cluster. `cluster` is `ray.cluster_utils.Cluster`."""

    cluster: Any

    def add(self, **resources: float) -> Any:
        """Another host; gives what `remove` takes."""
        return self.cluster.add_node(num_cpus=0, resources=resources, object_store_memory=STORE_BYTES)

    def remove(self, host: Any) -> None:
        """Kill a host's raylet, and with it what runs there: no good-bye."""
        self.cluster.remove_node(host, allow_graceful=False)


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Two hosts with eight slots and room for one each, and this process joined to them.

    Actors of several modules may be there at once: fixtures of theirs live until their last test has run.
    """
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Actors unpickle functions of tests by name.
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    node = {"num_cpus": 0, "resources": {"slot": 8, "room": 1}, "object_store_memory": STORE_BYTES}
    # A killed raylet refuses connections, which counts at once; one that is slow has three times five seconds.
    checks = {"period_ms": 1000, "timeout_ms": 5000, "initial_delay_ms": 1000, "failure_threshold": 3}
    config = {f"health_check_{name}": value for name, value in checks.items()}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": config}
    )
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield Hosts(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()
        patch.undo()
