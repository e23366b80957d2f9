"""Proximal policy optimization in a grid world
============================================

An agent learns to find a goal in four rooms. World, policy and learning are pure
functions with keys, and all loops are `lt.scan`: over the steps of 64 worlds at once,
backwards over the rewards, and over the minibatches of an update, with the optimizer's
state in the carry. So one update, of 8192 steps and 16 gradients, is one compiled
function.
"""

from pathlib import Path

import torch

import luxtorch as lt
from luxtorch import optim, training

UPDATES, WORLDS, LENGTH, LIMIT = 160, 64, 128, 50
EPOCHS, PARTS = 4, 4
DISCOUNT, TRACE, CLIP, ENTROPY = 0.97, 0.95, 0.2, 0.03

# %%
# The world
# ---------
#
# A world is a position, a goal and the time; what a move leads to is a table. A step is
# written for one world, and `vmap` makes it one for many. Where an episode ends, the
# next one begins at places that are drawn by a key.

plan = """
###########
#    #    #
#    #    #
#         #
#    #    #
## #### ###
#    #    #
#    #    #
#         #
#    #    #
###########
"""
rows = plan.strip().splitlines()
cells = [
    (i, j) for i, row in enumerate(rows) for j, sign in enumerate(row) if sign == " "
]
place = {cell: number for number, cell in enumerate(cells)}
moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]
ahead = torch.tensor(
    [[place.get((i + di, j + dj), place[i, j]) for di, dj in moves] for i, j in cells]
).flatten()


def begin(key):
    """Return a world at its beginning."""
    position, goal = lt.random.randint(key, (2,), 0, len(cells)).unbind()
    return {"position": position, "goal": goal, "time": torch.zeros_like(goal)}


def step(world, action, key):
    """Return the next world, the reward, and whether an episode has ended."""
    position = ahead[(4 * world["position"] + action)[None]][0]
    found = position == world["goal"]
    done = found | (world["time"] == LIMIT - 1)
    moved = {"position": position, "goal": world["goal"], "time": world["time"] + 1}
    new = begin(key)
    return (
        {name: torch.where(done, new[name], moved[name]) for name in moved},
        found.float(),
        done,
    )


# %%
# The policy
# ----------
#
# From position and goal to the scores of the four moves, and to what reward is
# expected.

model = lt.Chain(
    lt.Parallel(torch.add, lt.Embedding(len(cells), 64), lt.Embedding(len(cells), 64)),
    torch.tanh,
    lt.Dense(64, 64, "tanh"),
    lt.BranchLayer(lt.Dense(64, 4), lt.Dense(64, 1)),
)
ps, st = lt.setup(0, model)
print(model)


def judge(ps, world):
    """Return the logarithms of the moves' probabilities, and the expected reward."""
    (scores, value), _ = model((world["position"], world["goal"]), ps, st)
    return scores.log_softmax(-1), value[..., 0]


def play(ps, worlds, key):
    """Return the worlds after some steps, and what happened, (steps, worlds)."""

    def once(worlds, key):
        chance, *others = lt.random.split(key, 1 + WORLDS)
        logs, value = judge(ps, worlds)
        noise = -(-lt.random.uniform(chance, logs.shape).log()).log()
        action = (logs + noise).argmax(-1)
        new, reward, done = torch.vmap(step)(worlds, action, torch.stack(others))
        log = logs.gather(-1, action[:, None])[:, 0]
        seen = {"position": worlds["position"], "goal": worlds["goal"]}
        return new, {
            **seen,
            "action": action,
            "log": log,
            "value": value,
            "reward": reward,
            "done": done,
        }

    return lt.scan(once, worlds, lt.random.split(key, LENGTH))


def advantages(happened, last):
    """Return how much better it went than expected.

    That is generalized advantage estimation, from the end to the beginning.
    """

    def back(carry, now):
        advantage, after = carry
        value, reward, done = now
        goes_on = DISCOUNT * (~done).float()
        advantage = reward + goes_on * after - value + goes_on * TRACE * advantage
        return (advantage, value), advantage

    now = happened["value"], happened["reward"], happened["done"]
    return lt.scan(back, (torch.zeros_like(last), last), now, reverse=True)[1]


# %%
# Learning
# --------


def loss(ps, batch):
    """Return the clipped objective of Schulman et al. (2017).

    It has the errors of the values and an entropy in it.
    """
    logs, value = judge(ps, batch)
    ratio = (logs.gather(-1, batch["action"][:, None])[:, 0] - batch["log"]).exp()
    gain = batch["advantage"]
    gain = (gain - gain.mean()) / (gain.std() + 1e-6)
    policy = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    return (value - batch["return"]).square().mean() / 2 - policy - ENTROPY * entropy


@lt.jit(backend="replay")
def update(opt_state, ps, worlds, key):
    """Play, learn from it, and return the goals found in each episode that ended."""
    play_key, order_key = lt.random.split(key)
    worlds, happened = play(ps, worlds, play_key)
    _, last = judge(ps, worlds)
    happened["advantage"] = advantages(happened, last)
    happened["return"] = happened["advantage"] + happened["value"]
    flat = {name: value.flatten() for name, value in happened.items()}
    places = torch.arange(WORLDS * LENGTH)
    orders = [
        lt.random.permutation(one, places).view(PARTS, -1)
        for one in lt.random.split(order_key, EPOCHS)
    ]

    def learn(carry, chosen):
        opt_state, ps = carry
        batch = {name: value[chosen] for name, value in flat.items()}
        value, grads = lt.withgradient(lambda ps: loss(ps, batch), ps)
        return optim.update(opt_state, ps, grads), value

    (opt_state, ps), losses = lt.scan(learn, (opt_state, ps), torch.cat(orders))
    ended = happened["done"].sum()
    found, steps = happened["reward"].sum() / ended, LENGTH * WORLDS / ended
    return opt_state, ps, worlds, (found, steps, losses.mean())


rule = optim.OptimiserChain(
    optim.ClipNorm(0.5), optim.Adam(optim.cosine(4e-3, 0.0, 16 * UPDATES))
)
opt_state, key = optim.setup(rule, ps), lt.random.key(1)
worlds = torch.vmap(begin)(lt.random.split(lt.random.key(2), WORLDS))
curve = []
for number in (bar := training.progress(range(UPDATES))):
    update_key = lt.random.fold_in(key, number)
    opt_state, ps, worlds, seen = update(opt_state, ps, worlds, update_key)
    found, steps, value = seen
    curve.append((found.item(), steps.item()))
    bar.show(found=found)
print(
    f"goals found: {curve[0][0]:.0%} at first, "
    f"{curve[-1][0]:.0%} in the end, in {curve[-1][1]:.1f} steps"
)
assert curve[-1][0] > 0.9, "the agent does not find the goals"
graph = update.lower(opt_state, ps, worlds, key).graph
print("operators of an update:", graph.count("torch.ops."))

# %%
# Picture
# -------
#
# What is expected from each place for one goal, and where the most likely move leads.

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    goal = place[2, 8]
    with torch.no_grad():
        logs, value = judge(
            ps,
            {
                "position": torch.arange(len(cells)),
                "goal": torch.full((len(cells),), goal),
            },
        )
    image = torch.full((len(rows), len(rows[0])), torch.nan)
    at = torch.tensor(cells)
    image[at[:, 0], at[:, 1]] = value
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    left.plot([found for found, _ in curve], label="goals found in an episode")
    left.plot(
        [steps / LIMIT for _, steps in curve], label=f"steps of an episode, of {LIMIT}"
    )
    left.set(xlabel=f"updates, of {WORLDS * LENGTH} steps each", ylim=(0, 1.02))
    left.legend()
    shown = right.imshow(image.numpy(), cmap="viridis")
    right.set_facecolor("0.25")
    figure.colorbar(shown, label="expected reward")
    arrows = torch.tensor(moves)[logs.argmax(-1)]
    others = torch.arange(len(cells)) != goal
    right.quiver(
        at[others, 1],
        at[others, 0],
        arrows[others, 1],
        -arrows[others, 0],
        color="w",
        pivot="mid",
    )
    right.plot(cells[goal][1], cells[goal][0], "r*", markersize=16)
    right.set(xticks=[], yticks=[], title="What is expected, and the likeliest moves")
    path = Path(__file__).resolve().parent / "output" / "ppo_gridworld.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
