"""Public data files and chat templates, from ../shared: every file that is rows is read, with or without a mapping."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_posttrain.data.messages import read_tools
from megatron_posttrain.data.rows import Reader, read_records, read_rows
from megatron_posttrain.data.template import Template
from megatron_posttrain.data.tokenize import encode_conversation, load_tokenizer
from megatron_posttrain.environments import Call
from megatron_posttrain.environments.dialogue import call_form, following_tokens, read_calls
from megatron_posttrain.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="no public data beside the project")

TARGET = {"prompt": "input", "answer": "target"}
CALLS = {"messages": "question.0", "tools": "function"}
# File, rows, use, the mapping it needs.
FILES = [
    ("alpaca_eval/Yi-34B-Chat_vs_text_davinci_003.gpt4_preferences.jsonl.gz", 798, "preference", {}),
    ("alpaca_eval/alpaca-7b_vs_text_davinci_003.gpt4_preferences.jsonl.gz", 786, "preference", {}),
    ("bbh/boolean_expressions.json.gz", 250, "rl", TARGET),
    ("bbh/causal_judgement.json.gz", 187, "rl", TARGET),
    ("bbh/word_sorting.json.gz", 250, "rl", TARGET),
    ("bfcl/BFCL_v4_irrelevance.jsonl.gz", 240, "sft", CALLS),
    ("bfcl/BFCL_v4_live_simple.jsonl.gz", 258, "sft", CALLS),
    ("bfcl/BFCL_v4_multi_turn_base.jsonl.gz", 200, "sft", {"messages": "question.0"}),
    ("bfcl/BFCL_v4_multiple.jsonl.gz", 200, "sft", CALLS),
    ("bfcl/BFCL_v4_parallel.jsonl.gz", 200, "sft", CALLS),
    ("bfcl/BFCL_v4_parallel_multiple.jsonl.gz", 200, "sft", CALLS),
    ("bfcl/BFCL_v4_simple_python.jsonl.gz", 400, "sft", CALLS),
    ("gpteacher/codegen_500.jsonl.gz", 500, "sft", {}),
    ("gpteacher/roleplay_500.jsonl.gz", 500, "sft", {}),
    ("gpteacher/toolformer_500.jsonl.gz", 500, "sft", {}),
    ("gsm8k/test.jsonl.gz", 1319, "rl", {}),
    ("gsm8k/train.jsonl.gz", 7473, "rl", {}),
    ("hellaswag/val_2000.jsonl.gz", 2000, "rl", {"prompt": ["activity_label_and_ctx", "endings"], "answer": "label"}),
    ("hh_rlhf_harmless/test_2000.jsonl.gz", 2000, "preference", {}),
    ("human_eval/HumanEval.jsonl.gz", 164, "rl", {}),
    ("ifeval/gpt4_responses.jsonl.gz", 540, "sft", {}),
    ("ifeval/gpt4_verdicts_loose.jsonl.gz", 540, "sft", {}),
    ("ifeval/gpt4_verdicts_strict.jsonl.gz", 540, "sft", {}),
    ("ifeval/input_data.jsonl.gz", 540, "rl", {}),
    ("kk_logic/3ppl_test.parquet", 100, "rl", {}),
    ("kk_logic/3ppl_train.parquet", 900, "rl", {}),
    ("llamafactory_demo/alpaca_en_demo.json.gz", 999, "sft", {}),
    ("llamafactory_demo/alpaca_zh_demo.json.gz", 1000, "sft", {}),
    ("llamafactory_demo/dpo_en_demo.json.gz", 300, "preference", {}),
    ("llamafactory_demo/glaive_toolcall_en_demo.json.gz", 300, "sft", {}),
    ("llamafactory_demo/kto_en_demo.json.gz", 300, "preference", {}),
    ("llamafactory_demo/reason_tool_use_demo_50.jsonl.gz", 50, "sft", {}),
    ("llamafactory_demo/v1_dpo_demo.jsonl.gz", 10, "preference", {"chosen": "chosen_messages", "rejected": "rejected_messages"}),  # noqa: E501
    ("llamafactory_demo/v1_sft_demo.jsonl.gz", 500, "sft", {}),
    ("math/math500.jsonl.gz", 500, "rl", {}),
    ("math/test.jsonl.gz", 5000, "rl", {}),
    ("math_cot_samples/math_cot_100.jsonl.gz", 100, "rl", {}),
    ("math_eval/aime24.jsonl.gz", 30, "rl", {}),
    ("math_eval/aime25.jsonl.gz", 30, "rl", {}),
    ("math_eval/amc23.jsonl.gz", 40, "rl", {}),
    ("math_eval/aqua.jsonl.gz", 254, "rl", {"prompt": ["question", "options"], "answer": "correct"}),
    ("math_eval/asdiv.jsonl.gz", 2215, "rl", {"prompt": ["body", "question"], "answer": "answer"}),
    ("math_eval/carp_en.jsonl.gz", 976, "rl", {"prompt": "content"}),
    ("math_eval/cmath.jsonl.gz", 600, "rl", {}),
    ("math_eval/college_math.jsonl.gz", 2818, "rl", {}),
    ("math_eval/gaokao2023en.jsonl.gz", 385, "rl", {}),
    ("math_eval/mawps.jsonl.gz", 2065, "rl", TARGET),
    ("math_eval/minerva_math.jsonl.gz", 272, "rl", {}),
    ("math_eval/mmlu_stem.jsonl.gz", 3018, "rl", {"prompt": ["question", "choices"], "answer": "answer"}),
    ("math_eval/olympiadbench.jsonl.gz", 675, "rl", {"prompt": ["context", "question"], "answer": "final_answer.0"}),
    ("math_eval/sat_math.jsonl.gz", 32, "rl", {"prompt": ["question", "options"], "answer": "Answer"}),
    ("math_eval/svamp.jsonl.gz", 1000, "rl", {"prompt": ["Body", "Question"], "answer": "Answer"}),
    ("mbpp/mbpp.jsonl.gz", 973, "sft", {"prompt": "text", "response": "code"}),
    ("mt_bench/question.jsonl", 80, "rl", {"prompt": "turns.0"}),
    ("mt_bench/vicuna_question.jsonl", 80, "rl", {"prompt": "turns.0"}),
    ("openbookqa/openbookqa_test.jsonl.gz", 500, "rl", {"prompt": ["question.stem", "question.choices"], "answer": "answerKey"}),  # noqa: E501
    ("sharegpt_format/fastchat_dummy_conversation.json.gz", 500, "sft", {}),
    ("sharegpt_format/sharegpt_5_conversations.json", 5, "sft", {}),
    ("sharegpt_format/tinker_conversations.jsonl", 128, "sft", {}),
    ("stanford_alpaca/seed_tasks.jsonl.gz", 175, "sft", {"prompt": ["instruction", "instances.0.input"], "response": "instances.0.output"}),  # noqa: E501
    ("truthfulqa/TruthfulQA.csv.gz", 817, "sft", {"prompt": "Question", "response": "Best Answer"}),
    ("truthfulqa/truthfulqa_mc_from_csv.jsonl.gz", 817, "rl", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "use", "columns"), FILES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_file_of_rows_is_read(name, count, use, columns):
    rows = [row for row, _ in read_records(str(SHARED / "datasets" / name), Reader(columns or {}, "any"))]
    assert len(rows) == count
    assert {row.form.use for row in rows} == {use}
    assert all(message["content"].strip() or message.get("tool_calls") or message["role"] != "user"
               for row in rows for message in row.messages)  # fmt: skip


@pytest.mark.parametrize("name", ["bfcl/multi_turn_func_doc/math_api.json", "mt_bench/judge_prompts.jsonl",
                                  "llamafactory_demo/wiki_demo.txt.gz", "bfcl/possible_answer/BFCL_v4_multiple.jsonl.gz"])  # fmt: skip # noqa: E501
def test_what_is_no_rows_is_refused(name):
    with pytest.raises(UserError, match=Path(name).name):
        list(read_records(str(SHARED / "datasets" / name), Reader({}, "any")))


def test_values_read_from_public_files():
    data = SHARED / "datasets"
    gsm8k = read_rows(data / "gsm8k" / "train.jsonl.gz")
    assert (gsm8k[0].answer, gsm8k[1].answer, len(gsm8k[0].messages)) == ("72", "10", 1)
    with pytest.raises(UserError, match=r"no assistant turn.*data\.columns: \{prompt: question, "):
        read_rows(data / "gsm8k" / "train.jsonl.gz", require_assistant=True)
    math = read_rows(data / "math" / "test.jsonl.gz")
    assert math[0].answer == "2"
    given = [
        json.loads(line) for line in gzip.decompress((data / "math" / "math500.jsonl.gz").read_bytes()).splitlines()
    ]
    plain = read_rows(data / "math" / "math500.jsonl.gz")
    assert [row.answer for row in plain] == [row["answer"] for row in given]
    verl = read_rows(data / "kk_logic" / "3ppl_test.parquet")[0]
    assert verl.answer is not None
    assert "solution_text_format" in verl.answer
    tools = read_rows(data / "llamafactory_demo" / "glaive_toolcall_en_demo.json.gz", require_assistant=True)[0]
    assert tools.tools[0]["function"]["name"] == "search_recipes"
    assert tools.messages[3]["tool_calls"][0]["arguments"]["ingredients"] == ["chicken", "bell peppers", "rice"]
    weights = read_rows(data / "llamafactory_demo" / "v1_dpo_demo.jsonl.gz", use="preference",
                        columns={"chosen": "chosen_messages", "rejected": "rejected_messages"})  # fmt: skip
    assert [m["role"] for m in weights[0].messages] == ["system", "user"]
    assert weights[0].chosen[0]["content"] != weights[0].rejected[0]["content"]


# ---- templates ---------------------------------------------------------------------------------------------

# Template, tokenizer.
TEMPLATES = [
    ("llama.cpp/Qwen-Qwen2.5-7B-Instruct", "qwen3"), ("llama.cpp/Qwen-Qwen3-0.6B", "qwen3"),
    ("llama.cpp/Qwen-QwQ-32B", "qwen3"), ("llama.cpp/Qwen3-Coder", "qwen3"), ("llama.cpp/Qwen3.5-4B", "qwen3"),
    ("llama.cpp/meta-llama-Llama-3.1-8B-Instruct", "llama3_1"),
    ("llama.cpp/meta-llama-Llama-3.2-3B-Instruct", "llama3_1"),
    ("llama.cpp/meta-llama-Llama-3.3-70B-Instruct", "llama3_1"),
    ("chujiezheng/llama-3-instruct", "llama3_1"), ("llama.cpp/openai-gpt-oss-120b", "gpt_oss"),
    ("llama.cpp/deepseek-ai-DeepSeek-V3.1", "deepseek_v3"),
    ("llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek_v3"),
    ("llama.cpp/HuggingFaceTB-SmolLM3-3B", "llama3_1"), ("smollm2", "smollm2"),
    ("chujiezheng/qwen2.5-instruct", "qwen3"), ("chujiezheng/chatml", "qwen3"),
    ("chujiezheng/zephyr", "smollm2"), ("llama.cpp/google-gemma-2-2b-it", "smollm2"),
    ("llama.cpp/microsoft-Phi-3.5-mini-instruct", "smollm2"), ("chujiezheng/mistral-instruct", "smollm2"),
    ("llama.cpp/GLM-4.6", "qwen3"), ("llama.cpp/ibm-granite-granite-3.3-2B-Instruct", "smollm2"),
]  # fmt: skip
ASK, THINK = {"role": "user", "content": "What is two and two?"}, "<think>\nI count to it.\n</think>\n\n"
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"name": "add", "description": "of numbers",
          "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "it"}}}}]  # fmt: skip

# These templates raise on tools or write neither calls nor the last turn's reasoning.
REFUSED = {
    *((name, "tools") for name in ("llama-3-instruct", "HuggingFaceTB-SmolLM3-3B", "smollm2", "chatml", "zephyr",
                                   "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "mistral-instruct",
                                   "ibm-granite-granite-3.3-2B-Instruct")),
    ("deepseek-ai-DeepSeek-V3.1", "reasoning"), ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "reasoning"),
}  # fmt: skip


def says(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = {
    "turns": [ASK, says("It is four."), {"role": "user", "content": "And three?"}, says("Then five.")],
    "reasoning": [ASK, says(THINK + "It is four."), {"role": "user", "content": "Sure?"}, says(THINK + "Yes, four.")],
    "tools": [ASK, says("") | {"tool_calls": [CALL]}, {"role": "tool", "content": "4", "tool_call_id": "abcdefghi", "name": "add"}, says("It is four.")],  # noqa: E501
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}

    def load(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            for file in (SHARED / "tokenizers" / name).iterdir():
                if file.suffix == ".gz":
                    (place / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
                else:
                    shutil.copy(file, place)
            if not (place / "chat_template.jinja").exists():
                (place / "chat_template.jinja").write_text("{{ messages }}")
            made[name] = load_tokenizer(place)
        return made[name]

    return load


@pytest.mark.parametrize("kind", list(CONVERSATIONS))
@pytest.mark.parametrize(("template", "name"), TEMPLATES, ids=lambda x: x.rpartition("/")[2])
def test_templates_with_their_tokenizers(tokenizers, template, name, kind):
    tokenizer, messages = tokenizers(name), CONVERSATIONS[kind]
    file = SHARED / "chat_templates" / f"{template}.jinja"
    if file.exists():
        tokenizer.chat_template = file.read_text()
    else:
        tokenizer.chat_template = (SHARED / "tokenizers" / name / "chat_template.jinja").read_text()
    options = {"tools": read_tools(TOOLS)} if kind == "tools" else {}
    if (template.rpartition("/")[2], kind) in REFUSED:
        with pytest.raises(UserError, match=r"a:1: the (tokenizer's )?chat template (refuses|leaves out)"):
            encode_conversation(tokenizer, messages, "a:1", options)
        return
    found = encode_conversation(tokenizer, messages, "a:1", options)
    assert tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)) == "a b"
    expected = tokenizer.apply_chat_template(messages, **options, return_dict=True)["input_ids"]
    assert found.token_ids == expected
    marks = "".join(map(str, found.loss_mask))
    learned = [tokenizer.decode(found.token_ids[run.start() : run.end()]) for run in re.finditer("1+", marks)]
    runs = "".join(learned)
    assert len(learned) == 2
    assert messages[-1]["content"].rpartition("</think>")[2].strip() in learned[-1]
    assert ("add" if kind == "tools" else "It is four.") in learned[0]
    for said in ("What is two", "Sure?", "And three?", "of numbers"):
        assert said not in runs
    assert ("I count to it." in learned[-1]) == (kind == "reasoning")


@pytest.mark.parametrize(
    ("template", "name", "form"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "qwen3", "hermes"), ("Qwen-Qwen3-0.6B", "qwen3", "hermes"),
        ("Qwen-QwQ-32B", "qwen3", "hermes"), ("meta-llama-Llama-3.1-8B-Instruct", "llama3_1", "llama"),
        ("meta-llama-Llama-3.2-3B-Instruct", "llama3_1", "llama"), ("Qwen3-Coder", "qwen3", None),
        ("meta-llama-Llama-3.3-70B-Instruct", "llama3_1", "llama"), ("deepseek-ai-DeepSeek-V3.1", "deepseek_v3", None),
        ("openai-gpt-oss-120b", "gpt_oss", None), ("GLM-4.6", "qwen3", None),
    ],
)  # fmt: skip
def test_what_follows_a_tool_call_is_what_the_template_writes(tokenizers, template, name, form):
    tokenizer = tokenizers(name)
    tokenizer.chat_template = (SHARED / "chat_templates" / "llama.cpp" / f"{template}.jinja").read_text()
    tools = read_tools(TOOLS)
    assert call_form(tokenizer, tools) == form
    if form is None:
        return
    asked = [{"role": "system", "content": "Be brief."}, ASK]
    called, answers = says("") | {"tool_calls": [CALL]}, [{"role": "tool", "content": "4", "name": "add"}] * 2
    conversation = Template(tokenizer, {"tools": tools})
    before, after = conversation.render([*asked, called]), conversation.render([*asked, called, *answers], prompt=True)
    said = before[before.rindex("<tool_call>" if form == "hermes" else '{"name": "add"') :].rstrip()  # by the model
    following = after[after.rindex(said) + len(said) :]
    said, end = said[: said.rindex("<|")], said[said.rindex("<|") :]
    assert read_calls(form, said) == (Call("add", {"a": 2}),)
    ends = {tokenizer.convert_tokens_to_ids(end)}
    tokens = following_tokens(tokenizer, {"tools": tools}, asked, answers, ends)
    assert tokenizer.decode(tokens) == following
    assert tokenizer(after, add_special_tokens=False)["input_ids"][-len(tokens) :] == tokens
