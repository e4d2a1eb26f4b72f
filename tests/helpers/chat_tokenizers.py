"""Tokenizers for tests: a byte-level tokenizer with any chat template, and templates that rewrite turns."""

from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The rules of Qwen3's template, written anew: reasoning before the last question is stripped, a last turn gets
# a reasoning block even when it has none.
QWEN3 = """\
{%- set last = namespace(query=messages|length - 1, found=false) %}
{%- for m in messages[::-1] %}
  {%- if m.role == 'user' and not last.found %}
    {%- set last.query = messages|length - loop.index %}{% set last.found = true %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set content = m.content %}
  {%- if m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > last.query and (loop.last or thought) %}
      {%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}
    {%- endif %}
    {%- if m.tool_calls %}
      {%- set content = content + '<tool_call>' + m.tool_calls[0].name + '</tool_call>' %}
    {%- endif %}
  {%- endif %}
  {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + prompt_end }}{%- endif %}
"""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_tokenizer(template, merges=(), special=SPECIAL, eos="<|im_end|>"):
    """One token a byte, the `merges` given as pairs of texts, and special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>")
    fast.chat_template = template
    return fast


def turns(*contents, system=None):
    """Alternating user and assistant messages."""
    start = [{"role": "system", "content": system}] if system else []
    return start + [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]
