"""What the processes of the tests of meshes do; each function runs on every rank of a world."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Replicate as Copied
from torch.distributed.tensor import Shard as Split

import luxtorch as lt
from luxtorch import distributed, optim, training
from luxtorch.core import InputError, tree_leaves, tree_map
from luxtorch.jit import jit
from luxtorch.random._key import is_key

from .work import WAYS, begin, problem

WORDS, WIDTH, LENGTH, BATCH = 11, 16, 6, 8
# With a smaller eps it would divide rounding errors by themselves: the gradient of an attention's key bias is zero.
RULE = optim.AdamW(0.01, eps=1e-4)


def language_model(layers: int, dropout: float = 0.1) -> Any:
    block = lt.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=dropout, norm_first=True, is_causal=True)
    return lt.Chain(lt.Embedding(WORDS, WIDTH), lt.TransformerEncoder(block, layers), lt.Dense(WIDTH, WORDS))


def text() -> tuple[Tensor, Tensor]:
    words = lt.random.randint(lt.random.key(1), (BATCH, LENGTH + 1), 0, WORDS)
    return words[:, :-1], words[:, 1:]


def cross_entropy(model: Any, ps: Any, st: Any, data: Any) -> Any:
    x, y = data
    scores, st = model(x, ps, st)
    return lt.CrossEntropyLoss(dim=-1)(scores, y), st, {}


def whole(tree: Any) -> Any:
    """Return a tree with plain tensors, gathered on all ranks."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def step(data: Any, ts: training.TrainState) -> tuple[Tensor, training.TrainState]:
    _, loss, _, ts = training.single_train_step(cross_entropy, data, ts)
    return loss, ts


def train(step: Any, data: Any, ts: training.TrainState, steps: int) -> tuple[Tensor, training.TrainState]:
    losses = []
    for _ in range(steps):
        loss, ts = step(data, ts)
        losses.append(whole(loss.detach()))
    return torch.stack(losses), ts


def placed(model: Any, data: int) -> tuple[Any, Any, Any]:
    """Return parameters, states and text on a mesh of axes `data` and `model`."""
    mesh = distributed.mesh("cpu", data=data, model=-1)
    ps, st = lt.setup(0, model)
    batch = distributed.place(text(), mesh, {"*": distributed.Shard(0, "data")})
    return distributed.place(ps, mesh, distributed.tensor_parallel(model)), st, batch


def alone(layers: int, steps: int) -> tuple[Tensor, Any]:
    model = language_model(layers)
    losses, ts = train(step, text(), training.TrainState(model, *lt.setup(0, model), RULE), steps)
    return losses, ts.parameters


def losses(folder: Path, data: int, layers: int, steps: int) -> dict[str, Any]:
    """Return the losses of a language model on a mesh, eager and jitted, and where the parameters are in the end."""
    model, found = language_model(layers), {}
    ps, st, batch = placed(model, data)
    jitted = jit(step, backend="replay")
    for way, one in {"eager": step, "jit": jitted, "donated": jit(step, backend="replay", donate="ts")}.items():
        fresh = tree_map(lambda leaf: leaf.clone(), ps)  # as donated ones are used up
        values, ts = train(one, batch, training.TrainState(model, fresh, st, RULE), steps)
        found[way] = values, whole(ts.parameters)
        moved = [n for n, (a, b) in enumerate(zip(tree_leaves(ps), tree_leaves(ts.parameters), strict=True))
                 if a.placements != b.placements]  # fmt: skip
        found[f"{way} moved"] = torch.tensor(moved)
    found["compiled"] = torch.tensor(jitted.cache_info().misses)
    return found


def rules() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield each rule of `optim` that steps a mixed tree by gradients alone, or with the loss."""
    for name in dir(optim):
        cls = getattr(optim, name)
        if isinstance(cls, type) and issubclass(cls, optim.Rule) and cls is not optim.Rule:
            matrices = name == "Muon"
            try:
                yield name, cls(0.02), {"weight": (4, 6)} if matrices else {"weight": (4, 6), "bias": (4,), "scale": ()}
            except (TypeError, InputError):  # it wraps another rule, or takes a number of steps
                continue


def rule_steps(folder: Path) -> dict[str, Any]:
    """Return what each rule makes of sharded parameters in three steps, and of whole ones."""
    mesh, found = distributed.mesh("cpu", model=-1), {}
    places = {"weight": distributed.Shard(1, "model"), "*": distributed.Replicate()}
    for name, rule, shapes in rules():

        def run(ps: Any, place: Any, rule: Any = rule) -> Any:
            def loss(ps: Any) -> Tensor:
                return sum(((p - 0.3) ** 2).sum() * (i + 1) for i, p in enumerate(ps.values()))

            ps = place(ps)
            opt_state = optim.setup(rule, ps)
            extra = {"key": lt.random.key(3)} if rule.__class__.__name__ == "Sophia" else {}
            for _ in range(3):
                grads = lt.gradient(loss, ps)
                opt_state, ps = optim.update(opt_state, ps, grads, value=loss(ps), value_fn=loss, **extra)
            return whole(ps)

        ps = {n: lt.random.normal(lt.random.key(i), shape) for i, (n, shape) in enumerate(shapes.items())}
        found[name] = run(ps, lambda ps: ps), run(ps, lambda ps: distributed.place(ps, mesh, places))
    return found


def spread(leaf: Any, mesh: DeviceMesh, split: bool) -> Any:
    """Return a tensor split along its first even dimension, or copied; keys and counts as they are."""
    if not isinstance(leaf, Tensor) or is_key(leaf) or not (leaf.ndim or leaf.is_floating_point()):
        return leaf
    even = [dim for dim, size in enumerate(leaf.shape) if size % mesh.size() == 0]
    return distribute_tensor(leaf.detach(), mesh, [Split(even[0]) if split and even else Copied()])


def forms() -> Iterator[tuple[str, Any, Any]]:
    """Yield each form of a layer that the law checker is given, with each of its inputs that has elements."""
    for file in sorted((Path(__file__).parents[1] / "layers").glob("test_*.py")):
        if "\nFORMS = {" not in file.read_text():
            continue
        for name, (layer, inputs, *_) in runpy.run_path(str(file))["FORMS"].items():
            for n, x in enumerate(map(_drawn, inputs)):
                # torch never ends with the placement of a view of no elements.
                if all(leaf.numel() for leaf in tree_leaves((x, *lt.setup(0, layer))) if isinstance(leaf, Tensor)):
                    yield f"{file.stem}: {name}, input {n}", layer, x


def _drawn(spec: Any) -> Any:
    if isinstance(spec, Tensor):
        return spec
    if isinstance(spec, dict):
        return {name: _drawn(part) for name, part in spec.items()}
    if all(isinstance(size, int) for size in spec):
        return lt.random.normal(lt.random.key(sum(spec)), spec)
    return tuple(map(_drawn, spec))


def layer_outcomes(folder: Path, split: bool) -> dict[str, str]:
    """Return for each form of a layer what is different from plain tensors: nothing, or the error."""
    mesh, found = distributed.mesh("cpu", ranks=-1), {}
    for name, layer, x in forms():
        x, ps, st = lt.f64((x, *lt.setup(0, layer)))  # so that rounding decides nothing
        expected = _outputs(layer, x, ps, st)
        try:
            x, ps, st = tree_map(lambda leaf: spread(leaf, mesh, split), (x, ps, st))
            got = _outputs(layer, x, ps, st)
        except Exception as error:
            found[name] = f"refused: {type(error).__name__}: {error}"
            continue
        try:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
            found[name] = "same"
        except AssertionError as error:
            found[name] = f"differs: {error}"
    return found


def _outputs(layer: Any, x: Any, ps: Any, st: Any) -> Any:
    """Return output, new state, and the gradient of a loss of the output, as whole tensors."""

    def loss(ps: Any) -> Any:
        y, _ = layer(x, ps, st)
        return sum((leaf.square().sum() for leaf in tree_leaves(y) if _is_number(leaf)), torch.zeros(()))

    y, new = layer(x, ps, st)
    grads = lt.gradient(loss, ps) if any(map(_is_number, tree_leaves(ps))) else ()
    leaves = [leaf for leaf in tree_leaves(whole((y, new, grads))) if isinstance(leaf, Tensor)]
    return [leaf.view(torch.int64) if leaf.dtype == torch.uint64 else leaf for leaf in leaves]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def derivatives(ps: Any, data: Any, model: Any, st: Any) -> dict[str, Any]:
    """Return derivatives of all kinds of a loss of sharded or whole parameters."""

    def loss(ps: Any) -> Tensor:
        x, y = data
        return (model(x, ps, st)[0] - y).square().mean()

    def output(ps: Any, bias: Any) -> Tensor:
        return model(data[0], {**ps, "layer_2": {**ps["layer_2"], "bias": bias}}, st)[0]

    bias = ps["layer_2"]["bias"]
    return {
        "gradient": lt.gradient(loss, ps),
        "value": lt.withgradient(loss, ps)[0],
        "pullback": lt.pullback(loss, ps)[1](loss(ps).detach() * 0 + 2.0),
        "jvp": lt.jacobian_vector_product(loss, ps, ps),
        "hvp": lt.hvp(loss, ps, ps),
        "hvp, forward": lt.hvp(loss, ps, ps, mode="forward"),
        "gradient of a norm": lt.gradient(
            lambda ps: sum(g.square().sum() for g in tree_leaves(lt.gradient(loss, ps))), ps
        ),
        "jacobian": lt.jacobian(lambda bias: output(ps, bias).sum(0), bias),
        "jacobian, forward": lt.jacobian(lambda bias: output(ps, bias).sum(0), bias, mode="forward"),
        "hessian": lt.hessian(lambda bias: output(ps, bias).square().mean(), bias),
        "per-sample gradients": lt.per_sample_gradients(lambda ps, st, x: model(x, ps, st)[0].sum(), ps, st, data[0]),
        "vmap over inputs": torch.func.vmap(lambda x: model(x, ps, st)[0])(data[0]),
        "vmap over models": torch.func.vmap(lambda scale: loss(tree_map(lambda p: p * scale, ps)))(bias),
    }


def operations(folder: Path) -> dict[str, Any]:
    """Return pairs of what becomes of whole and of sharded tensors."""
    mesh = distributed.mesh("cpu", data=1, model=-1)
    model = lt.Chain(lt.Dense(8, 6, "tanh"), lt.Dense(6, 4))
    ps, st = lt.setup(0, model)
    data = lt.random.normal(lt.random.key(1), (8, 8)), lt.random.normal(lt.random.key(2), (8, 4))
    rules = distributed.tensor_parallel(model)
    sharded, batch = distributed.place((ps, data), mesh, {f"0.{name}": rule for name, rule in rules.items()} | {
        "1.*": distributed.Shard(0, "data")})  # fmt: skip
    found: dict[str, Any] = {"placed": (ps, whole(sharded))}
    expected, got = derivatives(ps, data, model, st), derivatives(sharded, batch, model, st)
    found |= {name: (expected[name], whole(got[name])) for name in expected}
    for name, options in {"accumulate": {"accumulate": 2}, "skip": {"skip_nonfinite": True}}.items():
        after = []
        for params, given in ((ps, data), (sharded, batch)):
            ts = training.TrainState(model, params, st, RULE)
            for _ in range(2):
                ts = training.single_train_step(lt.MSELoss(), given, ts, **options)[-1]
            after.append(whole((ts.parameters, ts.states)))
        found[name] = tuple(after)
    ts = training.single_train_step(lt.MSELoss(), data, training.TrainState(model, ps, st, RULE))[-1]
    state_rules = {f"*.{name}*": rule for name, rule in rules.items()}
    later = []
    for given, state in (
        (data, ts),
        (batch, distributed.place(ts, mesh, state_rules)),
        (batch, distributed.place(ts, mesh, {"*": Copy})),
    ):
        later.append(whole(training.single_train_step(lt.MSELoss(), given, state)[-1].parameters))
    found["placed training state"], found["copied training state"] = (later[0], later[1]), (later[0], later[2])
    ema = lt.EMA(0.5)
    averages = [ema.parameters(ema.update(ema.init(params), params)) for params in (ps, sharded)]
    found["ema"] = averages[0], whole(averages[1])
    frozen = [lt.freeze(model, params, st, "layer_1") for params in (ps, sharded)]
    outputs = [layer(x, ps, st)[0] for (layer, ps, st), x in zip(frozen, (data[0], batch[0]), strict=True)]
    found["frozen"] = outputs[0], whole(outputs[1])

    def loss(ps: Any, data: Any) -> Tensor:
        return (model(data[0], ps, st)[0] - data[1]).square().mean()

    jitted, taped = jit(loss, backend="replay"), []
    for params, given in ((ps, data), (sharded, batch)):
        leaf = tree_map(lambda p: p.detach().requires_grad_(), params)
        jitted(leaf, given).backward()
        taped.append([p.grad for p in tree_leaves(leaf)])
    found["tape through jit"] = taped[0], whole(taped[1])

    def loop(xs: Tensor, w: Tensor) -> Any:
        ys = lt.scan(lambda c, x: (torch.tanh(c @ w + x), c.sum(-1)), torch.zeros_like(xs[0]), xs)
        return ys, lt.cond(xs.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), xs)

    loops = lt.random.normal(lt.random.key(3), (5, 4, 8)), lt.random.normal(lt.random.key(4), (8, 8)) / 8
    placed_loops = distributed.place(loops, mesh, {"0": Copy, "1": distributed.Shard(1, "model")})
    for name, one in {"loops": loop, "loops in jit": jit(loop, backend="replay")}.items():
        found[name] = loop(*loops), whole(one(*placed_loops))
    adapted, few, given = lt.lora(model, ps, st, rng=1, rank=2)
    spread_out = distributed.place((few, given), mesh, {f"*{name}": rule for name, rule in rules.items()})
    found["lora"] = adapted(data[0], few, given)[0], whole(adapted(batch[0], *spread_out)[0])
    members = lt.Ensemble(model, 4)
    many = lt.setup(0, members)[0]
    by_member = distributed.place(many, mesh, {"*": distributed.Shard(0, "model")})
    found["ensemble"] = members(data[0], many, st)[0], whole(members(batch[0], by_member, st)[0])

    own = batch[0].to_local()[: 4 if mesh.size() == 2 else 8]
    parts = distributed.place(own, distributed.mesh("cpu", data=-1), {"*": distributed.Shard(0, "data")}, local=True)
    found["local parts"] = torch.tensor(parts.shape), torch.tensor([8, 8])
    elsewhere = distributed.place(sharded, distributed.mesh("cpu", other=-1), {"*": distributed.Replicate()})
    found["moved to another mesh"] = ps, whole(elsewhere)
    return found


def mistakes(folder: Path) -> dict[str, str]:
    """Return what is said of each mistake that two ranks make together."""
    mesh, shard = distributed.mesh("cpu", data=1, model=2), distributed.Shard
    model = lt.Chain(lt.Dense(8, 6, "tanh"), lt.Dense(6, 4))
    ps, st = lt.setup(0, model)
    sharded = distributed.place(ps, mesh, distributed.tensor_parallel(model))
    predict = jit(lambda ps, x: model(x, ps, st)[0], backend="replay")
    x = torch.ones(2, 8)
    attempts = {
        "plain input": lambda: model(x, sharded, st),
        "plain parameters": lambda: model(distributed.place(x, mesh, {"*": shard(0, "data")}), ps, st),
        "vector": lambda: lt.ComponentVector(sharded),
        "odd size": lambda: distributed.place({"x": torch.ones(3, 2)}, mesh, {"x": shard(0, "model")}),
        "axis twice": lambda: distributed.place(ps, mesh, {"*": (shard(0, "model"), shard(1, "model"))}),
        "parts": lambda: distributed.place(
            torch.ones(2 + distributed.rank(), 2), mesh, {"*": shard(0, "model")}, local=True
        ),
        "inside of jit": lambda: jit(lambda x: distributed.place(x, mesh, {"*": Copy}), backend="replay")(x),
        "dimension": lambda: distributed.place({"x": torch.ones(2)}, mesh, {"x": shard(1, "model")}),
        "no rule": lambda: distributed.place(ps, mesh, {"*.weight": Copy}),
        "no axis": lambda: distributed.place(ps, mesh, {"*": shard(0, "modle")}),
        "no placement": lambda: distributed.place(ps, mesh, {"*": 0}),
        "plain gradient": lambda: optim.update(optim.setup(RULE, sharded), sharded, ps),
        "export": lambda: predict.export(folder / "step.pt2", sharded, distributed.place(x, mesh, {"*": Copy})),
        "sizes": lambda: distributed.mesh("cpu", data=2, model=2),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


Copy = distributed.Replicate()


def state_on(data: int) -> training.TrainState:
    model = language_model(1)
    ps, st, _ = placed(model, data)
    return training.TrainState(model, ps, st, RULE)


def saved_by_mesh(folder: Path, data: int) -> Any:
    """Take two steps, save a checkpoint, and return the parameters and moments."""
    ts = train(step, placed(language_model(1), data)[2], state_on(data), 2)[1]
    distributed.save_checkpoint(folder / "state", ts)
    return lt.flatten_names(whole({"ps": ts.parameters, "moments": optim.slots(ts.optimizer_state, "exp_avg")}))


def loaded_by_mesh(folder: Path, data: int) -> Any:
    """Return the same from the checkpoint, on another mesh."""
    ts = distributed.load_checkpoint(folder / "state", state_on(data))
    return lt.flatten_names(whole({"ps": ts.parameters, "moments": optim.slots(ts.optimizer_state, "exp_avg")}))


def collectives(folder: Path, data: int, layers: int) -> dict[str, list[int]]:
    """Return how many bytes go into each collective of a step, by its name; the data axis has `data` ranks."""
    ps, st, batch = placed(language_model(layers), data)
    jitted = jit(step, backend="replay")
    jitted(batch, training.TrainState(language_model(layers), ps, st, RULE))
    found: dict[str, list[int]] = {}
    for node in jitted._known[0].trace.graph.graph.nodes:
        if "_c10d_functional" in str(node.target) and "wait_tensor" not in str(node.target):
            name, given = str(node.target).split(".")[1], node.args[0].meta["val"]
            found.setdefault(name, []).append(given.numel() * given.element_size())
    return found


def jitted_curves(folder: Path) -> dict[str, Any]:
    """Return the losses of each way to train on shares of a batch, eager and jitted, and the number of programs."""
    batches, found = problem()[2], {}
    for way in WAYS:
        curves = []
        ts, step = begin(way, "clipped")
        jitted = jit(step, backend="replay")
        for one in (step, jitted):
            state, values = ts, []
            for batch in batches[:3]:
                loss, state = one(state, distributed.shard_data(batch))
                values.append(loss)
            curves.append(torch.stack(values))
        found[way] = (*curves, jitted.cache_info().misses)
    return found


def gather_events(folder: Path) -> list[str]:
    """Return the order of collectives and products in the gradient of a model that is gathered layer by layer."""
    layer = lt.Checkpointed(distributed.Gathered(lt.Dense(4, 4, "tanh")))
    model = lt.Chain(layer, layer, layer)
    ps, st = lt.setup(0, model)
    ps = distributed.shard_parameters({name: lt.ComponentVector(part) for name, part in ps.items()})
    x = torch.ones(2, 4)
    gradient = jit(lambda ps: lt.gradient(lambda ps: model(x, ps, st)[0].sum(), ps), backend="replay")
    kinds = {"all_gather_into_tensor": "gather", "wait_tensor": "wait", "addmm": "product", "mm": "product"}
    kinds["reduce_scatter_tensor"] = "scatter"
    called = re.findall(r"torch\.ops\.\w+\.(\w+)\.", gradient.lower(ps).graph)
    return [kinds[name] for name in called if name in kinds]


def guide(folder: Path) -> None:
    """Run the blocks of the guide, one after another."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    scope: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(block.replace("distributed.shutdown()", ""), scope)


def held(folder: Path) -> dict[str, float]:
    """Return which part of the bytes of parameters and moments this rank holds, of a fully sharded model."""
    model = lt.Chain(*[lt.Checkpointed(distributed.Gathered(lt.Dense(32, 32, "tanh")))] * 4)
    ps, st = lt.setup(0, model)
    sharded = distributed.shard_parameters({name: lt.ComponentVector(part) for name, part in ps.items()})
    ts = training.TrainState(model, sharded, st, optim.Adam(0.01))
    data = torch.ones(4, 32), torch.zeros(4, 32)
    ts = training.single_train_step(lt.MSELoss(), data, ts)[-1]
    moments = [optim.slots(ts.optimizer_state, name) for name in ("exp_avg", "exp_avg_sq")]
    whole = sum(leaf.nbytes for leaf in tree_leaves(ps))

    def own(tree: Any) -> int:
        return sum(leaf.to_local().nbytes for leaf in tree_leaves(tree))

    return {"parameters": own(ts.parameters) / whole, "moments": own(moments) / (2 * whole)}


def compiled_by_inductor(folder: Path) -> list[Tensor]:
    """Return the losses of a few steps on a mesh, eager and compiled, and those of one process."""
    model = lt.Chain(lt.Dense(8, 16, "gelu"), lt.LayerNorm(16), lt.Dropout(0.2), lt.Dense(16, 4))
    ps, st = lt.setup(0, model)
    data = lt.random.normal(lt.random.key(1), (8, 8)), lt.random.normal(lt.random.key(2), (8, 4))
    mesh = distributed.mesh("cpu", data=1, model=-1)
    sharded = distributed.place(ps, mesh, distributed.tensor_parallel(model))
    batch = distributed.place(data, mesh, {"*": distributed.Shard(0, "data")})

    def step(data: Any, ts: Any) -> Any:
        return training.single_train_step(lt.MSELoss(), data, ts)[1::2]

    found = []
    for one, params, given in ((step, ps, data), (step, sharded, batch), (jit(step), sharded, batch)):
        losses, _ = train(one, given, training.TrainState(model, params, st, RULE), 4)
        found.append(losses)
    return found
