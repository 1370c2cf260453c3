"""What PEFT's tests ask for and pruning cannot give, or gives in another way. Each entry is expected to fail.

An entry that passes is reported as a failure: it has to go from this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional


@dataclass(frozen=True)
class Contradiction:
    """
    Args:
        test (`str`): pattern of the test's name, `module.py::Class::test[parameters]`, from its function on.
        methods (`str`): pattern of the method's label.
        reason (`str`): why it cannot pass.
    """

    test: str
    methods: str
    reason: str


CONTRADICTIONS: tuple[Contradiction, ...] = ()


def contradiction(label: str, test: str) -> Optional[Contradiction]:
    """The entry that a test of a method falls under, `None` if there is none."""
    function = test.split("::")[-1].replace("[", "(").replace("]", ")")
    for entry in CONTRADICTIONS:
        if fnmatchcase(label, entry.methods) and fnmatchcase(function, entry.test):
            return entry
    return None
