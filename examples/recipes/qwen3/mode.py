"""The reward for obeying /think and /no_think: whether a response reasons as its row's `metadata.mode` says."""

from megatron_posttrain.rewards import Sample, reward


@reward("mode")
def mode(sample: Sample) -> float:
    """1.0 for one block of reasoning at the beginning, empty where the mode is `no_think` and not where it is `think`,
    and an answer after it."""
    text = sample.response.strip()
    reasoning, closed, answer = text.removeprefix("<think>").partition("</think>")
    whole = text.startswith("<think>") and closed and answer.strip() and "think>" not in answer
    return float(bool(whole) and bool(reasoning.strip()) == (sample.metadata.get("mode", "think") == "think"))
