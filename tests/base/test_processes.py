"""One process of a team by itself: what it shows, and which errors it takes for the loss of another."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from rich.console import Console

from vitreous.base.processes import Lost, Team, naming_the_lost

LOSSES = [  # word for word
    "[pair.cc:561] Connection closed by peer [127.0.0.1]:6040. This is typically caused by a remote worker crashing.",
    "[pair.cc:545] Read error [127.0.0.1]:30108: Connection reset by peer. This is typically caused by a remote worker hanging",
    "[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete",
    "Application timeout caused pair closure",
    "Gloo connectFullMesh failed with [pair.cc:140] Connect timeout [127.0.0.1]:4711",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "Broken pipe",
    "Socket Timeout",
    "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error, NCCL version 2.27.5\nncclSystemError: System call failed\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node2<51234>",
    "NCCL communicator was aborted on rank 1.",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
]
FAULTS = [
    "[enforce fail at third_party/gloo/gloo/transport/tcp/pair.cc:464] op.preamble.length <= op.nbytes. 1000 vs 500.",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.5\nLast error:\nFailed to CUDA malloc 4 bytes",
    "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage, Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000",
    "No backend type associated with device type mps; the process group has cpu:gloo",
    "Invalid timeout",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
]


@pytest.fixture
def one_of_two(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)


@pytest.mark.parametrize("text", LOSSES)
def test_what_a_lost_process_leaves_behind_is_named(one_of_two, text):
    with pytest.raises(Lost, match=r"another process of this job gone.*all 2"), naming_the_lost():
        raise RuntimeError(text)


@pytest.mark.parametrize("text", FAULTS)
def test_other_faults_of_the_connection_are_left_as_they_are(one_of_two, text):
    with pytest.raises(RuntimeError, match="^" + text[:5].replace("[", r"\[")) as caught, naming_the_lost():
        raise RuntimeError(text)
    assert not isinstance(caught.value, Lost)


def test_one_that_never_came_is_named_before_there_is_a_group(monkeypatch):
    """Torch's own words, while the processes still wait for one another."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for size, kind in {"2": Lost, "1": dist.DistStoreError}.items():
        told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": size, "LOCAL_RANK": "0"}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(kind), naming_the_lost():
            store.wait(["another"], timedelta(milliseconds=20))


def test_only_the_first_has_the_terminal(monkeypatch):
    """The others' consoles are none even on a terminal, where a live table would swallow what they write to stderr."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console()
    assert console.is_terminal
    assert Team(0, 2).console(console) is console
    other = Team(1, 2).console(console)
    assert other.quiet
    assert not other.is_terminal
