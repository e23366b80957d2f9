"""An update of proximal policy optimization: play in many grid worlds, look back, and learn in minibatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import luxtorch as lt
from luxtorch import optim

from ..problems import Data, LeftOut, Problem
from . import Build, Step
from .models import tensors

LIMIT, DISCOUNT, TRACE, CLIP, ENTROPY = 30, 0.97, 0.95, 0.2, 0.01

Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From positions and goals to the logarithms of the moves' probabilities, and to the expected rewards."""


def advance(moves: Tensor, world: Tensor, action: Tensor, restart: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return one world (position, goal, time) after a move, the reward, and whether an episode has ended."""
    position, goal, time = world.unbind()
    position = moves[(4 * position + action)[None]][0]
    found = position == goal
    done = found | (time == LIMIT - 1)
    new = torch.where(done, torch.cat([restart, restart[:1] * 0]), torch.stack([position, goal, time + 1]))
    return new, found.float(), done


def act(
    judge: Judge, moves: Tensor, worlds: Tensor, noise: Tensor, restarts: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the worlds after a move of each, and what happened."""
    logs, value = judge(worlds[:, 0], worlds[:, 1])
    action = (logs + noise).argmax(-1)
    new, reward, done = torch.vmap(advance, (None, 0, 0, 0))(moves, worlds, action, restarts)
    log = logs.gather(-1, action[:, None])[:, 0]
    seen = {"position": worlds[:, 0], "goal": worlds[:, 1], "action": action, "log": log, "value": value}
    return new, {**seen, "reward": reward, "done": done}


def look_back(carry: tuple[Tensor, Tensor], now: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the advantage of a step from that of the next one: generalized advantage estimation."""
    advantage, after = carry
    goes_on = DISCOUNT * (~now["done"]).float()
    advantage = now["reward"] + goes_on * after - now["value"] + goes_on * TRACE * advantage
    return (advantage, now["value"]), advantage


def objective(judge: Judge, batch: dict[str, Tensor]) -> Tensor:
    """Return the clipped objective of Schulman et al. (2017), with the errors of the values and an entropy."""
    logs, value = judge(batch["position"], batch["goal"])
    ratio = (logs.gather(-1, batch["action"][:, None])[:, 0] - batch["log"]).exp()
    gain = batch["advantage"]
    gain = (gain - gain.mean()) / (gain.std(correction=0) + 1e-6)
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    return (value - batch["advantage"] - batch["value"]).square().mean() / 2 - policy - ENTROPY * entropy


class Policy(nn.Module):
    """The policy as a module, with the names that luxtorch's has."""

    def __init__(self, ps: dict[str, Tensor]) -> None:
        super().__init__()
        (cells, width), layers = next(iter(ps.values())).shape, nn.ModuleDict
        self.layer_1 = layers({f"layer_{i}": nn.Embedding(cells, width) for i in (1, 2)})
        self.layer_3 = nn.Linear(width, width)
        self.layer_4 = layers({"layer_1": nn.Linear(width, 4), "layer_2": nn.Linear(width, 1)})
        self.load_state_dict(ps)

    def forward(self, position: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the moves' probabilities, and the expected rewards."""
        x = torch.tanh(self.layer_1["layer_1"](position) + self.layer_1["layer_2"](goal))
        x = torch.tanh(self.layer_3(x))
        return self.layer_4["layer_1"](x).log_softmax(-1), self.layer_4["layer_2"](x)[:, 0]


def torch_nn(compiled: bool = False, **options: bool) -> Build:
    """Loop in Python and train a module by torch.optim; compiled are what it does in a step and the objective."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        module, given = Policy(tensors(data.ps, "cpu")).to(device), tensors(dict(data.others), device)
        optimizer = torch.optim.Adam(module.parameters(), lr=problem.lr, **options)
        worlds = torch.cat([given["places"], 0 * given["places"][:, :1]], 1)
        compile = torch.compile if compiled else lambda f: f
        one, loss_of = compile(act), compile(objective)

        def play(worlds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            steps = []
            for noise, restarts in zip(given["noise"], given["restarts"], strict=True):
                worlds, happened = one(module, given["moves"], worlds, noise, restarts)
                steps.append(happened)
            last = module(worlds[:, 0], worlds[:, 1])[1]
            carry, advantages = (torch.zeros_like(last), last), []
            for happened in reversed(steps):
                carry, advantage = look_back(carry, happened)
                advantages.append(advantage)
            flat = {name: torch.cat([happened[name] for happened in steps]) for name in steps[0]}
            return worlds, flat | {"advantage": torch.cat(advantages[::-1])}

        def step() -> Tensor:
            nonlocal worlds
            with torch.no_grad():
                worlds, flat = play(worlds)
            losses = []
            for chosen in given["orders"]:
                optimizer.zero_grad()
                loss = loss_of(module, {name: value[chosen] for name, value in flat.items()})
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses).mean()

        return step

    return build


def whole_update(problem: Problem, data: Data, device: str) -> Step:
    """Compile all of the update, which has loops of Python."""
    raise LeftOut(
        f"torch.compile would unroll {problem.steps} steps, twice, and {len(data.others['orders'])} gradients"
    )


def luxtorch(vector: bool, compiled: bool = False, donate: bool = False) -> Build:
    """Write all loops by lt.scan; the whole update is one function."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        cells, width = next(iter(data.ps.values())).shape
        model = lt.Chain(
            lt.Parallel(torch.add, lt.Embedding(cells, width), lt.Embedding(cells, width)),
            torch.tanh,
            lt.Dense(width, width, "tanh"),
            lt.BranchLayer(lt.Dense(width, 4), lt.Dense(width, 1)),
        )
        ps, st, _ = lt.load_weights(tensors(data.ps, "cpu"), *lt.setup(0, model))
        ps, st, given = lt.to_device((ps, st, tensors(dict(data.others), "cpu")), device)
        ps = lt.ComponentVector(ps) if vector else ps
        opt_state = optim.setup(optim.Adam(problem.lr), ps)
        worlds = torch.cat([given["places"], 0 * given["places"][:, :1]], 1)

        def judge(ps: Any) -> Judge:
            def call(position: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
                (scores, value), _ = model((position, goal), ps, st)
                return scores.log_softmax(-1), value[:, 0]

            return call

        def update(opt_state: Any, ps: Any, worlds: Tensor, given: dict[str, Tensor]) -> Any:
            worlds, happened = lt.scan(
                lambda worlds, drawn: act(judge(ps), given["moves"], worlds, *drawn),
                worlds,
                (given["noise"], given["restarts"]),
            )
            last = judge(ps)(worlds[:, 0], worlds[:, 1])[1]
            _, happened["advantage"] = lt.scan(look_back, (torch.zeros_like(last), last), happened, reverse=True)
            flat = {name: value.flatten() for name, value in happened.items()}

            def learn(carry: Any, chosen: Tensor) -> Any:
                opt_state, ps = carry
                batch = {name: value[chosen] for name, value in flat.items()}
                loss, grads = lt.withgradient(lambda ps: objective(judge(ps), batch), ps)
                return optim.update(opt_state, ps, grads), loss

            (opt_state, ps), losses = lt.scan(learn, (opt_state, ps), given["orders"])
            return opt_state, ps, worlds, losses.mean()

        call = lt.jit(update, donate=("opt_state", "ps") if donate else ()) if compiled else update

        def step() -> Tensor:
            nonlocal opt_state, ps, worlds
            opt_state, ps, worlds, loss = call(opt_state, ps, worlds, given)
            return loss

        return step

    return build


CANDIDATES: dict[str, Build] = {
    "torch.nn + torch.optim": torch_nn(),
    "torch.nn + torch.optim, fused": torch_nn(fused=True),
    "torch.compile of one step and of the loss, fused": torch_nn(compiled=True, fused=True),
    "torch.compile of the whole update": whole_update,
    "luxtorch, dict": luxtorch(vector=False),
    "luxtorch, ComponentVector": luxtorch(vector=True),
    "lt.jit, dict": luxtorch(vector=False, compiled=True),
    "lt.jit, dict, donated": luxtorch(vector=False, compiled=True, donate=True),
    "lt.jit, ComponentVector": luxtorch(vector=True, compiled=True),
    "lt.jit, ComponentVector, donated": luxtorch(vector=True, compiled=True, donate=True),
}
