"""Where the processes of a run meet, and what a user is told if they cannot."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from kabrn_dist.distributed.launch_env import LaunchEnv, find_address, read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.utils.errors import UserError
from tests.support.runs import ROOT

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
    assert read_launch_env() == LaunchEnv(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("variable", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "-2"), ("RANK", "1.5"), ("LOCAL_RANK", "9" * 5000)]
)
def test_a_variable_that_is_no_number_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}=.* is not a number of processes; unset it"):
        read_launch_env()


def test_a_rank_is_one_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK 3 is not one of the WORLD_SIZE 1 processes"):
        read_launch_env()


def test_processes_without_a_meeting_point_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "WORLD_SIZE is 2, but MASTER_ADDR '' and MASTER_PORT ''"
    with pytest.raises(UserError, match=message), init_distributed(LaunchEnv(0, 2, 0, 2)):
        pass


def test_a_taken_port_is_named_and_no_rank_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    if dist.is_initialized():
        # Another test of this process has left its group.
        dist.destroy_process_group()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        message = f"port {port} of 127.0.0.1 is in use .*--master_port N"
        with pytest.raises(UserError, match=message), init_distributed(LaunchEnv(0, 2, 0, 2)):
            pass


def test_a_host_name_without_an_address_does() -> None:
    assert find_address(is_one_machine=True) == "127.0.0.1"
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a host name of one's own needs root")
    code = "from kabrn_dist.distributed.launch_env import find_address as f; print(f(True), f(False))"
    command = f"hostname no-such-host-xyz && exec {sys.executable} -c '{code}'"
    ended = subprocess.run(
        ["unshare", "-u", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode and "unshare" in ended.stderr:
        pytest.skip("this container allows no host name of one's own")
    assert ended.returncode == 0, ended.stderr
    one, several = ended.stdout.split()
    assert one == "127.0.0.1" and socket.inet_aton(several)
    assert f"the host name no-such-host-xyz has no address for other machines; they meet at {several}" in ended.stderr
