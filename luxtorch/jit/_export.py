"""Compiled functions as files: `Jitted.export` writes one by AOTInductor, `load_jitted` runs it without tracing."""

from __future__ import annotations

import base64
import pickle
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import functional, watched
from luxtorch.core import InputError, LuxtorchError, described

from ._bodies import CALLERS
from ._compiled import COMPILING, Assembled, check_leaves
from ._constants import NotComparable, fingerprint, wrap_static
from ._donate import copy_strided
from ._effects import is_effect
from ._flatten import Spec, flatten, flatten_torch_nodes, has_sharded, node_classes, path_text, register_classes
from ._inductor import last_pass
from ._purity import tracing_errors
from ._sizes import Expression, static
from ._toolchain import find_instructions, processor
from ._trace import Trace

_KEY = "luxtorch"


@dataclass(frozen=True)
class _Layout:
    """What an argument must be: sizes and strides, with None for those that may change, dtype and device."""

    sizes: tuple[int | None, ...]
    strides: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(fake: Tensor) -> _Layout:
        sizes, strides = (tuple(map(static, numbers)) for numbers in (fake.shape, fake.stride()))
        return _Layout(sizes, strides, fake.dtype, fake.device)

    def takes(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is of this layout but for its strides."""
        if tensor.dtype != self.dtype or tensor.device != self.device or tensor.ndim != len(self.sizes):
            return False
        # Sizes 0 and 1 have programs of their own.
        return all(n > 1 if size is None else n == size for n, size in zip(tensor.shape, self.sizes, strict=True))

    def restrided(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the strides of this layout, copied if it has others."""
        if all(own in (None, n) for n, own in zip(tensor.stride(), self.strides, strict=True)):
            return tensor
        if None in self.sizes:
            return tensor.contiguous()
        return copy_strided(tensor, self.strides)  # type: ignore[arg-type]

    def __str__(self) -> str:
        sizes = ", ".join("at least 2" if size is None else str(size) for size in self.sizes)
        return f"a tensor of shape ({sizes}{',' if len(self.sizes) == 1 else ''}), {self.dtype}, on {self.device}"


@dataclass(frozen=True)
class _Interface:
    """How a program is called: what is beside it in the file.

    Attributes:
        name: The name of the function.
        names: The names of its arguments.
        static: Those that are static.
        spec: The structure of the arguments.
        layouts: The tensors among their leaves, by place.
        constants: The other leaves, by place.
        condition: What must hold of sizes.
        out_spec: The structure of the result.
        results: Its leaves, as in `Trace`.
        numbers: Computes those that depend on sizes alone.
    """

    name: str
    names: Sequence[str]
    static: Sequence[str]
    spec: Spec
    layouts: Mapping[int, _Layout]
    constants: Mapping[int, Any]
    condition: Expression | None
    out_spec: Spec
    results: list[tuple[str, Any]]
    numbers: Expression | None


def export(
    trace: Trace,
    name: str,
    names: Sequence[str],
    constants: Sequence[str],
    path: str | Path,
    options: Mapping[str, Any],
) -> Path:
    """Write the program of a trace into a file; see `Jitted.export`.

    Args:
        trace: The trace.
        name: The name of the function.
        names: The names of its arguments.
        constants: Those that are static.
        path: The file.
        options: Settings of Inductor.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise InputError("The name of an exported program must end with .pt2.", got=str(path))
    for node in trace.graph.graph.nodes:
        if is_effect(node):
            raise InputError(
                "An exported program must not call Python, as those of lt.debug do.",
                got=f"a call of lt.debug in {name}",
                fix="Export the function without it.",
            )
        if node.op == "call_function" and node.target in CALLERS:
            raise InputError(
                "A function with a loop or branch of luxtorch cannot be exported: its body is a part of this process.",
                got=str(node.target),
                fix="Write the loop in Python, so that it is unrolled; or let the other process compile the function, "
                "which takes little time if it finds the program in the same cache.",
            )
    if has_sharded(trace.signature.spec) or has_sharded(trace.out_spec):
        raise InputError(
            "A function of sharded tensors cannot be exported: the file would be for this mesh of processes.",
            fix="Export it with whole tensors, or let the other processes compile it.",
        )
    fakes = trace.fakes
    if not trace.outputs():
        raise InputError("An exported function must compute something: this one returns arguments and constants alone.")
    symbolic = [n for n, fake in enumerate(fakes) if None in _Layout.of(fake).sizes]
    if any(not fakes[n].is_contiguous() for n in symbolic):
        raise InputError(
            "Arguments with dynamic sizes must be contiguous where a function is exported.", fix="Pass x.contiguous()."
        )
    kinds = torch.export.Dim
    dims = [[kinds.DYNAMIC if static(size) is None else kinds.STATIC for size in fake.shape] for fake in fakes]
    signature = trace.signature
    interface = _Interface(
        name,
        names,
        constants,
        signature.spec,
        {place: _Layout.of(fake) for place, fake in zip(signature.places, fakes, strict=True)},
        signature.values,
        trace.sizes.condition(fakes),
        trace.out_spec,
        trace.results,
        trace.numbers,
    )
    about = {_KEY: _packed(interface), **_machine()}
    with COMPILING, torch.no_grad(), tracing_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies what torch deprecates
        find_instructions(fakes)
        program = torch.export.export(trace.graph, tuple(signature.examples()), dynamic_shapes=tuple(dims))
        find_instructions(fakes, wait=True)
        configs = {"post_grad_custom_post_pass": last_pass(), **options, "aot_inductor.metadata": about}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    return path


def _packed(interface: _Interface) -> str:
    classes = node_classes(interface.spec) | node_classes(interface.out_spec)
    try:
        return base64.b64encode(pickle.dumps((classes, pickle.dumps(interface)))).decode()
    except Exception as error:
        raise InputError(
            "The constants among arguments and results of an exported function must be pickled.",
            got=f"{type(error).__name__}: {error}",
            fix="Define functions and classes at the top of a module, rather than as a lambda or inside of a function.",
        ) from error


def load_jitted(path: str | Path) -> LoadedJitted:
    """Load a compiled function that `export` has written.

    It runs without tracing or compiling anything, in some milliseconds. Load only files that you trust: it runs their
    code.

    Args:
        path: The file.

    Returns:
        A function of the same arguments as the exported one.

    Raises:
        InputError: If the file is not one that `export` has written.
        LuxtorchError: If it was written with another version of torch, or for another processor.

    Example:
        >>> import tempfile, torch, luxtorch as lt
        >>> from luxtorch.jit import jit
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = jit(torch.cos).export(f"{folder}/cosine.pt2", torch.ones(3))
        ...     cosine = lt.load_jitted(path)
        >>> cosine(torch.zeros(3))
        tensor([1., 1., 1.])

    Source: AOTInductor, the compiler of `torch.export`.
    """
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    if not Path(path).is_file():
        raise InputError("There is no such file.", got=str(path))
    try:
        about = loader.load_metadata_from_package(str(path), "model")
        packed = about[_KEY]
    except (RuntimeError, KeyError) as error:
        raise InputError("The file was not written by `export` of a jitted function.", got=str(path)) from error
    _check_machine(about)
    classes, pickled = pickle.loads(base64.b64decode(packed))
    register_classes(classes)
    return LoadedJitted(pickle.loads(pickled), loader(str(path), "model", False, 1, -1).boxed_run)


class LoadedJitted(Assembled):
    """A compiled function that `load_jitted` returns; it is called as the function that was exported.

    It takes tensors of the shapes, dtypes and devices that it was exported for. It has no derivative, and does not run
    inside of transforms.

    Example:
        >>> import luxtorch as lt
        >>> predict = lt.load_jitted("model.pt2")  # doctest: +SKIP
        >>> y = predict(ps, x)  # doctest: +SKIP
    """

    def __init__(self, interface: _Interface, run: Callable[[list[Any]], Sequence[Tensor]]) -> None:
        places = [*interface.layouts]
        super().__init__(places, True, interface.out_spec, interface.results, interface.numbers)
        self._interface = interface
        self._constant_keys = {i: fingerprint(value) for i, value in interface.constants.items()}
        self.use(run, [])

    def __repr__(self) -> str:
        return f"load_jitted({self._interface.name})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or functional() or watched():
            raise InputError(
                "A loaded program does not run inside of transforms or other compilers.",
                fix="Transform the function itself, and export the result.",
            )
        wanted = self._interface
        leaves, spec = flatten_torch_nodes(*flatten(wrap_static(args, kwargs, wanted.names, wanted.static)))
        return super().__call__(self._checked(leaves, spec))

    def _checked(self, leaves: list[Any], spec: Spec) -> list[Any]:
        """Return the leaves as the program needs them.

        Raises:
            InputError: If they are not what it was exported for.
        """
        wanted = self._interface
        check_leaves(leaves)
        if spec != wanted.spec:
            raise _misfit("", str(wanted.spec), str(spec))
        for i, key in self._constant_keys.items():
            if isinstance(leaves[i], Tensor) or _fingerprint(leaves[i]) != key:
                raise _misfit(self._place(i), repr(wanted.constants[i]), repr(leaves[i]))
        recorded = torch.is_grad_enabled()
        for i, layout in wanted.layouts.items():
            leaf = leaves[i]
            if not isinstance(leaf, Tensor) or not layout.takes(leaf):
                raise _misfit(self._place(i), str(layout), described(leaf))
            if recorded and leaf.requires_grad:
                raise InputError(
                    "A loaded program has no derivative, so its arguments must not require grad.",
                    got=f"{self._place(i)}, which does",
                    fix="Detach it, or call the program under torch.no_grad(); export the gradient where it is needed.",
                )
            leaves[i] = layout.restrided(leaf.detach())
        condition = wanted.condition
        if condition is not None and not condition([leaves[i] for i in wanted.layouts]):
            raise _misfit("sizes", condition.text, "others")
        return leaves

    def _place(self, leaf: int) -> str:
        by_name, first, *rest = self._interface.spec.paths()[leaf]
        return f"{first if by_name else f'argument {first}'}{path_text(rest)}"


def _misfit(where: str, expected: str, got: str) -> InputError:
    return InputError(
        "A loaded program takes arguments like those that it was exported for.",
        expected=expected,
        got=got,
        fix="Export another program for these. Sizes that change are named by `dynamic=` of lt.jit; 0 and 1 have "
        "programs of their own.",
        where=where,
    )


def _fingerprint(value: Any) -> Any:
    try:
        return fingerprint(value)
    except NotComparable:
        return None


_INSTRUCTIONS = re.compile(
    r"avx|sse|ssse|fma|bmi|amx|f16c|popcnt|movbe|abm|adx|gfni|vaes|vpclmul|sha_ni|asimd|sve|neon"
)


def _machine() -> dict[str, str]:
    """Return what a program needs of the machine that it runs on."""
    instructions = sorted(word for word in processor().split() if _INSTRUCTIONS.match(word))
    return {"torch": torch.__version__, "machine": platform.machine(), "instructions": " ".join(instructions)}


def _check_machine(about: Mapping[str, str]) -> None:
    here = _machine()
    for name in ("torch", "machine"):
        if about[name] != here[name]:
            raise LuxtorchError(
                "A program runs with the version of torch and the kind of processor that it was exported with.",
                expected=about[name],
                got=here[name],
                fix="Export it again here.",
            )
    lacking = {*about["instructions"].split()} - {*here["instructions"].split()}
    if lacking:
        raise LuxtorchError(
            "The processor lacks instructions that the program was compiled for.",
            got=", ".join(sorted(lacking)),
            fix="Export it again here, or on a machine that has no more than this one.",
        )
