"""Compiled programs of earlier processes: which of them in Inductor's cache on disk belongs to a trace.

Inductor finds a program by its lowered graph. Lowering takes as long as tracing, and what Inductor asks before it looks
a program up takes a second or two. Here a small file for each trace says which program it has become.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ._toolchain import compiler, processor

_MOST = 4096
"""How many files are kept, of about 300 bytes each. The oldest quarter is dropped when there are more."""

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_PACKAGE = Path(__file__).parent.parent


def program_key(
    graph: fx.GraphModule, fakes: Sequence[Tensor], about: object, options: Mapping[str, Any]
) -> str | None:
    """Return a digest of all that the program of a graph depends on; None where that cannot be told.

    That is the graph, with the values of the tensors that it closes over; what is known of its arguments; settings of
    torch, and of Inductor; the versions of torch, luxtorch and the C++ compiler; and the processor.

    Args:
        graph: The graph.
        fakes: Its arguments, without values.
        about: What else the program depends on; its `repr` is compared.
        options: Settings of Inductor for this program.
    """
    from torch._inductor import config

    if not config.fx_graph_cache or config.force_disable_caches or _has_own_passes(config):
        return None
    if any(isinstance(n, torch.SymInt) for fake in fakes for n in (*fake.shape, *fake.stride())):
        return None
    if not all(isinstance(value, _PLAIN) for value in options.values()):
        return None
    if not all(map(_is_plain, graph.graph.nodes)):
        return None
    digest = hashlib.sha256()
    settings = sorted(options.items()), config.get_hash().hex(), _settings()
    for part in (graph.code, about, settings, _machine(), list(map(_layout, fakes))):
        digest.update(f"{part!r}\0".encode())
    for node in graph.graph.find_nodes(op="get_attr"):
        constant = getattr(graph, node.target)
        digest.update(f"{_layout(constant)!r}\0".encode())
        numbers = constant.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(numbers.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find(key: str | None) -> dict[str, Any]:
    """Return what was stored for a key; nothing if there is no file, or not as it was written."""
    if key is None:
        return {}
    try:
        path = _file(key)
        stored = json.loads(path.read_text())
        os.utime(path)  # so that it is not the next to be dropped
    except (OSError, ValueError):
        return {}
    known = stored.get("known") if isinstance(stored, dict) else None
    return known if isinstance(known, dict) and stored.get("check") == _check(key, known) else {}


def store(key: str | None, known: Mapping[str, Any]) -> None:
    """Store what is known of the program of a key: the whole of it or nothing, whatever other processes do."""
    if key is None or known["program"] is None:
        return
    text = json.dumps({"known": known, "check": _check(key, known)})
    with contextlib.suppress(OSError):  # it is read-only, full or gone: the next process compiles again
        path = _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
        _drop_oldest(path.parent)


def load(name: str, fakes: Sequence[Any]) -> Any:
    """Return the program of a name from Inductor's cache, ready to be called; None if it is gone.

    It is to be called inside of `compiling`, with the settings that it was compiled with.
    """
    from torch._inductor import codecache as inside
    from torch._inductor.output_code import CompiledFxGraphConstants

    codecache: Any = inside
    constants = CompiledFxGraphConstants()
    # Before it looks for compiled kernels, Inductor looks for changes of torch's headers, which takes half a second.
    look = codecache._precompile_header
    codecache._precompile_header = lambda *args, **kwargs: None
    try:
        program, _ = codecache.FxGraphCache.load_with_key(name, [], fakes, True, None, False, constants)
    finally:
        codecache._precompile_header = look
    if program is not None:
        program.post_compile(fakes, constants, program.fx_kwargs)
    return program


def _check(key: str, known: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{key}{json.dumps(known, sort_keys=True)}".encode()).hexdigest()


def _file(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir(), "luxtorch", f"{key}.json")


def _drop_oldest(folder: Path) -> None:
    files = [entry for entry in os.scandir(folder) if entry.is_file()]
    if len(files) > _MOST:
        for entry in sorted(files, key=lambda entry: entry.stat().st_mtime)[: _MOST // 4]:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.remove(entry.path)


def _is_plain(node: fx.Node) -> bool:
    """Tell whether the text of a node says all that it does."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        value: Any = getattr(node.graph.owning_module, str(node.target), None)
        return type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_meta
    if node.target is not getitem:
        # The kernels of others may be other ones in the next process.
        known = isinstance(node.target, torch._ops.OpOverload)
        if not known or node.target.namespace not in ("aten", "prims", "luxtorch"):  # type: ignore[union-attr]
            return False
    return all(isinstance(value, (fx.Node, *_PLAIN)) for value in _values((node.args, node.kwargs)))


def _values(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _values(part)
    else:
        yield tree


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    lazy = tensor.is_conj(), tensor.is_neg()
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, lazy


def _has_own_passes(config: Any) -> bool:
    """Tell whether a user has put passes of their own into Inductor, which its settings do not tell apart."""
    left_out = config._cache_config_ignore_prefix
    return any("pass" in name and callable(getattr(config, name, None)) for name in left_out)


def _settings() -> tuple[Any, ...]:
    """Return the settings of torch that Inductor's code depends on."""
    cuda = torch.backends.cuda.matmul
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (
        autocast,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_float32_matmul_precision(),
        cuda.allow_tf32,
        cuda.allow_fp16_reduced_precision_reduction,
        cuda.allow_bf16_reduced_precision_reduction,
    )


@cache
def _machine() -> tuple[Any, ...]:
    """Return what tells software and processors apart."""
    torchs = torch.__version__, torch.version.git_version
    files = sorted((str(path), path.stat().st_mtime_ns) for path in _PACKAGE.rglob("*.py"))
    gpus = [str(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    return torchs, files, compiler(), platform.machine(), processor(), gpus, os.environ.get("ATEN_CPU_CAPABILITY")
