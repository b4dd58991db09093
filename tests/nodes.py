"""Two nodes on one machine: network namespaces joined by a cable (veth), or two addresses of the
loopback device where namespaces are not allowed."""

import contextlib
import os
import signal
import subprocess
import sys

from helpers import ROOT
from runs import worker

MOST_RANKS = 4


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


class Node:
    """A machine with its own folder and, in a namespace, its own network.

    address: its IP address. device: its network device.
    """

    def __init__(self, folder, address, device, namespace=None):
        self.folder = folder
        self.folder.mkdir()
        self.address = address
        self.device = device
        self.enter = ["ip", "netns", "exec", namespace] if namespace else []
        self.out = folder / "out.txt"
        self.log = folder / "log"
        self.agents = []

    def torchrun(self, flags, words):
        """Start train_gpt2.py with `words` here -> its torchrun."""
        command = [*self.enter, sys.executable, "-m", "torch.distributed.run", *flags,
                   ROOT / "train_gpt2.py", *words]
        env = os.environ | {"GLOO_SOCKET_IFNAME": self.device}
        with open(self.out, "a") as file:
            agent = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file,
                                     cwd=self.folder, env=env)
        self.agents.append(agent)
        return agent

    def text(self):
        return self.out.read_text()


    def die(self):
        """Kill all torchruns and their processes here, as if the machine had lost power."""
        for agent in self.agents:
            if agent.poll() is None:
                ranks = [worker(agent, rank) for rank in range(MOST_RANKS)]
                for pid in (agent.pid, *filter(None, ranks)):
                    os.kill(pid, signal.SIGKILL)
                agent.wait()


@contextlib.contextmanager
def two_nodes(tmp_path):
    """Context with two Nodes; everything that still runs on them is killed at its end."""
    with contextlib.ExitStack() as stack:
        try:
            names = join_namespaces(stack)
            nodes = [Node(tmp_path / f"node{i}", f"10.99.0.{i + 1}", "eth0", name)
                     for i, name in enumerate(names)]
        except (OSError, subprocess.CalledProcessError):  # not root, or without ip
            nodes = [Node(tmp_path / f"node{i}", f"127.0.0.{i + 1}", "lo") for i in range(2)]
        for node in nodes:
            stack.callback(node.die)
        yield nodes


def join_namespaces(stack):
    """Make two network namespaces, joined by a cable, until `stack` is closed -> their names."""
    names = [f"node{i}_{os.getpid()}" for i in range(2)]
    for name in names:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "del", name)
    ip("link", "add", "eth0", "netns", names[0], "type", "veth",
       "peer", "name", "eth0", "netns", names[1])
    for i, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
    return names
