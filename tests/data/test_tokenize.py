"""The loss mask: which text of a rendered conversation is the assistant's, turn by turn."""

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_posttrain.data.tokenize import encode_conversation, encode_prompt, load_tokenizer
from megatron_posttrain.errors import UserError
from tests.helpers.chat_tokenizers import CHATML, CHATML_MARKED, QWEN3, SPECIAL, byte_tokenizer, turns

TEXTS = ["Hi é 世界?", "Hello, 世界\n", "and?", "b"]


def learned(tokenizer, messages):
    """The runs of text that the mask marks; also checks the tokens against transformers."""
    conversation = encode_conversation(tokenizer, messages, "rows.jsonl:3")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert conversation.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    runs, run = [], []
    for token, marked in zip([*conversation.token_ids, 0], [*conversation.loss_mask, 0], strict=True):
        if marked:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_every_assistant_turn_and_its_end_token(template):
    tokenizer = byte_tokenizer(template)
    messages = turns(*TEXTS, system="Be brief.")
    assert learned(tokenizer, messages) == ["Hello, 世界\n<|im_end|>", "b<|im_end|>"]
    assert learned(tokenizer, messages[:-1]) == ["Hello, 世界\n<|im_end|>"]  # a question at the end: no loss


def test_markers_give_transformers_own_mask():
    tokenizer = byte_tokenizer(CHATML_MARKED)
    messages = turns(*TEXTS)
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encode_conversation(tokenizer, messages).loss_mask == expected["assistant_masks"]
    assert encode_conversation(tokenizer, messages).token_ids == expected["input_ids"]


def test_same_words_in_every_turn():
    assert learned(byte_tokenizer(CHATML), turns("b", "b", "b", "b")) == ["b<|im_end|>"] * 2
    assert learned(byte_tokenizer(CHATML), turns("assistant\nb", "user\nb")) == ["user\nb<|im_end|>"]


def qwen3(prompt_end=""):
    return byte_tokenizer(QWEN3.replace("prompt_end", repr(prompt_end)))


THINK = "<think>\nwhy\n</think>\n\n"


def test_qwen3_strips_earlier_reasoning():
    tokenizer = qwen3()
    assert learned(tokenizer, turns("a", THINK + "b", "c", THINK + "d")) == ["b<|im_end|>", THINK + "d<|im_end|>"]
    empty = "<think>\n\n</think>\n\n"
    assert learned(tokenizer, turns("a", "b", "c", "d")) == ["b<|im_end|>", empty + "d<|im_end|>"]


def test_qwen3_tool_calls():
    messages = turns("a", THINK + "let me")
    messages[1]["tool_calls"] = [{"name": "f"}]
    messages += [{"role": "tool", "content": "7"}, {"role": "assistant", "content": THINK + "c"}]
    call = "let me<tool_call>f</tool_call><|im_end|>"
    assert learned(qwen3(), messages) == [THINK + call, THINK + "c<|im_end|>"]
    assert learned(qwen3(), [*messages, *turns("q", "d")])[:2] == [call, "c<|im_end|>"]


def test_prompt_that_opens_the_reasoning():
    """Qwen3-Thinking, DeepSeek-R1: `<think>` belongs to the prompt, and earlier turns have none."""
    tokenizer = qwen3("<think>\n")
    assert learned(tokenizer, turns("a", THINK + "b", "c", THINK + "d")) == [
        "b<|im_end|>",
        "why\n</think>\n\nd<|im_end|>",
    ]


def test_conversation_that_the_assistant_opens():
    messages = [{"role": "assistant", "content": "hello"}, *turns("a", "b")]
    assert learned(byte_tokenizer(CHATML), messages) == ["hello<|im_end|>", "b<|im_end|>"]


def test_end_of_turn_tokens():
    llama2 = "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"  # noqa: E501
    assert learned(byte_tokenizer(llama2), turns("a", "b", "c", "d")) == [" b </s>", " d </s>"]
    # GLM: nothing ends a turn but the next one's header, which is not the assistant's.
    glm = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501
    assert learned(byte_tokenizer(glm), turns("a", "b", "c", "d")) == ["b", "d"]
    # Llama 3: the next header follows at once.
    assert learned(byte_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>")), turns("a", "b", "c", "d")) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]
    # gpt-oss: the last turn ends with another token than the others.
    last = CHATML.replace("<|im_end|>\n", "{{ '</s>' if loop.last else '<|im_end|>' }}")
    assert learned(byte_tokenizer(last), turns("a", "b", "c", "d")) == ["b<|im_end|>", "d</s>"]


def test_a_token_across_the_boundary_counts():
    """'\\n' of the header and '\\n' of the answer are one token: transformers marks it too."""
    merges = [("Ċ", "Ċ")]
    for template in (CHATML, CHATML_MARKED):
        tokenizer = byte_tokenizer(template, merges)
        assert learned(tokenizer, turns("a", "\nb")) == ["\n\nb<|im_end|>"]


def test_what_cannot_be_told_is_refused():
    shortened = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:1] }}")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: cannot tell which text of messages\[1\]"):
        encode_conversation(byte_tokenizer(shortened), turns("a", "bcd", "e", "fgh"), "rows.jsonl:3")
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*roles must alternate"):
        encode_conversation(byte_tokenizer(strict), turns("a", "b"), "rows.jsonl:3")


def test_prompt():
    tokenizer = byte_tokenizer(CHATML)
    messages = turns("a", "b", "c")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == text
    whole = encode_conversation(tokenizer, [*messages, {"role": "assistant", "content": "d"}]).token_ids
    assert whole[: len(encode_prompt(tokenizer, messages))] == encode_prompt(tokenizer, messages)


def test_load_tokenizer(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good").chat_template == CHATML
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare: it has no chat template"):
        load_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match="nowhere: cannot be loaded"):
        load_tokenizer(tmp_path / "nowhere")


def marked_templates():
    """TRL ships public models' templates with the assistant's text marked by other hands than ours."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    names = ["llama3", "glm4moe", "gemma3", "lfm2", "qwen3", "qwen3_instruct_2507", "cohere2"]
    files = [Path(found.origin).parent / "chat_templates" / f"{name}_training.jinja" for name in names]
    return [file for file in files if file.exists()]


@pytest.mark.parametrize("file", marked_templates(), ids=lambda file: file.stem)
@pytest.mark.parametrize("texts", [("a",), ("a", "b", "c"), ("a", THINK + "b", "c", THINK + "d", "e", "f")])
def test_unmarked_public_templates_like_their_marked_versions(file, texts):
    marked = file.read_text()
    # The same template without its markers; `if true` keeps their white space control.
    unmarked = re.sub(r"\bendgeneration\b", "endif", re.sub(r"(\{%-?\s*)generation\b", r"\1if true", marked))
    special = sorted({*SPECIAL, *re.findall(r"<\|[^<>|]+\|>|<(?:start|end)_of_turn>", marked)})
    messages = turns(*texts, "z") if len(texts) % 2 else turns(*texts)
    reference = learned(byte_tokenizer(marked, special=special), messages)
    # Some marks reach past the end-of-turn token, to the line break after it.
    assert learned(byte_tokenizer(unmarked, special=special), messages) == [
        run.removesuffix("\n") if run.rstrip("\n").endswith(tuple(special)) else run for run in reference
    ]
