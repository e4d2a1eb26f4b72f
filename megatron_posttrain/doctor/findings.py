"""One line of the doctor's table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from megatron_posttrain.errors import UserError

Status = Literal["ok", "warn", "fail", "not checked here"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    status: Status
    check: str
    found: str
    fix: str = ""


class Findings(list[Finding]):
    """The table in the making."""

    def add(self, status: Status, check: str, found: str, fix: str = "") -> None:
        self.append(Finding(status, check, found, fix))

    def verdict(self, check: str, wrong: Iterable[str], ok: str, fix: str = "", status: Status = "fail") -> None:
        """A line for each thing that is wrong, or one that is `ok`."""
        before = len(self)
        self.extend(Finding(status, check, found, fix) for found in wrong)
        if len(self) == before:
            self.add("ok", check, ok)

    def attempt(
        self, check: str, function: Callable[[], Value], ok: Callable[[Value], str] | None = None, fix: str = ""
    ) -> Value | None:
        """`function()` and a line that is `ok` of it, or None and a failed line when it raises UserError."""
        try:
            value = function()
        except UserError as error:
            self.add("fail", check, str(error), fix)
            return None
        if ok is not None:
            self.add("ok", check, ok(value))
        return value

    @property
    def failed(self) -> bool:
        return any(finding.status == "fail" for finding in self)
