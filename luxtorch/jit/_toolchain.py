"""The C++ compiler and the processor: whether there is one, what tells them apart, what instructions they share."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from contextvars import copy_context
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from luxtorch.core import tensors


def has_compiler() -> bool:
    """Return whether there is a C++ compiler that Inductor can use."""
    return bool(compiler())


def compiler() -> tuple[Any, ...]:
    """Return what tells the C++ compiler from another one; nothing if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):  # a graph on a GPU may do without
        return ()
    path = Path(shutil.which(found) or found).resolve()
    about = path.stat() if path.exists() else None
    return str(path), about and (about.st_mtime_ns, about.st_size)


def processor() -> str:
    """Return what the processor is able to do, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def find_instructions(inputs: Any, *, wait: bool = False) -> None:
    """Find the vector instructions that Inductor is to use, in a thread, where a program of these inputs needs them.

    Of each set of instructions that the processor has, Inductor asks the compiler for a program, and loads it, one
    after another and before it writes its first kernel: 8 s where its cache is empty. It uses the widest set alone. So
    that one is found here, while a graph is lowered, and the narrower ones are taken for granted.

    Args:
        inputs: A tree of tensors.
        wait: Whether to return when they are known. Otherwise when they are looked for.
    """
    if any(one.device.type == "cpu" for one in tensors(inputs)):
        search = _search()
        if wait:
            search.join()


@cache
def _search() -> Thread:
    # What the thread imports too: two threads that import what imports each other would see half of it.
    import torch._inductor.codecache
    import torch.utils._filelock  # noqa: F401

    # Settings of Inductor belong to a context.
    thread = Thread(target=copy_context().run, args=(_find_widest,), name="luxtorch-instructions", daemon=True)
    thread.start()
    return thread


def _find_widest() -> None:
    from torch._inductor import config, cpu_vec_isa

    chosen = config.cpp.simdlen is not None or config.cpp.vec_isa_ok is not None or "ATEN_CPU_CAPABILITY" in os.environ
    if chosen or platform.machine() not in ("x86_64", "AMD64"):
        return  # it may not be the widest, or there is but one
    with contextlib.suppress(Exception):  # then Inductor looks by itself, and says what is wrong
        had = cpu_vec_isa.x86_isa_checker()
        sets = [one for one in cpu_vec_isa.supported_vec_isa_list if set(str(one).split()) <= set(had)]
        widest = next((one for one in sets if one), None)
        if widest is None:
            return
        with config.patch({"cpp.vec_isa_ok": True}):
            found = cpu_vec_isa.valid_vec_isa_list()  # it keeps what it has found
        if found[0] is not widest:
            cpu_vec_isa.valid_vec_isa_list.cache_clear()
