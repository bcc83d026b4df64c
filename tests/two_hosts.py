"""Two hosts on this machine, with names, addresses and loopbacks of their own: network namespaces joined by a cable.

    python tests/two_hosts.py torchrun      # host0 and host1 of docker-compose.yml, each on the host of that name
    python tests/two_hosts.py ray           # ray-head and ray-worker, and a pool of two actors, one on each host

The commands are those of docker-compose.yml. It takes no rights but to make namespaces, in a user namespace of its own;
where that isn't allowed it says why and ends with 77. No packet leaves the namespaces, and they and whatever runs in
them end with this process.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compose

SKIPPED = 77
LIMIT_S = 240
# Nobody's addresses: RFC 5737. Each host has the names of the services that run on it.
ADDRESSES = {"host0": "198.51.100.1", "host1": "198.51.100.2"}
NAMES = {"host0": "host0 ray-head", "host1": "host1 ray-worker"}
NAMESPACES = ["--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["torchrun", "ray"])
    parser.add_argument("--out", type=Path, help="the folder to save in; by default nothing is kept")
    parser.add_argument("--options", default="--samples=8 --max-tokens=32", help="of launch/collect.py (%(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        if reason := why_not():
            print(f"skipped: {reason}")
            sys.exit(SKIPPED)
        os.execvp("unshare", ["unshare", *NAMESPACES, sys.executable, __file__, *sys.argv[1:], "--inside"])
    with tempfile.TemporaryDirectory(prefix="hosts", dir="/tmp") as folder, Hosts(Path(folder)) as hosts:
        run = over_torchrun if args.what == "torchrun" else over_ray
        run(hosts, args.out or Path(folder), args.options)


def why_not() -> str | None:
    """Why there can be no hosts here, or None."""
    for tool in ("unshare", "nsenter", "ip", "mount"):
        if shutil.which(tool) is None:
            return f"there is no {tool}: it's in the packages util-linux and iproute2."
    trial = ["unshare", *NAMESPACES, "ip", "link", "add", "name", "one", "type", "veth", "peer", "name", "other"]
    ended = subprocess.run(trial, capture_output=True, text=True, check=False, timeout=30)
    return None if ended.returncode == 0 else f"namespaces can't be made here: {ended.stderr.strip()}."


class Hosts:
    """The hosts, in namespaces that are this process's own. `folder` has a short path: Ray makes sockets in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = folder / "names"
        names.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[host]} {NAMES[host]}\n" for host in ADDRESSES))
        done("mount", "--bind", str(names), "/etc/hosts")
        self._keepers = {host: self._keeper(host) for host in ADDRESSES}
        self._started: list[subprocess.Popen[bytes]] = []
        one, other = (f"name cable netns {keeper.pid}" for keeper in self._keepers.values())
        done("ip", "link", "add", *one.split(), "type", "veth", "peer", *other.split())
        for host, address in ADDRESSES.items():
            for command in (f"address add {address}/24 dev cable", "link set cable up", "link set lo up"):
                done(*self._on(host), "ip", *command.split())

    def _keeper(self, host: str) -> subprocess.Popen[str]:
        """A process that a host's namespaces live as long as."""
        keep = ["sh", "-euc", 'hostname "$0"; echo there; exec sleep infinity', host]
        keeper = subprocess.Popen(["unshare", "--net", "--uts", *keep], stdout=subprocess.PIPE, text=True)
        assert keeper.stdout is not None
        if keeper.stdout.readline() != "there\n":
            sys.exit(f"{host} can't be made.")
        return keeper

    def _on(self, host: str) -> list[str]:
        return ["nsenter", f"--target={self._keepers[host].pid}", "--net", "--uts", "--"]

    def start(self, host: str, command: list[str], stderr: int | None = None, **env: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, in the repository's folder."""
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = self.folder / host
        own.mkdir(exist_ok=True)
        env = {**bare, "PATH": programs, "RAY_TMPDIR": str(own), **env}
        process = subprocess.Popen([*self._on(host), *command], env=env, cwd=compose.REPOSITORY, stderr=stderr)
        self._started.append(process)
        return process

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.terminate()
            process.wait(30)


def done(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def over_torchrun(hosts: Hosts, out: Path, options: str) -> None:
    services = compose.services(RANKS="1", LIMIT_S=str(LIMIT_S), OPTIONS=options)
    agents = [hosts.start(host, command_of(services[host], out)) for host in ADDRESSES]
    for host, agent in zip(ADDRESSES, agents, strict=True):
        if status := agent.wait(LIMIT_S):
            sys.exit(f"{host} ended with {status}.")


def over_ray(hosts: Hosts, out: Path, options: str) -> None:
    services = compose.services(RANKS="1", LIMIT_S=str(LIMIT_S), OPTIONS=f"--actors=2 {options}")
    token = hosts.folder / "token"
    token.write_text(f"{secrets.token_hex(32)}\n")
    asks = {**services["ray-head"]["environment"], "RAY_AUTH_TOKEN_PATH": str(token)}
    # The head works too here, so that each host has one actor, and the driver needs no node of its own.
    head = [word.replace("--num-cpus=0", "--num-cpus=1") for word in command_of(services["ray-head"], out)]
    healthy = services["ray-head"]["healthcheck"]["test"][1:]
    for host, command in (("host0", head), ("host1", command_of(services["ray-worker"], out))):
        node, end_s = hosts.start(host, command, **asks), time.monotonic() + 120
        while hosts.start(host, healthy, stderr=subprocess.DEVNULL).wait(30):
            if node.poll() is not None or time.monotonic() > end_s:
                sys.exit(f"Ray on {host} isn't healthy within two minutes, or has ended ({node.poll()}).")
            time.sleep(0.5)
    _, driver = command_of(services["ray-pool"], out)[-1].splitlines()
    if status := hosts.start("host0", shlex.split(driver), **asks).wait(LIMIT_S):
        sys.exit(f"the pool ended with {status}.")


def command_of(service: dict[str, Any], out: Path) -> list[str]:
    """A service's command, saving in `out`."""
    return [word.replace("/activations", str(out)) for word in compose.words(service["command"])]


if __name__ == "__main__":
    main()
