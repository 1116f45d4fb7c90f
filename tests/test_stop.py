"""All ranks stop before the same step: many ranks, two that are told at once, hosts whose names are the loopback's."""

import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.stop_agreement import measure

from ist.distributed import StopAgreement


def test_one_process_stops_at_once():
    stop = StopAgreement(torch.device("cpu"))
    assert not stop(0, False)
    assert stop(1, True)


@pytest.mark.parametrize("told", [[3], [0, 5]])
def test_ranks_stop_before_the_same_step_and_open_no_connections(told):
    seen = measure(8, told)
    assert [one["step"] for one in seen] == [7] * 8  # told before step 5
    assert all(one["after"] == one["before"] for one in seen)


RANK = """
import json, os, sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from ist.distributed import StopAgreement

rank, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store = dist.TCPStore(address, 29411, 2, is_master=rank == 0)
dist.init_process_group("fake", store=store, rank=rank, world_size=2)  # whose collectives need no connections

def together(step):  # in the place of a step's collectives
    store.add(f"step{step}", 1)
    while store.add(f"step{step}", 0) < 2:
        pass

stop, step = StopAgreement(torch.device("cpu")), 0
while step < 20 and not stop(step, rank == 1 and step == 5):
    together(step)
    step += 1
open(f"{folder}/{rank}", "w").write(str(step))
together("end")
"""


def test_hosts_whose_names_are_the_loopbacks(two_hosts, tmp_path):
    prefixes, address, _ = two_hosts
    ranks = [
        subprocess.Popen([*prefix, sys.executable, "-c", RANK, str(rank), address, str(tmp_path)], cwd=ROOT)
        for rank, prefix in enumerate(prefixes)
    ]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["7", "7"]
