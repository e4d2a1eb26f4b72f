"""Which language a text is written in, by its script and by the words that languages need most; R1's reward."""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.rewards.registry import Sample, Score, reward

# Scripts that one language is written in, by the first word of their letters' Unicode names.
_SCRIPTS = {
    "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "THAI": "th", "KANNADA": "kn", "GURMUKHI": "pa",
    "GUJARATI": "gu", "TELUGU": "te", "TAMIL": "ta", "BENGALI": "bn", "MALAYALAM": "ml", "HEBREW": "he",
    "GREEK": "el", "ARMENIAN": "hy", "GEORGIAN": "ka", "SINHALA": "si", "KHMER": "km", "LAO": "lo", "MYANMAR": "my",
    "ETHIOPIC": "am",
}  # fmt: skip
# Of the others, the most frequent function words of each language, and letters that only it has.
_WORDS = {
    "en": "the and of to in is that it for was with as on you are this be at by have not or from but an they which "
    "a i my your his her over we who what when how can will am more all out up there their if about so would one no",
    "de": "der die und das ist nicht ich ein eine mit den von zu im für auf dem sich wir es auch werden sind wie ß",
    "fr": "le la les et des est une dans pour que qui pas sur avec nous vous ce cette sont du au plus être ont été",
    "es": "el los las y que en por una con para es del se lo su como más pero este esta está son al muy ñ",
    "pt": "o os as e que em por uma com para é do da não se no na dos das mais como são seu você foi ã õ",
    "it": "il gli e che di per una con non è della un sul nella dal del sono si nel più anche come alla questo dei ha",
    "nl": "de het een en van is dat niet op te voor met zijn er aan ook om door naar maar wordt deze heeft bij",
    "sv": "och att det som en på är av för med den till inte har om ett jag de vi var från eller kan ä å",
    "da": "og at det er en af til på som for med den ikke har de jeg vi der var et fra eller kan æ ø",
    "fi": "ja on ei se että oli hän ovat mutta kun joka tai niin ole myös sekä voi tämä hänen sen kuin olen jos minä",
    "pl": "i w na nie się z do to że jest jak po co ale od przez dla są być tym ł ą ę",
    "cs": "a se na je v že to s z do jako pro si by ale které jsou byl ě ř ů",
    "ro": "și de în la cu pe nu o un este care din că pentru mai sunt au ș ț ă",
    "hu": "a az és hogy nem is egy ez van meg de volt csak már ő ű",
    "tr": "ve bir bu için ile de da çok ne gibi daha olarak ama olan var ı ğ ş",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada saya juga ada adalah ke kami bisa",
    "sw": "na ya wa kwa ni katika za la kuwa hii cha kama yake sana lakini pia hiyo huo yangu wake mimi si vya au",
    "vi": "và của là có không được một cho trong với các những này đã người để tôi ơ ư đ",
    "ru": "и в не на что с как это по для я он мы от из но за так все у был ы э ё",
    "uk": "і в не на що з як це та до я він є ми від за але й у їх і ї є ґ",
    "bg": "и на да се за от е са с не в че как това които по като при до може ще съм или щ ъ",
    "hi": "है के में की का और को से हैं पर यह नहीं एक ने हो कि भी था लिए कर मैं इस",
    "mr": "आहे आणि च्या मध्ये नाही आहेत हे ते हा ही एक या होते तर मी आम्ही करण्यासाठी केले असे ळ",
    "ne": "छ र को मा लाई छन् हो पनि यो गर्न भएको गरेको तथा म हामी छैन गर्नुहोस् यस हुन्छ बाट",
    "ar": "في من على أن إلى هذا التي عن مع لا ما هذه كان هو أو الذي ة ى",
    "fa": "و در به از که این را با است برای آن می یک خود تا ها های پ چ ژ گ",
    "ur": "کے میں کی ہے اور سے کا کو پر نے ہیں یہ کہ ایک اس نہیں ٹ ڈ ڑ ں ے",
}
_FUNCTION_WORDS = {name: frozenset(text.split()) for name, text in _WORDS.items()}
_FAMILIES = {"CYRILLIC": ("ru", "uk", "bg"), "DEVANAGARI": ("hi", "mr", "ne"), "ARABIC": ("ar", "fa", "ur")}
_LATIN = tuple(name for name in _WORDS if name not in {x for family in _FAMILIES.values() for x in family})
LANGUAGES = sorted({*_SCRIPTS.values(), *_WORDS})
_LETTERS = 0.1  # weight of a language's own letter beside a word of its own
_SEGMENT = re.compile(r"[^.!?。！？\n]+")
_CODE = re.compile(r"```.*?(?:```|\Z)|\$\$?[^$]*\$\$?|\\\[.*?\\\]|\\\(.*?\\\)|`[^`]*`", re.DOTALL)


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "NONE").split()[0]


def detect(text: str) -> str | None:
    """ISO 639-1 code of the language that most of the text is in; None without a letter or a word that tells."""
    text = text.lower()
    scripts = Counter(_script(character) for character in text if character.isalpha())
    if not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    if script == "CJK" and scripts["HIRAGANA"] + scripts["KATAKANA"] > scripts["CJK"] / 20:
        return "ja"
    if script in _SCRIPTS:
        return _SCRIPTS[script]
    words = Counter(re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+|[\u0900-\u0903\u093a-\u094f\u200c\u200d]+[^\W\d_]*)*", text))
    letters = Counter(text)
    scores = {
        name: sum(_evidence(w, words, letters) for w in _FUNCTION_WORDS[name])
        for name in _FAMILIES.get(script, _LATIN if script == "LATIN" else ())
    }
    best = max(scores, key=lambda name: scores[name], default=None)
    return best if best is not None and scores[best] >= _LETTERS else None


def _evidence(word: str, words: Counter[str], letters: Counter[str]) -> float:
    if len(word) > 1:
        return words[word]
    # A single letter may be an initial; a letter of its own tells wherever it stands.
    return _LETTERS / 2 * words[word] if word.isascii() else _LETTERS * letters[word] + words[word]


def language_share(text: str, language: str | None) -> float:
    """Share of a text's words that are in sentences of `language`, or of the one that most are in; code and formulas,
    and sentences that no word gives away, are left out. 1.0 where nothing is left. Chinese and Japanese are counted by
    characters."""
    found: Counter[str] = Counter()
    for segment in _SEGMENT.findall(_CODE.sub(" ", text)):
        if (name := detect(segment)) is not None:
            found[name] += len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+", segment))
    return (found[language] if language else max(found.values())) / found.total() if found else 1.0


@reward("language")
class Language:
    """The share of words in the target language (DeepSeek-R1, arXiv 2501.12948, section 2.3.2).

    Args:
        target: its ISO 639-1 code; null: the row's `metadata.language`, else that of the prompt.
        of: `reasoning` as in R1, or the whole response.
    """

    def __init__(self, *, target: str | None = None, of: str = "response") -> None:
        for key, value, allowed in (("target", target, LANGUAGES), ("of", of, ["response", "reasoning"])):
            if value is not None and value not in allowed:
                raise UserError(
                    f"rewards: 'language': args.{key}: found {value!r}{nearest(value, allowed)}; "
                    f"allowed: {', '.join(allowed)}"
                )
        self._target, self._of = target, of

    def __call__(self, sample: Sample) -> Score:
        asked = str(sample.messages[-1]["content"]) if sample.messages else ""
        target = self._target or sample.metadata.get("language") or detect(asked) or "en"
        return Score(language_share(sample.reasoning if self._of == "reasoning" else sample.response, str(target)))
