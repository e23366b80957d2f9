"""The compiler and the processor: the instructions that are found beside other work are those that Inductor finds."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys

import pytest
from torch._inductor import config, cpu_vec_isa

from luxtorch.jit import _toolchain

from .conftest import compiled

pytestmark = [
    compiled,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the others have one set of instructions"),
]

NAMES = ["avx512 amx_tile", "avx512 avx512_vnni", "avx512", "avx2"]


class Instructions(cpu_vec_isa.VecISA):
    """A set of instructions that the compiler handles or not, and that remembers whether it was asked."""

    def __init__(self, name, works):
        self.name, self.works, self.asked, self.answer = name, works, 0, None

    def __str__(self):
        return self.name

    def check_build(self, code):
        self.asked += 1
        return self.works

    def __bool__(self):  # as torch's do, it keeps the answer
        if self.answer is None:
            self.answer = super().__bool__()
        return self.answer


class AskedAgain(Instructions):
    """One that does not keep its answer."""

    def __bool__(self):
        return config.cpp.vec_isa_ok or self.works


@pytest.fixture
def processor(monkeypatch):
    """Return a function that sets what processor and compiler can do, in sets from the widest to the narrowest."""

    def has(words, works, kind=Instructions):
        sets = [kind(name, one) for name, one in zip(NAMES, works, strict=True)]
        monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", sets)
        monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: words)
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        return sets

    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    yield has
    monkeypatch.undo()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


@pytest.mark.parametrize("words", [[], ["avx2"], ["avx2", "avx512"], ["avx2", "avx512", "avx512_vnni", "amx_tile"]])
def test_the_widest_set_that_works_is_found_and_no_narrower_one_is_built(processor, words):
    for works in itertools.product([False, True], repeat=len(NAMES)):
        processor(words, works)
        expected = str(cpu_vec_isa.pick_vec_isa())
        sets = processor(words, works)
        _toolchain._find_widest()
        asked = [one.asked for one in sets]
        assert str(cpu_vec_isa.pick_vec_isa()) == expected
        assert [one.asked for one in sets] == asked, "Inductor builds nothing any more"
        supported = [one for one in sets if set(one.name.split()) <= set(words)]
        until = next((i + 1 for i, one in enumerate(supported) if one.works), len(supported))
        assert [one.asked for one in supported] == [1] * until + [0] * (len(supported) - until)


def test_what_works_not_is_never_taken_for_granted(processor):
    for works in itertools.product([False, True], repeat=len(NAMES)):
        processor(["avx2", "avx512", "avx512_vnni", "amx_tile"], works, AskedAgain)
        _toolchain._find_widest()
        chosen = cpu_vec_isa.pick_vec_isa()
        assert chosen.works if any(works) else str(chosen) == "INVALID_VEC_ISA"


@pytest.mark.parametrize("setting", ["simdlen", "vec_isa_ok", "ATEN_CPU_CAPABILITY"])
def test_a_choice_of_the_users_is_left_to_inductor(processor, monkeypatch, setting):
    sets = processor(["avx2", "avx512"], [True] * 4)
    if setting == "ATEN_CPU_CAPABILITY":
        monkeypatch.setenv(setting, "avx2")
        _toolchain._find_widest()
    else:
        with config.patch({f"cpp.{setting}": 256 if setting == "simdlen" else False}):
            _toolchain._find_widest()
    assert not any(one.asked for one in sets)


def test_an_error_there_is_left_to_inductor(processor, monkeypatch):
    def fails(self, code):
        raise OSError("no space left on device")

    monkeypatch.setattr(Instructions, "check_build", fails)
    processor(["avx2"], [True] * 4)
    _toolchain._find_widest()


def run(program, folder):
    """Run a program in a process with an Inductor cache in a folder, and return what it prints."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


JITTED = "import torch, luxtorch as lt\nlt.jit(torch.sin, backend='inductor')(torch.ones(64))\n"
CHOSEN = "from torch._inductor.cpu_vec_isa import pick_vec_isa\nprint(pick_vec_isa())"


@pytest.mark.slow
def test_another_process_with_an_empty_cache_uses_the_same_instructions(tmp_path):
    assert run(JITTED + CHOSEN, tmp_path / "jitted") == run(CHOSEN, tmp_path / "alone") != ""


@pytest.mark.slow
def test_the_next_process_builds_nothing(tmp_path):
    built = []
    for _ in range(2):
        run(JITTED, tmp_path)
        built.append(set(tmp_path.rglob("*.so")))
    assert built[0] == built[1] != set()
