"""Free memory is the least that the machine and every control group around the process leave."""

from __future__ import annotations

import pytest
import torch

from distcache import memory

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 64 GB free; `system(path, text)` writes a file of it."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(str(text))

    write("proc/meminfo", "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable: 62500000 kB\n")
    return write


def group(system, folder, limit, used, inactive, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    system(f"cgroup/{folder}/{names[0]}", limit)
    system(f"cgroup/{folder}/{names[1]}", used)
    system(f"cgroup/{folder}/memory.stat", f"anon 5\n{names[2]} {inactive}\n")


def test_a_machine_without_control_groups_says_what_it_has(system):
    assert memory.available_bytes() == 64 * GB
    system("proc/self/cgroup", "0::/\n")
    assert memory.available_bytes("cpu") == 64 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_all_groups_around_the_process_counts(system, version):
    prefix = "memory/" if version == 1 else ""
    system(
        "proc/self/cgroup",
        "7:cpu:/x\n5:cpuset,memory:/slurm/job1/step0\n" if version == 1 else "0::/slurm/job1/step0\n",
    )
    unlimited = 9223372036854771712 if version == 1 else "max"
    group(system, prefix + "slurm/job1/step0", unlimited, 3 * GB, 0, version)
    group(system, prefix + "slurm/job1", 10 * GB, 4 * GB, 1 * GB, version)  # files that can go count as free
    group(system, prefix + "slurm", 40 * GB, 20 * GB, 0, version)
    group(system, "elsewhere", 1 * GB, 0, 0, version)
    assert memory.available_bytes() == 7 * GB
    group(system, prefix + "slurm", 40 * GB, 38 * GB, 0, version)
    assert memory.available_bytes() == 2 * GB
    group(system, prefix + "slurm", 40 * GB, 41 * GB, 0, version)
    assert memory.available_bytes() == 0


def test_in_a_container_the_root_is_its_own_group(system):
    system("proc/self/cgroup", "0::/../../what/the/host/calls/it\n")
    group(system, "", 5 * GB, 2 * GB, 0)
    assert memory.available_bytes() == 3 * GB


def test_what_does_not_tell_refuses_nothing(system, tmp_path):
    (tmp_path / "proc/meminfo").unlink()
    assert memory.available_bytes() >= 1 << 60
    system("proc/self/cgroup", "0::/a\n")
    system("cgroup/a/memory.max", "12")  # and nothing that says how much is in use
    assert memory.available_bytes() >= 1 << 60
    assert memory.available_bytes("meta") >= 1 << 60


def test_a_device_counts_what_torch_has_reserved_and_not_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GB)
    assert memory.available_bytes("cuda:1") == 4 * GB


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (64e9, "64.0 GB"), (7.25e15, "7250.0 TB")],
)
def test_bytes_in_words(nbytes, words):
    assert memory.human(nbytes) == words
