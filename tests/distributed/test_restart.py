"""A run whose processes are killed is started again by torchrun, and ends as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch, luxtorch as lt
from luxtorch import distributed, optim, training

folder, killed = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
distributed.initialize(timeout=60)
mesh = distributed.mesh("cpu", model=-1)
model = lt.Chain(lt.Dense(4, 8, "tanh"), lt.Dropout(0.2), lt.Dense(8, 2))
ps, st = lt.setup(0, model)
ps = distributed.place(ps, mesh, distributed.tensor_parallel(model))
ts = training.TrainState(model, ps, st, optim.Adam(0.01))
if (folder / "last").exists():
    ts = distributed.load_checkpoint(folder / "last", ts)
while (number := int(ts.step)) < 6:
    if number == killed and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    key = lt.random.fold_in(lt.random.key(1), number)
    x = lt.random.normal(key, (8, 4))
    data = distributed.place((x, x[:, :2].sin()), mesh, {"*": distributed.Replicate()})
    ts = training.single_train_step(lt.MSELoss(), data, ts)[-1]
    distributed.save_checkpoint(folder / "last", ts)
whole = {name: leaf.full_tensor() for name, leaf in lt.flatten_names(ts.parameters).items()}
if distributed.rank() == 0:
    torch.save(whole, folder / "end.pt")
distributed.shutdown()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_bit_for_bit(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    ends = {}
    for name, killed in (("undisturbed", -1), ("killed", 3)):
        (tmp_path / name).mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
        arguments = [tmp_path / "train.py", tmp_path / name, str(killed)]
        done = subprocess.run(
            [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        assert ("exitcode: -9" in done.stderr) == (killed >= 0), done.stderr
        ends[name] = torch.load(tmp_path / name / "end.pt")
    for name, value in ends["undisturbed"].items():
        assert torch.equal(ends["killed"][name], value), name
