"""An environment that asks a row's further questions, as MT-Bench's second turn."""

from typing import Any

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.messages import Message
from megatron_posttrain.environments.protocol import Done, Turn, environment


@environment("questions")
class QuestionsEnvironment:
    """Asks the texts of `metadata.turns` behind the first, which is the prompt, one after the other, whatever is said.

    The reward `environment` is 1 where all were answered.
    """

    def start(self, prompt: Prompt) -> Any:
        return [str(text) for text in prompt.metadata["turns"][1:]]

    def reply(self, state: Any, turn: Turn) -> list[Message] | Done:
        return [{"role": "user", "content": state.pop(0)}] if state else Done(1.0)
