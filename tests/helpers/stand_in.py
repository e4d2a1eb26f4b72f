"""A rollout engine's place in tests: completions that are known before, a token of each a step."""

from typing import Any

from megatron_posttrain.rollout.engine import Completion, Request, Sampling


class StandIn:
    tensor, replica, replicas, at_once, version = 1, 0, 1, 256, 0
    choices: Any = None

    def share(self, value: object) -> object:
        return value

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        raise NotImplementedError

    def wait(self, running: int) -> None:
        """What a step of so many completions takes."""

    def run(self, feed: Any, take: Any, sampling: Sampling, enough: Any) -> None:
        running: dict[int, tuple[Completion, int]] = {}  # and tokens of it so far
        while True:
            for name, request in feed(self.at_once - len(running), not running).items():
                running[name] = self.answer(request, sampling), 0
            if not running:
                return
            self.wait(len(running))
            for name, (whole, count) in list(running.items()):
                running[name] = whole, count + 1
                if count + 1 >= len(whole.token_ids):
                    take(name, running.pop(name)[0])
            if enough():
                for name, (whole, count) in running.items():
                    take(name, Completion(whole.token_ids[:count], whole.logprobs[:count], "cut"))
                return
