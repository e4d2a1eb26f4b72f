"""The final answer that a text gives, as it is written there. Every function takes time linear in the text."""

import re

TAIL = 2000  # characters at the end of a text without a box in which its answer is looked for
MOST_BOXES = 20  # that are one answer

_BOX_TOKEN = re.compile(r"\\(?:f?boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\f?boxed\s*(?=[^\s{])((?:[^\s$,;{}\\]|,(?=\d))+)")  # `\boxed 5`, as MATH has it
_BOX_OPENED = re.compile(r"\\f?boxed\b|\\fbox\b")
_BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:and|or|\\text\s*\{\s*(?:and|or)\s*\}|和|或|以及)?[\s$,;]*")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_NOT = r"(?!\s*(?:not\b|n't|不))"
_MARKER = re.compile(
    rf"(?:\b(?:answer|result)s?(?:\s+(?:is|are|was|equals)\b{_NOT}|\s*[:：=])|^\s*A\s*[:：](?=\s*[-+$\d\\(])"
    rf"|答案\s*(?:应该)?(?:是|为|為|：|:){_NOT}|答え(?:は|：|:)|答\s*[:：])[\s:：*]*",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])[.!?](?=\s+[A-Z\u4e00-\u9fff]|\s*$)|[。！？\n]")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff，、；：]+")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator
_NEGATED = re.compile(r"(?:\bnot|n't|\bnever)\s+\S+")
_TEXT = re.compile(r"\\text\s*\{[^{}]*\}")
_JOINS = {"and", "or", "\\text{and}", "\\text{or}"}
_SPAN = re.compile(
    r"(?P<display>\$\$[^$]{1,500}\$\$)|(?P<inline>\$(?=[^\s$])[^$\n]{0,300}[^\s$\\]\$(?!\d))|(?P<one>\$[^\s$]\$(?!\d))"
    r"|(?P<round>\\\([^\n]{1,300}?\\\))|(?P<square>\\\[[^\n]{1,300}?\\\])|(?P<word>\S+)"
)


def boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces are closed, of the outer one where boxes are nested.

    Boxes with nothing but a comma, `and` or `or` between them are one answer, joined by commas.
    """
    boxes = _boxes(text)
    if not boxes:
        return [None, *_BARE_BOX.findall(text)][-1]
    answer = [boxes[-1]]
    for box in boxes[-2:-MOST_BOXES:-1]:
        between = text[box[2] + 1 : answer[-1][0]]
        if len(between) > 40 or not _BETWEEN_BOXES.fullmatch(between) or not re.search(r"[,;\w]", between):
            break
        answer.append(box)
    return ", ".join(text[start:end] for _, start, end in reversed(answer))


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Closed boxes that lie in no other closed box, in order: where each begins, and its content's bounds."""
    opened: list[tuple[int, int] | None] = []  # for every open brace: a box's begin and content, or None
    found: list[tuple[int, int, int]] = []
    for token in _BOX_TOKEN.finditer(text):
        if token.group() == "{":
            opened.append(None)
        elif token.group() == "}":
            box = opened.pop() if opened else None
            if box is not None:
                while found and found[-1][0] > box[0]:
                    found.pop()
                found.append((*box, token.start()))
        elif len(token.group()) > 2:
            opened.append(token.span())
    return found


def final_answer(text: str) -> str:
    """What `text` gives as its answer: the empty string for none.

    Within the last `<answer>` tags, where there are some and no box follows them. In this order: the last box (a
    text that opens a box and closes none was cut off in its answer); what follows GSM8K's `####`, the first one, as
    its own grader does; the expression after the last `answer is`, `Answer:`, `答案是`; the last expression of the
    text. An expression is taken whole: `12x` is not 12.
    """
    tagged, closed, after = text.rpartition("</answer>")
    _, opened, within = tagged.rpartition("<answer>")
    if closed and opened and boxed(after) is None:
        text = within
    content = boxed(text)
    if content is not None:
        return content
    if _BOX_OPENED.search(text):
        return ""
    if hashes := _HASHES.search(text):
        return hashes[1]
    tail = _ANNOTATION.sub("", text[-TAIL:]).strip()
    marker = [None, *_MARKER.finditer(tail)][-1]
    if marker and (found := _after_marker(tail[marker.end() :])):
        return found
    alone, bare = "\n" not in tail, _TEXT.sub(" ", tail)
    if alone and not _CJK.search(bare) and not any(map(_is_word, bare.split())):
        return tail
    runs = next(filter(None, map(_runs, reversed(tail.split("\n")))), None)
    return runs[-1] if runs else tail if alone else ""


def _after_marker(rest: str) -> str:
    """The first expression that follows at once, else the last one of the sentence, else the sentence itself."""
    sentence = _SENTENCE_END.split(rest, 1)[0]
    if not sentence.strip():
        return ""
    runs = _runs(sentence)
    if runs and not _is_word(sentence.split()[0]) and not _CJK.match(sentence.strip()):
        return runs[0]
    return runs[-1] if runs else sentence.strip()


def _runs(sentence: str) -> list[str]:
    """Expressions of a sentence: words with a digit, a command or an operator, with what joins them."""
    runs: list[list[str]] = [[]]
    for piece in _pieces(sentence):
        if piece is None:
            runs.append([])
        else:
            runs[-1].append(piece)
            if re.search(r"[^.][.;:!?]$", piece) and not piece.endswith("!"):
                runs.append([])
    texts = (" ".join(_trim(run)) for run in runs)
    return [text.rstrip(".;:,?") for text in texts if re.search(r"[0-9\\]|\w", text)]


def _pieces(sentence: str) -> list[str | None]:
    """Words of a sentence, None for those of prose; a span between dollars or `\\(...\\)` is one word."""
    sentence = _NEGATED.sub(" \u0000 ", sentence)
    plain = _CJK.sub(" \u0000 ", sentence.replace("**", " ").replace("`", " "))
    pieces: list[str | None] = []
    for match in _SPAN.finditer(plain):
        if match.lastgroup == "word":
            word = match.group()
            pieces.append(word if word in _JOINS or not (word == "\u0000" or _is_word(word)) else None)
        else:
            pieces.append(match.group())
    return pieces


def _is_word(word: str) -> bool:
    """Whether it is prose: no digit, command or operator in it; a single letter but `a` and `I` is a variable."""
    bare = word.strip("()[]{},.;:!?\"'*")
    if re.search(r"[0-9\\=<>+^∞π√∅]", word) or bare in {*"$€£¥₹₩%"}:
        return False
    return not (len(bare) == 1 and bare not in "aI") and bool(bare) and not re.fullmatch(r"[-−/*·×÷%|]+", bare)


def _trim(run: list[str]) -> list[str]:
    """The run without joining words and lone letters or operators at its ends."""
    while run and (run[0] in _JOINS or run[0].strip(",;") in {"", "-", "–", "=", "+", "*"}):
        run = run[1:]
    while run and (run[-1] in _JOINS or run[-1].strip(",;") in {"", "-", "–", "="}):
        run = run[:-1]
    return run
