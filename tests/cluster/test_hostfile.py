"""`deepspeed --hostfile` over pdsh and ssh to two hosts: sshd on two loopback addresses, with keys and config of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import ARGUMENTS, RANKS, assert_same_curve, free_ports, launch, wait_until
from tests.distributed.harness import ROOT

pytestmark = pytest.mark.cluster
HOSTS = ("127.0.0.2", "127.0.0.3")
START_SECONDS = 60.0


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables under which `ssh` reaches both hosts without a password and without the user's own ssh files."""
    (port,) = free_ports(1)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    addresses = "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
    files = f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nPidFile {tmp_path}/sshd.pid\n"
    (tmp_path / "sshd_config").write_text(f"{addresses}{files}StrictModes no\nUsePAM no\nPasswordAuthentication no\n")
    trust = f"IdentityFile {tmp_path}/user\nUserKnownHostsFile {tmp_path}/known\nStrictHostKeyChecking accept-new\n"
    (tmp_path / "ssh_config").write_text(f"Port {port}\nIdentitiesOnly yes\n{trust}")
    # ssh takes its config from the user's home alone, so pdsh and deepspeed find one that reads ours.
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    program.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges
    log = tmp_path / "sshd.log"
    server = shutil.which("sshd", path="/usr/sbin:/sbin") or "sshd"
    daemon = subprocess.Popen([server, "-D", "-f", str(tmp_path / "sshd_config"), "-E", str(log)])
    try:
        environment = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
        reach = [str(program), HOSTS[1], "true"]
        wait_until(lambda: subprocess.run(reach).returncode == 0, START_SECONDS, "sshd to answer", log.read_text)
        yield environment
    finally:
        daemon.terminate()
        daemon.wait(START_SECONDS)


def test_two_hosts_train_what_one_does(reference: Path, tmp_path: Path, ssh: dict[str, str]) -> None:
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host} slots={RANKS // len(HOSTS)}\n" for host in HOSTS))
    (port,) = free_ports(1)
    launcher = ("deepspeed", "--hostfile", str(hostfile), "--master_addr", HOSTS[0], "--master_port", str(port))
    output = launch(*launcher, str(ROOT / "launcher" / "train.py"), "--run-dir", str(run_dir), *ARGUMENTS, **ssh)
    assert f"ranks: rank 0 of {RANKS}, 0 of 2 on this node; found by deepspeed; rendezvous at {HOSTS[0]}:" in output
    assert json.loads((run_dir / "environment.json").read_text())["ranks_found_by"] == "deepspeed"
    assert_same_curve(run_dir, reference)
