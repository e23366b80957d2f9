"""Programs of earlier processes: found again by equal graphs alone, and never in place of another."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.jit import _inductor, _programs, jit
from luxtorch.jit._bodies import in_table
from luxtorch.jit._trace import record

from .conftest import compiled

pytestmark = compiled


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "luxtorch"


@pytest.fixture
def compilations(monkeypatch):
    """Count how often a program or a body is compiled rather than found."""
    counts = []
    for name in ("_compile_new", "_compile_new_body"):
        made = getattr(_inductor, name)
        monkeypatch.setattr(_inductor, name, lambda *args, name=name, made=made: counts.append(name) or made(*args))
    return counts


def key_of(function, *tensors, about=None, options=None):
    graph = record(function, list(tensors), {})
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return _programs.program_key(graph, fakes, about, options or {})


def training_step():
    model = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dropout(0.5), lt.Dense(4, 1))
    ps, st = lt.setup(0, model)
    ts = training.TrainState(model, ps, st, optim.Adam(0.01))
    batch = torch.arange(6.0).reshape(2, 3), torch.ones(2, 1)

    def step(ts):
        _, loss, _, ts = training.single_train_step(lt.losses.MSELoss(), batch, ts)
        return loss, ts

    return step, ts


def loop(weight, xs):
    def step(carry, x):
        carry = torch.tanh(carry @ weight + x)
        return carry, 2 * carry

    return lt.scan(step, torch.zeros(4), xs)


def loop_gradient(weight, xs):
    return lt.gradient(lambda weight: loop(weight, xs)[1].square().sum(), weight)


@pytest.mark.slow
@pytest.mark.parametrize("donate", [(), ("ts",)], ids=["kept", "donated"])
def test_an_equal_training_step_is_found(compilations, same, donate):
    results = []
    for _ in range(2):
        step, ts = training_step()
        jitted = jit(step, donate=donate, backend="inductor")
        _, ts = jitted(ts)
        results.append(jitted(ts))
    assert compilations == ["_compile_new"]
    same(results[1], results[0], 0)
    step, ts = training_step()
    same(results[1], step(step(ts)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("function", [loop, loop_gradient], ids=["forward", "gradient"])
def test_an_equal_loop_is_found_with_its_bodies(compilations, rng, function, same):
    weight, xs = torch.randn(4, 4, generator=rng), torch.randn(7, 4, generator=rng)
    gc.collect()
    before = in_table()
    first = jit(function, backend="inductor")(weight, xs)
    gc.collect()  # the program is gone after the call, and so are its bodies
    assert in_table() == before
    made = len(compilations)
    assert "_compile_new_body" in compilations
    again = jit(lambda weight, xs: function(weight, xs), backend="inductor")(weight, xs)
    assert len(compilations) == made
    same(again, first, 0)
    same(again, function(weight, xs))


@pytest.mark.slow
def test_what_is_found_has_the_code(compilations):
    texts = [jit(lambda x: x.sin() + 1, backend="inductor").lower(torch.ones(3)).code for _ in range(2)]
    assert texts[0] == texts[1] != "" and len(compilations) == 1


@pytest.mark.slow
def test_the_next_process_compiles_nothing(tmp_path):
    script = """
import sys
import torch, luxtorch as lt
from luxtorch.jit import _inductor
made = _inductor._compile_new
_inductor._compile_new = lambda *args: print("compiled") or made(*args)
table = torch.arange(float(sys.argv[1]))
print(lt.jit(lambda x: (x.sin() * table).sum(), backend="inductor")(torch.ones(3)).item())
"""

    def run(upper):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", script, upper]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    first = run("3")
    assert first[0] == "compiled"
    assert run("3") == first[1:]


@pytest.mark.slow
def test_a_changed_closed_over_tensor_is_another_program(compilations):
    for value in (2.0, 3.0, 2.0):
        table = torch.full((3,), value)
        got = jit(lambda x, table=table: x * table, backend="inductor")(torch.ones(3))
        assert torch.equal(got, table)
    assert len(compilations) == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "garbage", "of another", "number", "emptied", "gone"])
def test_damaged_files_are_not_believed(compilations, folder, damage):
    x = torch.linspace(0, 1, 5)
    other = jit(torch.cos, backend="inductor")
    other(x)
    (strange,) = folder.iterdir()
    text = strange.read_text()
    jit(torch.sin, backend="inductor")(x)
    (path,) = [path for path in folder.iterdir() if path != strange]
    wrong = {"cut": path.read_text()[:-20], "garbage": "\0\1", "of another": text, "number": "7", "emptied": ""}
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(wrong[damage])
    assert torch.allclose(jit(torch.sin, backend="inductor")(x), x.sin())
    assert len(compilations) == 3
    assert torch.allclose(jit(torch.sin, backend="inductor")(x), x.sin())
    assert len(compilations) == 3  # it was written anew


@pytest.mark.slow
def test_programs_that_inductor_has_dropped_are_compiled_again(compilations, folder):
    x = torch.linspace(0, 1, 5)
    jit(torch.sin, backend="inductor")(x)
    (path,) = folder.iterdir()
    stored = json.loads(path.read_text())["known"]
    _programs.store(path.stem, {**stored, "program": "f" + "a" * 51})
    assert torch.allclose(jit(torch.sin, backend="inductor")(x), x.sin())
    assert len(compilations) == 2


@pytest.mark.slow
def test_without_a_folder_it_compiles(folder):
    folder.write_text("a file where the folder would be")
    for _ in range(2):
        assert torch.equal(jit(torch.neg, backend="inductor")(torch.ones(2)), -torch.ones(2))


def known(**others):
    return {"program": "f", "small": True, "options": {}, "calls": [], **others}


def test_what_is_stored_is_found(folder):
    _programs.store("a", known())
    assert _programs.find("a") == known()
    assert _programs.find("b") == {} == _programs.find(None)


def test_what_inductor_does_not_keep_is_not_stored(folder):
    _programs.store("a", known(program=None))
    _programs.store(None, known())
    assert not folder.exists()


def test_the_oldest_files_are_dropped(folder, monkeypatch):
    monkeypatch.setattr(_programs, "_MOST", 8)
    for i in range(8):
        _programs.store(str(i), known())
        os.utime(folder / f"{i}.json", (i, i))
    _programs.find("0")  # so that it is the newest
    _programs.store("8", known())
    left = {path.stem for path in folder.iterdir()}
    assert left == {"0", "3", "4", "5", "6", "7", "8"}


def test_readers_and_writers_do_not_disturb_each_other(folder):
    found = []

    def write(i):
        for n in range(30):
            _programs.store("a", known(program=f"{i}-{n} " * 500))

    def read():
        found.extend(_programs.find("a") for _ in range(200))

    _programs.store("a", known(program="0 " * 500))
    threads = [threading.Thread(target=write, args=(i,)) for i in range(3)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    for one in found:  # never none, never half of one, never of two
        first, *others = one["program"].split()
        assert others == [first] * 499
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def plus(constant):
    return lambda x: [x[:, None] + constant]


GRAPHS = {
    "sum": lambda x: [x + x],
    "product": lambda x: [x * x],
    "an int": lambda x: [x + 1],
    "a float": lambda x: [x + 1.0],
    "a boolean": lambda x: [x + True],
    "another number": lambda x: [x + 2],
    "zero": lambda x: [x * 0.0],
    "minus zero": lambda x: [x * -0.0],
    "a dtype": lambda x: [x.to(torch.float64)],
    "another dtype": lambda x: [x.to(torch.bfloat16)],
    "a constant": plus(torch.ones(2)),
    "a constant of other values": plus(torch.tensor([1.0, 2.0])),
    "a constant of nan": plus(torch.full((2,), torch.nan)),
    "a constant of another dtype": plus(torch.ones(2, dtype=torch.float64)),
    "a constant of whole numbers": plus(torch.ones(2, dtype=torch.int32)),
    "a constant of complex numbers": plus(torch.tensor([1.0 + 1.0j, 2.0])),
    "a conjugate constant": plus(torch.tensor([1.0 + 1.0j, 2.0]).conj()),
    "a negated constant": plus(torch.tensor([1.0 + 1.0j, 2.0]).conj().imag),
    "an empty constant": plus(torch.ones(1, 0)),
    "a number": plus(torch.tensor(3.0)),
    "a matrix": plus(torch.ones(2, 3)),
    "a matrix in another order": plus(torch.ones(3, 2).T),
    "two outputs": lambda x: [x + x, x],
    "outputs in another order": lambda x: [x, x + x],
}


def test_other_graphs_have_other_keys():
    keys = {name: key_of(graph, torch.ones(2)) for name, graph in GRAPHS.items()}
    assert None not in keys.values()
    assert len(set(keys.values())) == len(GRAPHS)
    assert keys == {name: key_of(graph, torch.ones(2)) for name, graph in GRAPHS.items()}


def test_other_arguments_have_other_keys():
    arguments = [
        torch.ones(2, 3),
        torch.ones(3, 2),
        torch.ones(3, 2).T,
        torch.ones(2, 4)[:, :3],
        torch.ones(1, 3).expand(2, 3),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(7)[1:].view(2, 3),
    ]
    keys = [key_of(lambda x: [x.sin()], one) for one in arguments]
    assert len(set(keys)) == len(keys) and None not in keys


def test_other_settings_have_other_keys(monkeypatch):
    x = torch.ones(2)

    def key(**others):
        return key_of(lambda x: [x.sin()], x, **others)

    keys = [key(), key(about=((0, 1),)), key(options={"cpp.threads": 1}), key(options={"cpp.threads": 2})]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key())
    torch.set_num_threads(threads)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision != "medium" else "highest")
    keys.append(key())
    torch.set_float32_matmul_precision(precision)
    with torch._inductor.config.patch(max_autotune=True):
        keys.append(key())
    torch.use_deterministic_algorithms(True)
    keys.append(key())
    torch.use_deterministic_algorithms(False)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(key())
    monkeypatch.setattr(_programs, "_machine", lambda: "another compiler")
    keys.append(key())
    monkeypatch.undo()
    assert len(set(keys)) == len(keys) and None not in keys
    assert key() == keys[0]


def test_files_of_luxtorch_the_compiler_and_the_processor_are_in_the_key():
    about = str(_programs._machine())
    assert torch.__version__ in about and "_programs.py" in about
    if Path("/proc/cpuinfo").exists():
        assert "flags" in about or "Features" in about


@pytest.mark.parametrize("kind", ["operators of others", "own passes", "no caches", "an option that is no text"])
def test_what_cannot_be_told_has_no_key(kind):
    def plain(x):
        return [x.sin()]

    x = torch.ones(2)
    assert key_of(plain, x) is not None
    if kind == "operators of others":

        @torch.library.custom_op("luxtorch_test_programs::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        twice.register_fake(torch.empty_like)
        assert key_of(lambda x: [twice(x)], x) is None
    elif kind == "own passes":
        with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: None):
            assert key_of(plain, x) is None
    elif kind == "no caches":
        with torch._inductor.config.patch(fx_graph_cache=False):
            assert key_of(plain, x) is None
    else:
        assert key_of(plain, x, options={"post_grad_custom_pre_pass": print}) is None


@pytest.mark.slow
def test_dynamic_sizes_are_left_to_inductor(compilations):
    for _ in range(2):
        jitted = jit(lambda x: x.sin().sum(), dynamic="x", backend="inductor")
        for n in (3, 5):
            assert torch.allclose(jitted(torch.ones(n)), torch.ones(n).sin().sum())
    assert compilations == ["_compile_new"] * 2


@pytest.mark.slow
def test_keys_of_random_numbers_are_constants_of_the_key(compilations):
    draws = []
    for seed in (0, 1, 0):
        key = lt.random.key(seed)
        draws.append(jit(lambda x, key=key: x + lt.random.normal(key, (3,)), backend="inductor")(torch.zeros(3)))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


@pytest.mark.slow
def test_modules_that_came_in_are_found(compilations):
    layer, ps, st = lt.from_torch(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.ones(2, 3)
    results = [jit(lambda ps, x: layer(x, ps, st)[0], backend="inductor")(ps, x) for _ in range(2)]
    assert torch.equal(*results) and len(compilations) == 1
