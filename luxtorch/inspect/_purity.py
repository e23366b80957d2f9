"""Find layers that are not pure functions: `check_purity`; and the global random generators of each library."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luxtorch._torch import version_of
from luxtorch._transforms import unwrapped
from luxtorch.core import (
    Layer,
    Parameters,
    States,
    initial_parameters,
    initial_states,
    map_tensors,
    named_leaves,
    nested_dicts,
    out_of_range,
    tree_map,
    tree_structure,
)
from luxtorch.core._statistics import physical
from luxtorch.random import Rng, as_key

from ._watch import Call, Path, describe, watched


def generator_states() -> dict[str, Any]:
    """Return the states of the global generators that there are."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "Python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["torch on CUDA"] = torch.cat(torch.cuda.get_rng_state_all())
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        found["NumPy"] = (name, keys.tobytes(), *rest)
    return found


def moved_generators(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name the generators that have moved on."""
    return [name for name, state in before.items() if not _same_states(state, after[name])]


def _same_states(a: Any, b: Any) -> bool:
    # Under forward-mode transforms, a tensor cannot become an array or bytes.
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def reseed(seed: int) -> None:
    """Set the global generators to a seed."""
    torch.manual_seed(seed)  # noqa: TID251  # between times, `generators_restored` puts them back
    random.seed(seed)  # noqa: TID251
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Put the global generators back afterwards."""
    own, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialized else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(of_numpy)


@dataclass(frozen=True)
class Impurity:
    """Hold in what a layer is not a pure function.

    Attributes:
        path: The path of the layer, such as `"encoder.layer_2"`; empty for the model itself.
        layer: The layer on one line.
        kind: `"mutates"`, `"random"`, `"state"` or `"unrepeatable"`.
        what: What it does.
    """

    path: str
    layer: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{'.'.join(filter(None, ('model', self.path)))} ({self.layer}) {self.what}"


@dataclass(frozen=True)
class PurityReport:
    """Hold what `check_purity` has found; it is true if that is nothing."""

    findings: tuple[Impurity, ...]

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        if not self.findings:
            return "Every layer is a pure function."
        lines = [f"- {finding}\n  fix: {_FIXES[finding.kind]}" for finding in self.findings]
        return "\n".join([f"{len(lines)} found:", *lines])


_FIXES = {
    "mutates": "Make a new tensor or dict, such as x + 1 for x.add_(1), and {**st, name: value} for st[name] = value.",
    "random": "Keep a key in the states, and draw from it: key, rng = lt.random.split(st['rng']).",
    "state": "Return {**st, name: value.detach()}: the names that came, and of layers inside what they returned.",
    "unrepeatable": "Keep what changes from call to call in the states.",
}


def check_purity(
    layer: Layer, x: Any, ps: Parameters | None = None, st: States | None = None, *, rng: Rng = 0
) -> PurityReport:
    """Find the layers inside a model that are not pure functions, and say what they do.

    The model is called twice, and every layer inside is watched: whether it changes its input, its parameters or its
    states; whether it reads or moves on the global random numbers of torch, NumPy or Python; whether the states that it
    returns have the names, shapes and dtypes of those that came, are detached, and hold what the layers inside have
    returned; and whether it returns the same for the same arguments. Copies of the model are then called with other
    parameters first, and with other ones in between, to see whether a call remembers an earlier one. The arguments are
    copied before, and the global random numbers are put back.

    Args:
        layer: The model.
        x: An input.
        ps: Its parameters; the initial ones if None.
        st: Its states; the initial ones if None.
        rng: A seed, a key or a generator for the initial ones.

    Returns:
        A report, to print. Of a fault of one kind, the innermost layer is named, and not those around it: look again
        after fixing it.

    Raises:
        InputError: If the first argument is not a layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> def noisy(x):
        ...     return x + torch.randn(3)
        >>> print(lt.check_purity(lt.Chain(lt.Dense(2, 3), noisy), torch.ones(4, 2)))
        1 found:
        - model.layer_2 (WrappedFunction noisy) uses the global random numbers of torch.
          fix: Keep a key in the states, and draw from it: key, rng = lt.random.split(st['rng']).

    To check a layer of one's own by all laws of luxtorch, transforms included, there is `lt.testing.check_layer`.
    """
    if not isinstance(layer, Layer):
        raise out_of_range("layer", layer, "a layer")
    key = as_key(rng)
    ps = initial_parameters(key, layer) if ps is None else ps
    st = initial_states(key, layer) if st is None else st
    uncalled = [_uncalled(layer) for _ in range(2)]
    runs = []
    for seed in range(2):
        watch = _Watch()
        model = watched(layer, watch)
        with generators_restored(), torch.enable_grad():
            reseed(seed)
            model(_copied(x), _followed(nested_dicts(ps)), _copied(st))
        runs.append(watch)
    first, second = runs
    findings = (*first.findings, *_unrepeated(first, second))
    return PurityReport(findings or tuple(_remembered(uncalled, x, ps, st)))


@dataclass(frozen=True)
class _Called:
    """Hold a call: copies of what went in and came out, so far as these are tensors."""

    path: Path
    layer: Layer
    given: list[dict[str, Any]]
    returned: list[dict[str, Any]]


@dataclass(eq=False)
class _Watch:
    """Watch the calls of layers.

    Attributes:
        findings: What was found.
        calls: The calls, inner ones before those around them.
        states: The states that each layer has returned last.
    """

    findings: list[Impurity] = field(default_factory=list)
    calls: list[_Called] = field(default_factory=list)
    states: dict[Path, Any] = field(default_factory=dict)

    def __call__(self, call: Call, layer: Layer, path: Path, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        before = [Snapshot("input", x), Snapshot("parameter", ps), Snapshot("state", st)]
        random, known = generator_states(), len(self.findings)
        y, new = call(x, ps, st)
        found = [("mutates", line) for snapshot in before for line in snapshot.changes()]
        found += [
            ("random", f"uses the global random numbers of {name}.")
            for name in moved_generators(random, generator_states())
        ]
        found += [("state", line) for line in before[2].faults(new)]
        found += [("state", line) for line in self._dropped(layer, path, new)]
        inside = {finding.kind for finding in self.findings[known:]}
        for kind, what in found:
            finding = _finding(path, layer, kind, what)
            if kind not in inside and finding not in self.findings:
                self.findings.append(finding)
        self.states[path] = new
        given = [snapshot.copies for snapshot in before]
        self.calls.append(_Called(path, layer, given, [Snapshot("output", (y, new)).copies]))
        return y, new

    def _dropped(self, layer: Layer, path: Path, new: Any) -> Iterator[str]:
        """Say which states that layers inside have returned are not among those returned."""
        for name in layer.children():
            inner = self.states.get((*path, name))
            if not name or inner is None or not isinstance(new, Mapping) or name not in new:
                continue
            if not same([Snapshot("state", new[name]).copies], [Snapshot("state", inner).copies]):
                yield f"does not return the new states of '{name}'."


def _unrepeated(first: _Watch, second: _Watch) -> Iterator[Impurity]:
    """Yield the layers that returned something else for the same arguments, unless why is known already."""
    known = {finding.path for finding in first.findings if finding.kind == "random"}
    for one, other in zip(first.calls, second.calls, strict=False):
        if one.path != other.path:  # it has gone another way, for a reason that was found before
            return
        if not same(one.given, other.given) or same(one.returned, other.returned):
            continue
        finding = _finding(one.path, one.layer, "unrepeatable", "returns something else when it is called again.")
        if not any(_within(path, finding.path) for path in known):
            known.add(finding.path)
            yield finding


def _remembered(models: list[Layer], x: Any, ps: Any, st: Any) -> Iterator[Impurity]:
    """Say whether a call of two equal models depends on the parameters of an earlier one: both orders of two trees."""
    ps = nested_dicts(ps)
    other = tree_map(lambda leaf: 0.5 * leaf + 0.1 if leaf.is_floating_point() else leaf, ps)
    found = []
    for model, order in zip(models, ((ps, other), (other, ps)), strict=True):
        with generators_restored(), torch.no_grad():
            for tree in order:
                reseed(0)
                found.append([Snapshot("output", model(_copied(x), tree, _copied(st))).copies])
    if not (same(found[0], found[3]) and same(found[1], found[2])):
        what = "returns something else after a call with other parameters."
        yield _finding((), models[0], "unrepeatable", what)


def _uncalled(layer: Layer) -> Layer:
    """Return a copy that no call has changed."""
    try:
        return pickle.loads(pickle.dumps(layer))  # type: ignore[no-any-return]
    except Exception:  # a layer with functions that have no name
        return copy.deepcopy(layer)


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _finding(path: Path, layer: Layer, kind: str, what: str) -> Impurity:
    return Impurity(".".join(filter(None, path)), describe(layer), kind, what)


def _copied(tree: Any) -> Any:
    return map_tensors(lambda leaf: leaf.detach().clone(), tree)


def _followed(tree: Any) -> Any:
    """Return a copy whose tensors autograd records, and which may be written to nevertheless."""

    def follow(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        return leaf.requires_grad_().clone()

    return tree_map(follow, _copied(tree))


class _Kept(NamedTuple):
    """Hold a leaf of a tree, how often it was written to, and a copy of its numbers."""

    leaf: Any
    version: int
    copy: Any


class Snapshot:
    """Remember the leaves of a tree.

    Args:
        what: What the leaves are, such as "state".
        tree: The tree.
    """

    def __init__(self, what: str, tree: Any) -> None:
        self.what = what
        self._tree = tree
        self._structure = tree_structure(tree)
        self._kept = {name: _Kept(leaf, _version(leaf), _copy(leaf)) for name, leaf in named_leaves(tree)}

    @property
    def copies(self) -> dict[str, Any]:
        """Copies of the leaves by name, and those that are not tensors as they are."""
        return {name: kept.copy for name, kept in self._kept.items()}

    def changes(self) -> Iterator[str]:
        """Say what was done to the tree since then."""
        now = dict(named_leaves(self._tree))
        for name, (leaf, version, before) in self._kept.items():
            title = self._titled(name)
            if name not in now:
                yield f"removes its {title} from the dict that it is given."
            elif _version(leaf) != version or not _equal(_copy(leaf), before):
                yield f"changes its {title} in place."
            elif now[name] is not leaf:
                yield f"replaces its {title} in the dict that it is given."
        extra = [name for name in now if name not in self._kept]
        for name in extra:
            yield f"adds the {self._titled(name)} to the dict that it is given."
        if not extra and now.keys() == self._kept.keys() and tree_structure(self._tree) != self._structure:
            yield f"changes a switch in the {self.what}s that it is given."

    def faults(self, new: Any) -> Iterator[str]:
        """Say in what a tree that is returned departs from this one."""
        if not isinstance(new, Mapping):
            yield f"returns {type(new).__name__} instead of its states."
            return
        now = dict(named_leaves(new))
        for name, (leaf, *_) in self._kept.items():
            if name not in now:
                yield f"does not return the {self._titled(name)}."
            elif isinstance(leaf, Tensor):
                yield from self._leaf_faults(self._titled(name), leaf, now[name])
        for name in now:
            if name not in self._kept:
                yield f"returns the {self._titled(name)}, which it was not given."
        if now.keys() == self._kept.keys() and tree_structure(new) != self._structure:
            yield "returns states of another structure than it was given."

    def _leaf_faults(self, title: str, leaf: Tensor, new: Any) -> Iterator[str]:
        if not isinstance(new, Tensor):
            yield f"returns the {title} as {type(new).__name__}, which is not a tensor."
            return
        if (new.shape, new.dtype) != (leaf.shape, leaf.dtype):
            came, went = (f"{each.dtype} {tuple(each.shape)}" for each in (leaf, new))
            yield f"returns the {title} as {went}, and was given {came}."
        if unwrapped(new).requires_grad:
            yield f"returns the {title} without detaching it."

    def _titled(self, name: str) -> str:
        return f"{self.what} '{name}'" if name else self.what


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    """Tell whether copies of trees are equal, to the bit."""
    return all(
        a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a) for a, b in zip(left, right, strict=True)
    )


def _version(leaf: Any) -> int:
    if not isinstance(leaf, Tensor) or leaf.is_inference():
        return 0
    return version_of(unwrapped(leaf))


def _copy(leaf: Any) -> Any:
    return unwrapped(physical(leaf).clone()) if isinstance(leaf, Tensor) else leaf


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or (type(a) is type(b) and bool(a == b))
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
