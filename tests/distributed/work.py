"""What the processes of the tests do; each function runs on every rank of a world, or in a single process."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

import luxtorch as lt
from luxtorch import distributed, optim, training

STEPS, BATCHES, BATCH = 100, 5, 12
MODEL = lt.Chain(lt.Dense(3, 5, torch.tanh), lt.Dense(5, 2))
RULES = {
    "momentum": lambda: optim.Momentum(0.05, 0.9),
    "adamw": lambda: optim.AdamW(0.01, weight_decay=0.1),
    "clipped": lambda: optim.OptimiserChain(optim.ClipNorm(0.05), optim.Adam(0.01)),
}


def problem() -> tuple[Any, Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return parameters, states and batches, the same in every process."""
    ps, st = lt.setup(0, MODEL)
    x = lt.random.normal(lt.random.key(1), (BATCHES * BATCH, 3), dtype=torch.float64)
    y = torch.stack([x.sum(1).sin(), x.prod(1)], 1)
    return lt.f64(ps), st, list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def objective(model: Any, ps: Any, st: Any, data: Any) -> Any:
    x, y = data
    y_hat, st = model(x, ps, st)
    return (y_hat - y).square().mean(), st, {}


def gathering(model: Any, ps: Any, st: Any, data: Any) -> Any:
    return objective(model, distributed.gather_parameters(ps), st, data)


def averaging(ts: training.TrainState, data: Any) -> tuple[torch.Tensor, training.TrainState]:
    grads, loss, _, ts = training.compute_gradients(objective, data, ts)
    return loss, training.apply_gradients(ts, distributed.average_gradients(grads))


def stepping(objective: Any) -> Any:
    def step(ts: training.TrainState, data: Any) -> tuple[torch.Tensor, training.TrainState]:
        _, loss, _, ts = training.single_train_step(objective, data, ts)
        return loss, ts

    return step


def scattering(ts: training.TrainState, data: Any) -> tuple[torch.Tensor, training.TrainState]:
    whole = distributed.gather_parameters(ts.parameters)
    (loss, _), grads = lt.withgradient(lambda ps: objective(MODEL, ps, ts.states, data)[:2], whole, has_aux=True)
    return loss, training.apply_gradients(ts, distributed.scatter_gradients(grads, ts.parameters))


def by_layer(ps: Any) -> Any:
    return distributed.shard_parameters({name: lt.ComponentVector(part) for name, part in ps.items()})


def sharded(ps: Any) -> Any:
    return distributed.shard_parameters(ps)


def in_copies(ps: Any) -> Any:
    """Shard over pairs of ranks; there is a copy for each pair."""
    ranks = distributed.world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2)) if ranks > 1 else None
    return distributed.shard_parameters(lt.ComponentVector(ps), mesh)


WHOLE_LAYERS = lt.Chain(*(lt.Checkpointed(distributed.Gathered(layer)) for layer in MODEL.layers))
DistributedRule = distributed.DistributedRule

# The form of the parameters, the model, what is made of the rule, and the step.
WAYS = {
    "averaged vector": (lt.ComponentVector, MODEL, lambda rule: rule, averaging),
    "averaged dict": (dict, MODEL, lambda rule: rule, averaging),
    "rule, vector": (lt.ComponentVector, MODEL, DistributedRule, stepping(objective)),
    "rule, dict": (dict, MODEL, DistributedRule, stepping(objective)),
    "sharded vector": (lambda ps: sharded(lt.ComponentVector(ps)), MODEL, lambda rule: rule, stepping(gathering)),
    "sharded dict": (sharded, MODEL, lambda rule: rule, stepping(gathering)),
    "scattered": (lambda ps: sharded(lt.ComponentVector(ps)), MODEL, lambda rule: rule, scattering),
    "sharded copies": (in_copies, MODEL, lambda rule: rule, stepping(gathering)),
    "sharded layers": (by_layer, WHOLE_LAYERS, lambda rule: rule, stepping(objective)),
}


def begin(way: str, rule: str) -> tuple[training.TrainState, Any]:
    form, model, wrap, step = WAYS[way]
    ps, st, _ = problem()
    return training.TrainState(model, form(ps), st, wrap(RULES[rule]())), step


def plain(tree: Any) -> Any:
    """Return whole parameters as plain dicts."""
    return lt.unflatten_names(lt.flatten_names(distributed.gather_parameters(tree)))


def curves(folder: Path, cases: list[tuple[str, str]], steps: int = STEPS) -> dict[str, Any]:
    """Return the curve of the loss over the whole batch, and the final parameters, for each case."""
    batches = problem()[2]
    found = {}
    for way, rule in cases:
        ts, step = begin(way, rule)
        losses = []
        for i in range(steps):
            loss, ts = step(ts, distributed.shard_data(batches[i % BATCHES]))
            losses.append(distributed.average_gradients(loss))
        found[f"{way}/{rule}"] = torch.stack(losses), plain(ts.parameters)
    ts, step = training.TrainState(MODEL, *problem()[:2], RULES["adamw"]()), stepping(objective)
    found["alone"] = plain(step(ts, distributed.shard_data(batches[0]))[1].parameters)
    return found


def counted(folder: Path) -> dict[str, Any]:
    """Return how many collectives one step takes, as torch's profiler sees them, after two steps."""
    data = distributed.shard_data(problem()[2][0])
    found = {}
    for way in WAYS:
        ts, step = begin(way, "adamw")
        for _ in range(2):
            _, ts = step(ts, data)
        with torch.profiler.profile() as profile:
            step(ts, data)
        names = Counter(event.name for event in profile.events())
        found[way] = {name: number for name, number in names.items() if name.startswith("c10d::")}
    return found


def saved(folder: Path) -> dict[str, Any]:
    """Take three steps, save a checkpoint, and take two more."""
    data = [distributed.shard_data(batch) for batch in problem()[2]]
    found = {}
    for way in ("sharded vector", "sharded dict", "averaged vector"):
        ts, step = begin(way, "adamw")
        for batch in data[:3]:
            _, ts = step(ts, batch)
        distributed.save_checkpoint(folder / way, ts)
        found[way] = [described(ts)]
        for batch in data[3:]:
            _, ts = step(ts, batch)
        found[way].append(described(ts))
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """Load the checkpoint, and take two more steps."""
    data = [distributed.shard_data(batch) for batch in problem()[2]]
    found = {}
    for way in ("sharded vector", "sharded dict", "averaged vector"):
        ts, step = begin(way, "adamw")
        ts = distributed.load_checkpoint(folder / way, ts)
        found[way] = [described(ts)]
        for batch in data[3:]:
            _, ts = step(ts, batch)
        found[way].append(described(ts))
    return found


def described(ts: training.TrainState) -> dict[str, torch.Tensor]:
    """Return all leaves of a training state, whole, by their names."""
    return dict(lt.core.named_leaves(distributed.gather_parameters(ts)))


INTEGERS = ("bool", "uint8", "int16", "int32", "int64", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
DTYPES = (*INTEGERS, "float8_e4m3fn", *FLOATS)


def values(dtype: str, rank: int) -> dict[str, torch.Tensor]:
    """Return tensors of all forms, different on each rank."""
    numbers = (torch.arange(6) + rank).reshape(2, 3).to(getattr(torch, dtype))
    return {"plain": numbers, "turned": numbers.T, "one": numbers[1, 2], "none": numbers[:0]}


def everything(folder: Path) -> dict[str, Any]:
    """Return what becomes of everything but training."""
    rank, ranks = distributed.rank(), distributed.world_size()
    found: dict[str, Any] = {"rank": rank, "ranks": ranks, "initialized": distributed.initialized()}
    for dtype in DTYPES:
        found[f"synchronized {dtype}"] = distributed.synchronize(values(dtype, rank), root=1)
    model = lt.Chain(lt.BatchNorm(2), lt.Dropout(0.5))
    ps, st = lt.setup(rank, model)
    ts = training.TrainState(model, lt.ComponentVector(ps), st, optim.Adam(0.1 * (rank + 1)))
    found["synchronized state"] = described(distributed.synchronize(ts))
    weight = torch.ones(2).requires_grad_()
    synchronized = distributed.synchronize([weight, 3, None])
    found["kept"] = [synchronized[0].requires_grad, synchronized[0] is not weight, synchronized[1:] == [3, None]]

    for dtype in FLOATS:
        found[f"averaged {dtype}"] = distributed.average_gradients(values(dtype, 2 * rank))
    mixed = {"a": values("float32", rank), "b": None, "c": values("float64", rank), "d": torch.full((), rank + 0.5)}
    found["averaged mixed"] = distributed.average_gradients(mixed)
    large = torch.full((3,), 60000.0, dtype=torch.float16)
    found["averaged large"] = distributed.average_gradients(large)
    _, new = model(torch.arange(8.0).reshape(4, 2) * (rank + 1), ps, distributed.synchronize(st))
    found["own states"], found["averaged states"] = map(lt.flatten_names, (new, distributed.average_states(new)))
    found["own key"] = distributed.fold_in_rank(lt.setup(0, model)[1])["layer_2"]["rng"]
    found["own mode"] = distributed.fold_in_rank(st)["layer_2"]["training"] == st["layer_2"]["training"]

    rows = torch.arange(14.0).reshape(7, 2)
    for uneven in ("drop", "repeat"):
        found[f"rows {uneven}"] = distributed.shard_data((rows, {"y": rows[:, 0].numpy()}), uneven=uneven)
        found[f"rows {uneven}"][1]["y"] = torch.from_numpy(found[f"rows {uneven}"][1]["y"])
    subset = distributed.shard_data(TensorDataset(rows[:6]))
    found["loaded"] = torch.cat([batch for (batch,) in DataLoader(subset, batch_size=2)])

    ps = {"matrix": rows[:5] + rank, "bias": torch.full((1,), 2.0 + rank), "scale": torch.tensor(3.0 + rank)}
    ps["count"] = torch.tensor(rank)
    shards = distributed.shard_parameters(ps)
    found["whole"] = distributed.gather_parameters(shards)
    vector = distributed.shard_parameters(lt.ComponentVector(problem()[0]))
    state = optim.setup(optim.Adam(0.1), vector).state.leaves["flat"]["exp_avg"]
    found["own sizes"] = [vector.flat.to_local().numel(), state.to_local().numel(), vector.flat.numel()]
    by_component = optim.update(optim.setup(optim.LAMB(0.1), vector), vector, vector)[1]
    again = distributed.shard_parameters(by_component)
    found["sharded again"] = [by_component.flat.to_local().numel(), again.flat.to_local().numel()]
    found["sharded kept"] = [
        distributed.synchronize(vector).flat is vector.flat,
        distributed.average_gradients(vector).flat is vector.flat,
    ]
    return found


def share(x: Any) -> Any:
    return torch.sin((distributed.rank() + 1) * x)


def mean_of_shares(x: Any) -> Any:
    return distributed.average_gradients(share(x))


# Each takes a function of a tensor, and numbers.
TRANSFORMS = {
    "value": lambda f, x: f(x),
    "dict": lambda f, x: f({"x": x})["x"],
    "grad": lambda f, x: torch.func.grad(lambda x: (f(x) ** 2).sum())(x),
    "tape": lambda f, x: torch.autograd.grad((f(leaf := x.clone().requires_grad_()) ** 2).sum(), [leaf])[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jvp of jvp": lambda f, x: torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (x * 0 + 1,))[1], (x,), (x,))[1],
    "vmap": lambda f, x: torch.vmap(f)(x),
    "vmap last": lambda f, x: torch.vmap(f, in_dims=1, out_dims=1)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: (f(x) ** 2).sum()))(x),
    "vmap of jvp": lambda f, x: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1])(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: (torch.vmap(f)(x) ** 2).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: (f(x) ** 3).sum())(x),
    "grad of grad": lambda f, x: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: (f(x) ** 3).sum())(x) * x.cos()).sum()
    )(x),
}
COMPILED = ("value", "grad", "tape", "jvp", "vmap", "vmap last")
FULL = {"fullgraph": True, "backend": "aot_eager"}
NUMBERS = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3)


def transformed(folder: Path) -> dict[str, Any]:
    """Return what transforms make of an average; where it is a derivative, each rank has its share of it."""
    found = {}
    for name, transform in TRANSFORMS.items():
        if name == "dict":
            result = transform(lambda tree: distributed.average_gradients({"x": share(tree["x"])}), NUMBERS)
        else:
            result = transform(mean_of_shares, NUMBERS)
        found[name] = distributed.average_gradients(result)
    return found


def compiled(folder: Path) -> dict[str, Any]:
    """Return the same of compiled functions, and whole compiled steps."""
    found = {}
    for name in COMPILED:
        transform = TRANSFORMS[name]
        if name == "tape":
            f = torch.compile(mean_of_shares, **FULL)
            result = transform(f, NUMBERS)
        else:
            f = torch.compile(lambda x, transform=transform: transform(mean_of_shares, x), **FULL)
            result = f(NUMBERS)
        found[name] = distributed.average_gradients(result)
    data = distributed.shard_data(problem()[2][0])
    for way in ("averaged vector", "rule, dict", "scattered"):
        ts, step = begin(way, "clipped")
        compiled_step = torch.compile(step, **FULL)
        for _ in range(3):
            _, ts = compiled_step(ts, data)
        found[way] = plain(ts.parameters)
    loss = torch.compile(lambda flat: gathering(MODEL, named(flat), problem()[1], data)[0], **FULL)
    vector = distributed.shard_parameters(lt.ComponentVector(problem()[0]))

    def named(flat: torch.Tensor) -> lt.ComponentVector:
        return lt.ComponentVector.from_flat(flat, vector.axes)

    flat = vector.flat.detach().requires_grad_()
    found["sharded gradient"] = plain(named(torch.autograd.grad(loss(flat), [flat])[0]))
    return found


def sharded_derivatives(folder: Path) -> dict[str, Any]:
    """Return derivatives with respect to sharded parameters, in whole."""
    ps, st, batches = problem()
    data, found = distributed.shard_data(batches[0]), {}

    def loss(ps: Any) -> Any:
        return gathering(MODEL, ps, st, data)[0]

    def slope(ps: Any, along: Any) -> Any:
        """Return the sum of the products of a gradient and a direction, both in whole."""
        return sum((a * b).sum() for a, b in zip(whole(lt.gradient(loss, ps)), whole(along), strict=True))

    for form, vector in (("vector", lt.ComponentVector(ps)), ("dict", ps)):
        shards = distributed.shard_parameters(vector)
        grads = lt.gradient(loss, shards)
        found[f"gradient, {form}"] = plain(grads)
        found[f"hvp, {form}"] = plain(lt.hvp(loss, shards, grads))
        found[f"twice, {form}"] = plain(torch.func.grad(slope)(shards, grads))
        each = torch.vmap(torch.func.grad(lambda ps, x, y: gathering(MODEL, ps, st, (x, y))[0]), (None, 0, 0))
        of_rows = each(shards, *data)  # a batch of sharded gradients
        found[f"rows, {form}"] = plain(lt.core.tree_map(lambda rows: rows.mean(0), of_rows))
    return found


def whole(tree: Any) -> list[torch.Tensor]:
    return lt.core.tree_leaves(distributed.gather_parameters(tree))


def mistaken(folder: Path) -> dict[str, str]:
    """Return what is said about mistakes."""
    rank, ps = distributed.rank(), distributed.shard_parameters({"weight": torch.ones(4)})
    one = torch.ones(2)
    distributed.save_checkpoint(folder / "good", {"weight": one, "vector": lt.ComponentVector({"a": one, "b": one})})
    (folder / "other").mkdir(exist_ok=True)
    good = {"weight": one, "vector": lt.ComponentVector({"a": one, "b": one})}
    cases = {
        "root": lambda: distributed.synchronize({"a": one}, root=7),
        "negative root": lambda: distributed.synchronize({"a": one}, root=-1),
        "shapes": lambda: distributed.synchronize({"a": torch.ones(2 + rank)}),
        "dtypes": lambda: distributed.synchronize({"a": one.double() if rank else one}),
        "names": lambda: distributed.synchronize({"ab"[rank]: one}),
        "more": lambda: distributed.synchronize([one] * (1 + rank)),
        "inside": lambda: torch.vmap(distributed.synchronize)(one),
        "sharding inside": lambda: torch.vmap(distributed.shard_parameters)(one),
        "integers": lambda: distributed.average_gradients({"a": torch.ones(2, dtype=torch.int64)}),
        "uneven": lambda: distributed.shard_data(torch.ones(5)),
        "too few": lambda: distributed.shard_data(torch.ones(1), uneven="drop"),
        "way": lambda: distributed.shard_data(torch.ones(4), uneven="pad"),
        "stream": lambda: distributed.shard_data(iter([1, 2])),
        "sizes": lambda: distributed.shard_data((torch.ones(4), torch.ones(6))),
        "structure": lambda: distributed.scatter_gradients({"bias": torch.ones(4)}, ps),
        "shape": lambda: distributed.scatter_gradients({"weight": torch.ones(5)}, ps),
        "occupied": lambda: distributed.save_checkpoint(folder / "other", good),
        "no folder": lambda: distributed.save_checkpoint(folder / "no" / "step", good),
        "leaf": lambda: distributed.save_checkpoint(folder / "new", {"a": 3}),
        "twice": lambda: distributed.save_checkpoint(folder / "new", {"a.b": one, "a": {"b": one}}),
        "absent": lambda: distributed.load_checkpoint(folder / "absent", good),
        "other names": lambda: distributed.load_checkpoint(folder / "good", {**good, "wieght": one}),
        "other shape": lambda: distributed.load_checkpoint(folder / "good", {**good, "weight": torch.ones(3)}),
        "other dtype": lambda: distributed.load_checkpoint(folder / "good", {**good, "weight": one.double()}),
        "other axes": lambda: distributed.load_checkpoint(
            folder / "good", {**good, "vector": lt.ComponentVector({"b": one, "a": one})}
        ),
    }
    found = {}
    for name, case in cases.items():
        try:
            found[name] = f"no error: {case()!r:.100}"
        except lt.LuxtorchError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def dying(folder: Path, what: str, how: str) -> str:
    """Let the last rank stop in the third of the steps; return what the others report, and after how long."""
    ts, step = begin(what, "adamw")
    data = distributed.shard_data(problem()[2][0])
    began = time.monotonic()
    try:
        for i in range(5):
            began = time.monotonic()
            if i == 2 and distributed.rank() == distributed.world_size() - 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(4)
                return "late"
            _, ts = step(ts, data)
    except lt.LuxtorchError as error:
        report = f"{type(error).__name__} after {time.monotonic() - began:.1f} s\n{error}"
        (folder / f"report_{distributed.rank()}").write_text(report)
        os._exit(7)  # the last ranks need not be waited for
    return "finished"
