"""Common operators compiled by inductor, with donated arguments and without: what the plain call gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import luxtorch as lt

from .harness import Result, check_same, copied, label, operators, outcome, report, samples

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COMMON = """
    abs add addmm amax any argmax baddbmm bmm cat cholesky clamp cos cumprod cumsum diag diff div einsum erf exp
    expand eye flatten flip floor fmod gather index_add index_select linalg.inv linalg.norm linalg.solve log log_softmax
    logsumexp lt masked_fill matmul maximum mean median mm mul nn.functional.avg_pool2d nn.functional.conv2d
    nn.functional.cross_entropy nn.functional.embedding nn.functional.gelu nn.functional.interpolate
    nn.functional.layer_norm nn.functional.linear nn.functional.max_pool2d nn.functional.mse_loss nn.functional.pad
    nn.functional.relu nn.functional.scaled_dot_product_attention nn.functional.softplus outer permute pow prod
    reciprocal repeat roll rsqrt scatter scatter_add sigmoid sin softmax sort sqrt stack std sub sum take_along_dim tan
    tanh topk trace transpose tril unbind unsqueeze var where
""".split()  # noqa: SIM905
SIZE = 12
"""How many operators go into one graph: a compilation takes longer than they do."""

EXCEPTIONS: dict[str, str] = {}


def cases() -> list[tuple[str, Any, Any]]:
    """Return the operators, with the first and the last of their samples of which a plain call is a number."""
    found = []
    for op in operators():
        if op.name in COMMON and not op.variant_test_name:
            for sample in samples(op, torch.float32, 2):
                args = sample.input, sample.args, sample.kwargs
                traced = lt.jit(lambda args, op=op: call(op, args), backend="replay")
                try:
                    call(op, copied(args))
                except Exception:
                    continue  # there is no such form
                kind, _ = outcome(lambda traced=traced, args=args: traced(copied(args)), lambda got: None)
                if kind == "equal":
                    found.append((label(op), op, args))
    return found


def call(op: Any, args: Any) -> Any:
    return op(args[0], *args[1], **args[2])


def compiled(group: list[Any], donated: bool) -> Iterator[Result]:
    functions = [op for _, op, _ in group]

    def together(arguments: list[Any]) -> list[Any]:
        return [call(op, args) for op, args in zip(functions, arguments, strict=True)]

    wanted = together([copied(args) for _, _, args in group])
    jitted = lt.jit(together, donate="arguments" if donated else (), backend="inductor")
    try:
        got = jitted([copied(args) for _, _, args in group])
    except Exception:
        if len(group) > 1:
            for one in group:
                yield from compiled([one], donated)
            return
        yield Result(group[0][0], *outcome(lambda: jitted([copied(args) for _, _, args in group]), lambda got: None))
        return
    for (name, _, _), ours, plain in zip(group, got, wanted, strict=True):
        kind, words = outcome(
            lambda ours=ours: ours, lambda got, plain=plain: check_same(got, plain, 1e-5, strides=False)
        )
        yield Result(name, kind, words)


@pytest.mark.parametrize("donated", [False, True], ids=["plain", "donated"])
def test_inductor(donated):
    found = cases()
    groups = [found[i : i + SIZE] for i in range(0, len(found), SIZE)]
    results = [result for group in groups for result in compiled(group, donated)]
    report(f"inductor, {'donated' if donated else 'plain'}", results, EXCEPTIONS)
