"""Two machines, played by network namespaces that a bridge connects."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from namespaces import ISOLATED, needs_namespaces
from test_processes import SETTINGS, SMALL_SCENES, train

HOSTS = r"""
set -e
command=("$@")
mkdir -p /run/netns
mount -t tmpfs none /run/netns
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
for host in 1 2; do
    ip netns add host$host
    ip link add veth$host type veth peer name eth0 netns host$host
    ip link set veth$host master bridge
    ip link set veth$host up
    ip -n host$host addr add 10.77.0.$host/24 dev eth0
    ip -n host$host link set eth0 up
    ip -n host$host link set lo up
done
export GLOO_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
run_on() {
    ip netns exec host$1 $TORCHRUN --nnodes 2 --nproc-per-node 1 --max-restarts 2 \
        --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf is_host=$2 \
        --local-addr 10.77.0.$1 "${command[@]}"
}
run_on 1 1 & first=$!
run_on 2 0 & second=$!
if [ "$KILL_AFTER" != 0 ]; then
    until [ "$(wc -l < "$METRICS" 2> /dev/null || echo 0)" -ge "$KILL_AFTER" ]; do sleep 0.05; done
    # Not torchrun but the process that it started last; the script's path is this test's alone.
    kill -9 "$(pgrep --newest --full "${command[0]} train")"
fi
wait $first
wait $second
"""


def train_on_two_hosts(out: Path, kill_after: int, *settings: str) -> list[dict[str, float]]:
    script = out.parent / "small_scenes.py"
    script.write_text(SMALL_SCENES)
    changes = [f"--set={setting}" for setting in (*SETTINGS, *settings)]
    command = [str(script), "train", "demo", "--resume", "--out", str(out), *changes]
    environment = {
        "TORCHRUN": shlex.join([sys.executable, "-m", "torch.distributed.run"]),
        "METRICS": str(out / "metrics.jsonl"),
        "KILL_AFTER": str(kill_after),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }
    done = subprocess.run(
        [*ISOLATED, "bash", "-c", HOSTS, "hosts", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@needs_namespaces
def test_two_hosts_take_the_steps_of_one_and_outlive_a_lost_process(
    tmp_path: Path,
) -> None:
    settings = ("train.steps=12", "train.checkpoint_every=4")
    found = train_on_two_hosts(tmp_path / "two", 6, *settings)
    alone = train(tmp_path / "one", 1, *settings)
    losses, expected = ([row["loss"] for row in rows if "loss" in row] for rows in (found, alone))
    np.testing.assert_allclose(losses, expected, rtol=5e-3)
