"""Training on two nodes, two network namespaces: python -m pytest tests/lib/test_nodes.py"""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nodes import two_nodes
from runs import (
    assert_same_runs,
    command,
    cut,
    lines,
    linux,
    train,
    wait_for,
)

from lib import nodes
from lib.cli import BadInput
from lib.resume import check_moved

pytestmark = linux
FLAGS = ["--max_steps", "24"]
LONG = ["--max_steps", "400", "--save_every", "40", "--eval_every", "0", "--max_lr", "1e-3"]
STATIC = ["--nnodes", "2", "--nproc_per_node", "1"]


@pytest.fixture
def pair(tmp_path):
    with two_nodes(tmp_path) as both:
        yield both


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(pair, data, *flags, names=("a", "a"), torchrun=()):
    """Start a run of static rendezvous on both nodes, each with a log folder of its own -> the
    torchruns."""
    pair[0].port = free_port()
    return [join(pair, rank, data, *flags, name=name, torchrun=torchrun)
            for rank, name in enumerate(names)]


def join(pair, rank, data, *flags, name="a", torchrun=()):
    """Start the torchrun of one node."""
    static = [*STATIC, "--node_rank", rank, "--master_addr", pair[0].address,
              "--master_port", pair[0].port, *torchrun]
    words = command(data, pair[rank].log / name, *flags)
    at = words.index("--log_dir")
    words[at + 1] = "log"  # of the folder that each node runs in
    return pair[rank].torchrun(static, words)


def text(pair):
    return "".join(f"--- {node.address}\n{node.text()}" for node in pair)


def finish(pair, agents, timeout=600):
    for agent in agents:
        agent.wait(timeout)
    assert [agent.returncode for agent in agents] == [0, 0], text(pair)


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_only_rank_0_needs_the_checkpoint(launch, data, tmp_path, pair):
    """And one process continues what two nodes have saved."""
    flags = [*FLAGS, "--optimizer", "muon", "--dropout", "0.1"]
    result = launch("train_gpt2.py", *command(data, tmp_path / "whole", *flags), processes=2)
    assert result.returncode == 0, result.stderr
    folder = cut(tmp_path / "whole", pair[0].log / "a", 8)
    finish(pair, start(pair, data, *flags))
    assert f"resume  {folder}/ckpt_00008.pt, step 8; as before" in pair[0].text()
    assert not pair[1].log.exists()
    assert_same_runs(folder, tmp_path / "whole")
    alone = train(data, cut(folder, tmp_path / "alone", 16), *FLAGS)
    last = lines(alone)[-1].split()
    assert last[:2] == ["24", "val"]
    assert float(last[2]) == pytest.approx(float(lines(folder)[-1].split()[2]), rel=0.1)


@pytest.mark.slow
def test_a_node_that_died_comes_back(launch, data, tmp_path, pair):
    """Its torchrun has counted no restart, the other has."""
    result = launch("train_gpt2.py", *command(data, tmp_path / "whole", *LONG), processes=2)
    assert result.returncode == 0, result.stderr
    folder = pair[0].log / "a"
    restarts = ["--max_restarts", "1"]
    agents = start(pair, data, *LONG, torchrun=restarts)
    wait_for((folder / "ckpt_00040.pt").exists, agents[0])
    pair[1].die()
    agents[1] = join(pair, 1, data, *LONG, torchrun=restarts)
    finish(pair, agents)
    assert "resume  " in pair[0].text()
    assert_same_runs(folder, tmp_path / "whole")




@pytest.mark.slow
def test_an_error_of_one_node_ends_both_at_once_in_one_line(data, tmp_path, pair):
    """Here rank 0 has moved to the node without the checkpoint."""
    cut(train(data, tmp_path / "whole", *FLAGS), pair[1].log / "a", 16)
    for agent in start(pair, data, *FLAGS):
        assert agent.wait(200) == 1, text(pair)
    [error] = [line for line in pair[0].text().splitlines() if line.startswith("train_gpt2.py: ")]
    assert "this node has log/a/ckpt_00016.pt, rank 0's node does not: " in error
    assert not (pair[0].log / "a").exists()


# --------------------------------------------------------------------------------------------------
# Meeting, each process a thread


def meet(store, ranks, world_size=3):
    """Each rank's attempt, or what it raised."""
    def run(rank):
        try:
            if rank == 0:
                return nodes._invite(store, world_size)
            return nodes._call(store, {"rank": rank})
        except BadInput as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, ranks))


def test_processes_agree_on_an_attempt_whatever_earlier_ones_have_left():
    store = torch.distributed.HashStore()
    store.set("call 1", "a dead process")
    attempts = [meet(store, order) for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2))]
    assert [len(set(found)) for found in attempts] == [1, 1, 1]
    assert len({found[0] for found in attempts}) == 3
    for found in attempts[:2]:  # processes that still wait in these attempts end
        assert torch.distributed.PrefixStore(found[0], store).check([nodes.FAILED])
    assert not torch.distributed.PrefixStore(attempts[2][0], store).check([nodes.FAILED])


@pytest.mark.parametrize("ranks, says", [
    ((0, 2), "1 of 3 processes .the first: rank 1. did not start within 1 s"),
    ((1, 2), "rank 0, at here:29500, did not answer within 1 s"),
])
def test_a_process_that_does_not_come_is_named_within_a_limit(ranks, says, monkeypatch):
    monkeypatch.setattr(nodes, "LIMIT", 1)
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "29500")
    errors = [found for found in meet(torch.distributed.HashStore(), ranks)
              if isinstance(found, BadInput)]
    assert re.search(says, str(errors[0]))
    assert len(errors) == (1 if 0 in ranks else 2)


# --------------------------------------------------------------------------------------------------
# Rank 0 on another node


def test_a_node_refuses_that_rank_0_begins_a_run_which_it_has_itself(tmp_path, monkeypatch):
    folder = tmp_path / "log" / "a"
    folder.mkdir(parents=True)
    (folder / "ckpt_00008.pt").touch()
    place = {"log_dir": str(tmp_path / "log"), "run_name": "a"}
    check_moved(place, {8})
    check_moved(place, {8, 16})
    with pytest.raises(BadInput, match="this node has .*ckpt_00008.pt, rank 0's node does not"):
        check_moved(place, set())
    monkeypatch.setattr("lib.resume.restarted", lambda log_dir: folder)
    with pytest.raises(BadInput, match="rank 0 has moved .* give --run_name a, .* --master_addr"):
        check_moved(place | {"run_name": None}, set())
