"""What became of the tensors of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from luxtorch.core import InputError, KeyNameError, LuxtorchError, suggest


@dataclass(frozen=True)
class LoadReport:
    """Say which tensors of a model came from a file, and which did not.

    Attributes:
        loaded: The names in the model of those that did.
        missing: The names in the model of those that the file does not have; they are as they were.
        unexpected: The names in the file of what the model has no place for.
        mismatched: By their names in the model, why tensors of another shape or kind were not taken.
        cast: By their names in the model, from which dtype to which tensors were cast.
        tied: The names in the file that are second names of a tensor that was loaded, with its name in the model.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for what in ("missing", "unexpected"):
            lines += [f"{what}: {name}" for name in getattr(self, what)]
        for what in ("mismatched", "cast", "tied"):
            lines += [f"{what}: {name}: {text}" for name, text in getattr(self, what).items()]
        return "\n  ".join(lines)

    def error(self, described: Mapping[str, str], renamed: Mapping[str, str]) -> LuxtorchError:
        """Return the error that lists all that does not fit.

        Args:
            described: What the model has, by name, in words.
            renamed: What the unexpected names are called after renaming.
        """
        lines = [f"'{name}' is not in the file; in the model it is {described[name]}." for name in self.missing]
        for name in self.unexpected:
            new = renamed[name]
            called = f"'{name}'" if new == name else f"'{name}', here '{new}',"
            lines.append(f"{called} is only in the file. {suggest(new, self.missing)}".rstrip())
        lines += [f"'{name}' does not fit: {text}." for name, text in self.mismatched.items()]
        rename = _prefix(self.missing, [renamed[name] for name in self.unexpected])
        other = "Map the names with rename=" if self.missing and self.unexpected else "Load into this very model"
        return (KeyNameError if self.missing or self.unexpected else InputError)(
            "The weights and the model differ.",
            expected="the same names and shapes",
            got="\n            ".join(lines),
            fix=f"Pass {rename}." if rename else f"{other}, or pass strict=False and read the report.",
        )


def _prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Return the renaming that makes most names match by a prefix more or less; empty if there is none."""
    here, there = set(missing), set(unexpected)
    for longer, shorter, more in ((there, here, False), (here, there, True)):
        for one in sorted(shorter):
            for other in sorted(longer):
                if other.endswith(f".{one}"):
                    prefix = other.removesuffix(one)
                    if 2 * sum(prefix + name in longer for name in shorter) > len(shorter):
                        return f"rename=[(r'^', '{prefix}')]" if more else f"rename=[(r'^{re.escape(prefix)}', '')]"
    return ""
