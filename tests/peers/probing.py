"""What the probes of all libraries share: each answers, by doing it, which features of the comparison a library has.

A probe is a function that does the thing by the library's own means and asserts the numbers: the feature is there if it
returns. Where it is not, the probe is the best attempt, which fails; or nothing can be tried, and `MISSING` says why.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

FEATURES = {
    "names": "Parameters are an argument, and a misspelt or missing one is an error",
    "batchnorm_grad": "BatchNorm in train mode under `grad`, its new statistics returned",
    "batchnorm_models": "BatchNorm in train mode, many models at once",
    "dropout_keys": "Dropout with a key for each model: the mask is the same with many models as with one",
    "per_sample": "Per-sample gradients, each sample with a dropout mask of its own key",
    "lstm_jvp": "Forward-mode derivative of an LSTM",
    "attention_hessian": "Hessian through attention",
    "setup_vmap": "Many models initialized at once, by `vmap` over keys",
    "rate_models": "Adam with a learning rate for each of many models",
    "rate_gradient": "Derivative by the learning rate, through Adam's step",
    "whole_step": "Gradient and Adam's update compiled to one graph",
    "compiled_inside": "The compiled function under `vmap` and `grad`",
    "donation": "A compiled step that reuses the memory of what it replaces",
    "flat": "One flat vector of parameters, indexed by name",
    "error_path": "A wrong shape is an error that names the layer",
    "checkpoint": "Parameters and optimizer saved without pickle, and loaded again",
    "modules": "Takes a `torch.nn` module with its weights",
    "loop": "A loop over a sequence, compiled without unrolling it, under `grad`, `vmap` and `jvp`",
    "condition": "A loop until a condition holds, compiled, under `vmap` and `jvp`",
    "branch": "A branch on the value of a tensor, compiled, under `grad`, `vmap` and `jvp`",
    "ragged": "A recurrent layer over sequences of different lengths, compiled, under `vmap` and `grad`",
}


def outcomes(names: Mapping[str, Any]) -> dict[str, str]:
    """Return for each feature an empty string if it is there, or else why it is not.

    Args:
        names: The names of a file with a probe for each feature; under `MISSING`, why there is none for some.
    """
    found = {}
    for name in FEATURES:
        if name in names["MISSING"]:
            found[name] = names["MISSING"][name]
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                names[name]()
            found[name] = ""
        except Exception as error:  # whatever a library raises, it cannot do it
            found[name] = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    return found


def main(names: Mapping[str, Any]) -> None:
    """Print the outcomes as JSON, in the last line."""
    json.dump(outcomes(names), sys.stdout)


def close(one: object, other: object, tolerance: float = 1e-4) -> None:
    """Assert that two arrays of any library agree."""
    import numpy as np

    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)
