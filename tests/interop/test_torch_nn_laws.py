"""Every module of torch.nn in many forms keeps the laws of luxtorch; the table of it stands in docs/torch_nn.md."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch.core import WrapperLayer, tree_leaves, tree_map
from luxtorch.interop import Inputs, from_torch
from luxtorch.interop._inputs import arguments
from luxtorch.testing._laws import LAWS
from luxtorch.testing._subject import Subject, is_real, same_values

from .forms import FORMS, LOOPED
from .test_torch_nn import of_module

# What torch says about some of these modules; and that parametrized ones make no new originals.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(empty|zero-element|Initializing|support size|nested_tensor|oneDNN|No `reset_parameters`):UserWarning"
)


class With(WrapperLayer):
    """Call a layer with further arguments that are no tensors, and return the tensors of the output."""

    layer: lt.Layer
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x, ps, st):
        args, kwargs = arguments(x)
        y, st = self.layer(Inputs(*args, **kwargs, **dict(self.options)) if self.options else x, ps, st)
        # vmap lets functions return nothing but tensors.
        return y if isinstance(y, Tensor) else [leaf for leaf in tree_leaves(y) if leaf is not None], st


class Converted(Subject):
    """A converted module; other models are made from it by other numbers and keys."""

    def models(self, number):
        def other(leaf, i):
            if leaf.dtype == torch.uint64:
                return lt.random.fold_in(leaf, i)
            return leaf * (1 + 0.1 * i) if is_real(leaf) else leaf

        trees = [tree_map(lambda leaf, i=i: other(leaf, i), (self.ps, self.st)) for i in range(number)]
        return [ps for ps, _ in trees], [st for _, st in trees]

    def variables(self):
        real = [leaf for leaf in tree_leaves(self.x) if is_real(leaf)]
        return ({"ps": self.ps} if tree_leaves(self.ps) else {}) | ({"x": real} if real else {})

    def of_variables(self, variables):
        leaves, structure = pytree.tree_flatten(self.x)
        real = iter(variables.get("x", ()))
        x = pytree.tree_unflatten([next(real) if is_real(leaf) else leaf for leaf in leaves], structure)
        return self.objective(x, variables.get("ps", self.ps), self.st)


class Compiled(Converted):
    """One of which the last function alone is compiled: the gradient, which has the call in it, takes long enough."""

    def calls(self):
        return super().calls()[-1:]


def subjects(form, key, kind=Converted):
    """Return what the laws are checked on: the form's module in train mode and, where it has a mode, in eval mode."""
    module = form.module(key).train()
    layer, ps, st = from_torch(module, key)
    wrapped = With(layer, tuple(form.options.items()))
    modes = [st] if lt.test_mode(st) == st else [st, lt.test_mode(st)]
    # Differences see what has no derivative by definition.
    seen = not any(part in repr(form) for part in UNSEEN)
    words = next((words for part, words in FEWER.items() if part in repr(form)), WORDS)
    subjects = [kind(wrapped, form.draw(0, key), ps, st, key, lambda st: st, "aot_eager", seen, words) for st in modes]
    return list(zip([module, copy.deepcopy(module).eval()], subjects, strict=False))


def gradient_law(form, module, s):
    """The gradients of torch.func are those that autograd takes of the module."""
    if not s.variables() or module.training in form.random:
        return
    module, s = copy.deepcopy(module).double(), s.in_double()
    _, by_x, by_ps = of_module(module, s.x, form.options)
    got, _ = torch.func.grad(s.of_variables, has_aux=True)(s.variables())
    expected = (by_ps if "ps" in got else []) + (by_x if "x" in got else [])
    same_values(
        "gradient", [leaf for name in got for leaf in tree_leaves(got[name])], expected, tolerance=1e-7
    )  # hardsigmoid has a single 1 / 6


def copy_law(form, module, s):
    """The layer can be pickled; its copy computes the same."""
    copied = pickle.loads(pickle.dumps(s.layer))
    same_values("copy", copied(s.x, s.ps, s.st), s.layer(s.x, s.ps, s.st))


OWN = {"gradient": gradient_law, "copy": copy_law}


def check(law, form, module, subject):
    OWN[law](form, module, subject) if law in OWN else LAWS[law](subject)


SHORT = {"component_vector": "vector", "vmap_inputs": "vmap x", "vmap_models": "vmap ps, st"}
CHECKED = (
    *("setup", "purity", "state", "gradient", "forward", "orders", "vmap_inputs", "vmap_models"),
    *("component_vector", "copy", "names", "jit", "compile"),
)
OF_INPUTS = ("purity", "gradient", "forward", "vmap_inputs", "vmap_models")
WORDS = ("RF", "FR", "FF", "rF", "RFR", "FRF")
"""By what derivatives are taken; those that torch has got wrong, with what they are compared with."""
UNSEEN = ("spectral_norm", "padding_idx", "max_norm", "scale_grad_by_freq")
# vmap cannot write into a buffer, nor into the losses that a module gathers from its clusters.
FEWER = {"spectral_norm": ("RF", "FR"), "AdaptiveLog": tuple(set(WORDS) - {"rF"})}
NEEDS = {
    "gradient": lambda s: s.variables(),
    "forward": lambda s: s.variables(),
    "orders": lambda s: s.variables(),
    "vmap_models": lambda s: tree_leaves((s.ps, s.st)),
    "component_vector": lambda s: tree_leaves(s.ps),
}
"""Where a form has nothing that a law could speak about."""

FIRST = {form.call.name: form for form in reversed(FORMS)}
"""The first form of each class: compiling takes too long for more."""

QUICK = {"Bilinear", "Conv2d", "BatchNorm2d", "Dropout", "RReLU", "GRUCell", "CrossEntropyLoss"}


def looped(form):
    """Name the torch function that vmap has no rule for, if the form calls one: torch then loops over the batch."""
    return LOOPED.get(form.call.name) or LOOPED.get(getattr(form.prepare, "__name__", ""))


def marked(form, quick):
    marks = [] if quick else [pytest.mark.slow]
    if looped(form):
        marks.append(pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"))
    return pytest.param(form, id=repr(form), marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("form", [marked(form, FIRST[form.call.name] is form) for form in FORMS])
def test_laws(make_key, form):
    key = make_key()
    for which in range(len(form.inputs)):
        for module, subject in subjects(form, key):
            for law in OF_INPUTS if which else CHECKED[:-1]:
                if law not in form.skip:
                    check(law, form, module, replace(subject, x=form.draw(which, key)))


@pytest.mark.parametrize("form", [marked(form, name in QUICK) for name, form in FIRST.items()])
def test_compile(make_key, form):
    if "compile" in form.skip:
        pytest.skip(form.skip["compile"])
    for module, subject in subjects(form, make_key(), Compiled):
        if module.training or form.random or "running_mean" in subject.st:
            LAWS["compile"](subject)


EXCEPTIONS = {(form.call.name, law, reason): form for form in FORMS for law, reason in form.skip.items()}


@pytest.mark.parametrize("form, law", [pytest.param(f, law, id=f"{f}-{law}") for (_, law, _), f in EXCEPTIONS.items()])
def test_exceptions_are_still_needed(make_key, form, law):
    module, subject = subjects(form, make_key())[0]
    with pytest.raises(Exception):  # noqa: B017  # torch says each in words of its own
        check(law, form, module, subject)


def page(key):
    """Return the table: for each class what it becomes and, for each law, in how many forms that is checked."""
    counts, kinds = defaultdict(lambda: dict.fromkeys(("forms", *CHECKED), 0)), defaultdict(dict)
    exceptions, loops = defaultdict(lambda: defaultdict(dict)), defaultdict(dict)
    for form in FORMS:
        subject, name = subjects(form, key)[0][1], form.call.name
        kinds[name][f"`{described(subject.layer.layer)}`"] = None
        counts[name]["forms"] += 1
        for law in CHECKED:
            able = law not in form.skip and (law != "compile" or FIRST[name] is form)
            counts[name][law] += able and bool(NEEDS.get(law, lambda s: True)(subject))
        for law, reason in form.skip.items():
            exceptions[reason][SHORT.get(law, law)][f"`{name}`"] = None
        if looped(form):
            loops[looped(form)][f"`{name}`" + (f" with {form.prepare.__name__}" if form.prepare else "")] = None
    yield "| class | becomes | forms | " + " | ".join(SHORT.get(law, law) for law in CHECKED) + " |"
    yield "| --- | --- |" + " ---: |" * (1 + len(CHECKED))
    for name, row in sorted(counts.items()):
        yield f"| `{name}` | {', '.join(kinds[name])} | " + " | ".join(str(n or "–") for n in row.values()) + " |"
    yield "\nExceptions, in some forms:\n"
    for reason, laws in exceptions.items():
        names = dict.fromkeys(name for names in laws.values() for name in names)
        yield f"- {', '.join(names)} ({', '.join(laws)}): {reason}."
    yield "\nWhere torch has no batching rule, so that vmap loops, with a warning:\n"
    yield from (f"- `{function}`: {', '.join(names)}" for function, names in loops.items())


def described(layer):
    """Name a layer's class, and what it wraps."""
    inner = layer.children().get("") if isinstance(layer, WrapperLayer) else None
    return type(layer).__name__ + (f"({described(inner)})" if inner else "")


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="the table is that of the newest torch")
def test_the_table_is_the_one_in_the_documentation(make_key, in_docs):
    in_docs("torch_nn.md", "\n".join(page(make_key())))
