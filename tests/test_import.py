"""Importing luxtorch is cheap: it loads nothing that takes long."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import luxtorch as lt

HEAVY = {"torch._dynamo", "torch._inductor", "sympy", "scipy", "matplotlib", "torchopt"}


def printed(code: str) -> str:
    """Return what a fresh Python prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_luxtorch_loads_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import luxtorch; print(*set(sys.modules) - before)"
    loaded = set(printed(code).split())
    assert "luxtorch.core" in loaded and not HEAVY & loaded


def test_what_comes_late_comes_when_it_is_asked_for():
    code = (
        "import torch, luxtorch as lt\n"
        "rate = torch.compile(lambda x: lt.optim.constant(0.5)(x), backend='eager', fullgraph=True)\n"
        "print(float(rate(torch.tensor(1))), lt.training.TrainState.__name__, hasattr(lt, 'optimizers'))"
    )
    assert printed(code).split() == ["0.5", "TrainState", "False"]


def test_what_comes_late_is_listed():
    assert {"optim", "training", "testing", "errors", "from_torch", "Dense"} <= set(dir(lt))
    assert all(hasattr(lt, name) for name in dir(lt))


FOLDERS = {path.parent.name for path in Path(lt.__file__).parent.glob("*/__init__.py")}


def test_every_module_is_there_from_the_start():
    names = sorted(FOLDERS - {"jit"} | {"errors"})
    # Each in a process of its own: what one module loads would be there for the next.
    code = (
        "import os, luxtorch as lt\n"
        f"for name in {names}:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        print(getattr(lt, name).__name__, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)"
    )
    assert printed(code).split() == [f"luxtorch.{name}" for name in names]


def test_every_exception_is_in_errors():
    for name in FOLDERS:
        import_module(f"luxtorch.{name}")

    def below(cls):
        return {cls}.union(*map(below, cls.__subclasses__()))

    # Classes that are made while luxtorch runs, as for an error that is a user's error too, have no name in a module.
    own = {cls for cls in below(lt.LuxtorchError) if getattr(sys.modules.get(cls.__module__), cls.__name__, 0) is cls}
    own = {cls for cls in own if cls.__module__.startswith("luxtorch")}
    public = {cls for cls in own if cls.__name__ in dir(lt.errors)}
    assert {cls.__name__ for cls in own - public} == {"ComponentNameError"}
    assert all(getattr(lt.errors, cls.__name__) is cls for cls in public)
    assert not hasattr(lt.errors, "NoError")


def test_errors_loads_no_more_than_it_has_to():
    code = "import sys, luxtorch as lt; lt.errors.TracingError; print('luxtorch.training' in sys.modules)"
    assert printed(code) == "False"


def test_the_version_is_that_of_the_package():
    assert lt.__version__ == version("luxtorch")
