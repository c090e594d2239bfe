"""Injected faults for tests: `kind@rank:step` makes a rank fail in the step after `step` steps were taken."""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("kill", "stop", "gil", "exit", "exception", "oom", "slow", "hang", "nan_loss", "nan_grad", "spike")


@dataclass(frozen=True)
class Fault:
    """One fault. It occurs once, in the first attempt of the run. With a final `!` it occurs in each attempt at the step."""

    kind: str
    rank: int
    step: int
    again: bool

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that a text describes.

        Raises: ValueError: if the text is not a fault. The message contains the legal forms.
        """
        match = re.fullmatch(r"(\w+)@(\d+):(\d+)(!?)", text)
        if not match or match[1] not in KINDS:
            raise ValueError(f"{text!r}; legal: kind@rank:step with kind one of {', '.join(KINDS)}")
        return cls(match[1], int(match[2]), int(match[3]), bool(match[4]))
