"""Where the reasoning of a response ends and its answer begins."""

REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
)


def split_reasoning(response: str, opened: str = "") -> tuple[str, str]:
    """Reasoning and answer: what follows the last end of reasoning, nothing where reasoning was begun and not ended.
    `opened`: the tag with which the prompt ended, when it opened the reasoning."""
    for begin, end in REASONING:
        text = (begin if opened == begin else "") + response
        reasoning, closed, answer = text.rpartition(end)
        if closed and begin not in answer:
            return reasoning.replace(begin, "", 1).strip(), answer.strip()
        if begin in text:
            return text.replace(begin, "", 1).strip(), ""
    return "", response.strip()
