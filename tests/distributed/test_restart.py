"""A run whose processes are killed is started again by torchrun, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def launched(script: Path, folder: Path, killed: int) -> str:
    """Run the script under torchrun, and return what torchrun writes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launcher, script, folder, str(killed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            _, errors = run.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_bit_for_bit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def end(name: str, killed: int) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        assert ("exitcode: -9" in launched(script, folder, killed)) == (killed >= 0)
        return torch.load(folder / "end.pt")

    undisturbed, resumed = end("undisturbed", -1), end("killed", 3)
    for name, value in undisturbed.items():
        assert torch.equal(resumed[name], value), name
