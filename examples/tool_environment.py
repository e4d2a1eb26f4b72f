"""An environment of one's own: questions about accounts whose balances only a tool knows.

Rows: {"question": "Who has more, Ada or Ben?", "answer": "Ben"}
"""

from __future__ import annotations

from typing import Any

from megatron_posttrain.environments import Done, ToolEnvironment, Turn, environment

BALANCES = {"ada": 1200, "ben": 3400, "cyd": 560, "dan": 7800}


@environment("accounts")
class Accounts(ToolEnvironment):
    """Ends with the first turn that calls no tool; its reward is 1 where that turn holds the row's answer."""

    def __init__(self, *, currency: str = "EUR") -> None:
        self.currency = currency
        super().__init__(self.balance)

    def balance(self, name: str) -> str:
        """Looks up an account's balance.

        Args:
            name: Whose account.
        """
        return f"{BALANCES[name.lower()]} {self.currency}"  # an unknown name is an error that the model is told

    def start(self, prompt: Any) -> Any:
        return prompt.answer

    def reply(self, state: Any, turn: Turn) -> Any:
        return super().reply(state, turn) if turn.calls else Done(reward=float(state in turn.final))
