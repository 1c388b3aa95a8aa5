"""What a completion says: the number of a solution, the letter of multiple choice.

    completion ── after_reasoning ── one notation ── before a further question ── last marker ──> number or letter

Reading is strict where an answer is marked: what can be taken in two ways is no answer. Every pattern takes time in
proportion to the text, whatever a model wrote.
"""

import re
from collections.abc import Iterable
from fractions import Fraction

_TAGS = "(?:think|thinking|thought|reasoning)"
_REASONED, _REASONS = re.compile(rf"</{_TAGS}>", re.IGNORECASE), re.compile(rf"<{_TAGS}>", re.IGNORECASE)


def after_reasoning(text: str) -> str:
    """What follows the last `</think>`; of reasoning that is not closed nothing, as no answer was given after it."""
    return _REASONS.split(_REASONED.split(text)[-1], maxsplit=1)[0]


# --- one notation -----------------------------------------------------------------------------------------------------


def _compiled(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_LATEX = _compiled(
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|!)", ""),
    (r"\{,\}", ","),
    (r"(?<=\d)\\,(?=\d{3}(?!\d))", ","),
    (r"\\[ ,;:]", " "),
    (r"\\([$%])", r"\1"),
    (r"\\(?:times|cdot)\b", "×"),
    (r"\\div\b", "÷"),
    (r"\\approx\b", "≈"),
    (r"\\pm\b", "±"),
    (r"\\pi\b", "π"),
    (r"\\sqrt\b", "√"),
    (r"\^ ?(?:\\circ\b|\{ ?\\circ ?\})|\\degree\b", "°"),
    (r"([\^_√]) ?\{([^{}]*)\}", r"\1\2"),
    (r"(?<=\d) ?\\([dt]?frac)\b", r" \\\1"),  # 2\frac{1}{2} is 2 1/2
    (r"\\[dt]?frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", r"\1/\2"),
    (r"\\[dt]?frac ?(\d)(\d)", r"\1/\2"),
    (r"\\[dt]?frac ?\{ ?- ?(\d+) ?\} ?\{ ?(\d+) ?\}", r"-\1/\2"),
    (r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"(\1)÷(\2)"),
    (r"\\boxed ?\{\s*\}", ""),  # from the prompt: "your answer in \boxed{}"
    (r"\\boxed ?\{([^{}]*)\}", r"⟦\1⟧"),
    (r"\\boxed ?\{([^{}]*)\}", r"\1"),  # a box around a box
)
_PLAIN = _compiled(
    (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator annotations: 48/2 = <<48/2=24>>24
    (r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ","),
    (r"(?<=[A-Za-z]) ?(?:\^|\*\*)-?\d+", ""),  # cm^2
    (r"\b((?:[cdkm]?m|ft))[23]\b", r"\1"),
    (r"(\d) ?[x×*] ?10 ?(?:\^|\*\*) ?(-?\d{1,2})\b", r"\1e\2"),
)


def _in_one_notation(text: str) -> str:
    text = text.replace("−", "-")
    is_latex = "\\" in text or "{" in text
    for pattern, replacement in (*_LATEX, *_PLAIN) if is_latex else _PLAIN:
        text = pattern.sub(replacement, text)
    return text


# --- where the answer is ----------------------------------------------------------------------------------------------

_HASHES = r"####(?!\W{0,9}(?i:step|part|case|option|question|problem)\b)"  # not a heading of Markdown
_BOX = r"⟦(?P<box>[^⟦⟧]*)⟧|\\boxed"  # a box that cannot be read is a marker all the same
_ANSWER = rf"{_BOX}|{_HASHES}|(?i:<answer>|\banswer\b\W{{0,4}}?(?::|is\b))"
_NUMBER_MARKER = re.compile(rf"{_ANSWER}|(?<!\w)A:")
_LETTER_MARKER = re.compile(rf"{_ANSWER}|(?i:\b(?:choice|option)\b\W{{0,4}}?(?::|is\b))")

_FIRST = re.compile(  # an answer is given: after a marker, or at the very beginning
    rf"(?:{_ANSWER}|(?<!\w)A:)\W{{0,9}}(?:\d|[A-Z]\b)|⟦|\A\W*(?:[A-Z][).:]|[A-Z\d][\d.,/]*[^\w\n]*$)", re.MULTILINE
)
_LABEL = re.compile(
    r"^[^\w\n]*(?:question|problem|exercise|example|instruction|q|user|human)[ \t]?\d*[^\w\n]*(?::|$)",
    re.MULTILINE | re.IGNORECASE,
)
_FIRST_HASHES = re.compile(rf"{_HASHES}[^\w\n]{{0,9}}\d")
_ASKED = re.compile(
    r"^(?![^\w\n]*(?:wait|hmm+|but|no|actually|hold on|right|really|sure|correct|is (?:that|this|it)|did (?:i|we)|am i"
    r"|are we|have (?:i|we))\b)[^\n]*\?[^\w\n?]*$",
    re.MULTILINE | re.IGNORECASE,
)


def _before_a_further_question(text: str) -> str:
    """What a model goes on with, when it has answered, is not the answer: "Question: …", or after `####` a line that
    asks something, other than itself ("Wait, is that right?")."""
    for answered, asked in ((_FIRST, _LABEL), (_FIRST_HASHES, _ASKED)):
        answer = answered.search(text)
        question = answer and asked.search(text, answer.end())
        if question:
            text = text[: question.start()]
    return text


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(list(matches)[-1:]), None)


# --- numbers ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)%])-)?(?:[$€£¥]\s?(?P<inner>-)?)?"
    r"(?:(?P<whole>(?<![\d.,/])\d{1,9})[ \t](?=\d+/\d))?"
    r"(?P<value>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][+-]?\d{1,2}\b)?)"
    r"(?:/(?P<divisor>\d+))?",
    re.ASCII,
)
_PHRASE_END = re.compile(r"[.;!?](?=\s|\Z)|\n|,(?=\s+[^\W\d])|\b(?:because|since|so|as|which|if|not)\b")
# between two numbers: they are one expression, a range, a list, a date, a time, or a number written another way
_JOINED = re.compile(r"(?:\A\s*|[-+*/×÷·^:–—~±√,.'’]|\bx|\b(?:or|and|to|plus|minus|times|over))[\s$€£¥({]*\Z")
_EXPRESSION = re.compile(r"[^\w\n=≈.,;]*(?:[,.]|\b(?:x|or|to|plus|minus|times|over)\b)?[^\w\n=≈.,;]*")
_OPEN_END = re.compile(r"\s*(?:[π√]|[+×÷*^]\s*[\w(]|[xyz]\b)")  # after a number: it is a part of an expression
_UNIT = re.compile(r"[\w\s%°.,/²³$€£¥)\]]*\Z")


def final_number(text: str) -> Fraction | None:
    r"""The final answer of a solution, exactly, or None.

    Reasoning in `<think>` is left out (not closed: there is no answer), and so is what follows a further question. Then
    the last marker counts: `\boxed{}`, `####`, `Answer:`, `answer is`, `<answer>`, `A:`. A box holds one number, with
    a name before "=" and a unit; behind another marker the first number is read, and of a chain of equations the last
    side that is one number. A marker without a number, a sum that is not worked out, a range, a list, a date or a
    choice of two is no answer. Where nothing is marked, the last number of all is.

    Units and words such as "million" are not read; 50% is 50. ⏎ is a line break:

        #### 12                                                     → 12
        A: 1,234                                                    → 1234
        **Answer:** -$3.50                                          → -7/2
        The answer is 12 apples, not 13.                            → 12
        The answer is 5 + 3 = 8.                                    → 8
        #### 5 apples + 3 apples = 8 apples                         → 8
        so x = 48/2 = <<48/2=24>>24                                 → 24
        #### 7 ⏎ Tom has 3 dogs. How many legs have they? ⏎ #### 12 → 7
        The answer is 7. ⏎ Q: What is 2 + 3? ⏎ The answer is 5.     → 7
        #### 5 ⏎ Wait, is that right? ⏎ #### 6                      → 6
        <think>It is 9. #### 9</think> The answer is 8.             → 8
        <think>It is 9. The answer is 9.                            → None
        It is $\boxed{\frac{3}{4}}$.                                → 3/4
        \boxed{x = 5 \text{ cm}^2}                                  → 5
        \boxed{5} no, \boxed{\boxed{6}}                             → 6
        The area is 12 cm^2                                         → 12
        A: 1 1/2 cups                                               → 3/2
        #### 1.5 \times 10^{3}                                      → 1500
        #### 3-5                                                    → None
        The answer is 5 or 6.                                       → None
        #### 5 + 3                                                  → None
        #### 1.234,56                                               → None
    """
    text = _before_a_further_question(_in_one_notation(after_reasoning(text)))
    marker = _last(_NUMBER_MARKER.finditer(text))
    if marker is None:
        return _last_number(text)
    if marker["box"] is not None:
        return _said(marker["box"], strict=True)
    number = _NUMBER.search(text, marker.end())
    if number is None or marker[0] == r"\boxed" or text[number.start() - 1] == "√":
        return None
    end = _PHRASE_END.search(text, number.end())
    return _said(text[number.start() : end.start() if end else len(text)])


def _said(phrase: str, *, strict: bool = False) -> Fraction | None:
    """The last side of an equation in the text that is one number. strict: it is nothing else, but for a unit."""
    if re.search(r"\bor\b|±", phrase):
        return None
    for side in reversed(re.split("[=≈]", phrase)):
        numbers = list(_NUMBER.finditer(side))
        if not numbers:
            continue
        first = numbers[0]
        several = len(numbers) > 1 and (strict or _JOINED.search(side[first.end() : numbers[1].start()]))
        alone = not strict or (not re.search(r"[\w√π]", side[: first.start()]) and _UNIT.match(side, first.end()))
        if not several and alone and not _OPEN_END.match(side, first.end()):
            return _fraction(first)
    return None


def _last_number(text: str) -> Fraction | None:
    numbers = list(_NUMBER.finditer(text))[-2:]
    if not numbers or (len(numbers) > 1 and _EXPRESSION.fullmatch(text, numbers[0].end(), numbers[1].start())):
        return None
    return _fraction(numbers[-1])


def _fraction(number: re.Match[str]) -> Fraction | None:
    try:
        value = Fraction(number["value"].replace(",", "")) / Fraction(number["divisor"] or 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, or 1/0
        return None
    value += int(number["whole"] or 0)
    return -value if number["sign"] or number["inner"] else value


# --- letters ----------------------------------------------------------------------------------------------------------

_ALONE = (
    r"([A-Z])(?=[ \t]*(?:$|[)\]*.,:;\x22”`$<⟧])"
    r"|\s+(?:[-–—]|(?:because|since|as)\b|is\b(?!\s+(?:not|wrong|incorrect|false)\b)))"
)
_OPENING = re.compile(rf"\W*(?:(?i:option|choice)\W+)?{_ALONE}", re.MULTILINE)
_ANOTHER = re.compile(
    rf"[)\]*\s]{{0,3}}(?:[,/&+]|\b(?:and|or)\b)[\s(\[*]{{0,3}}(?:and|or)?[\s(\[*]{{0,3}}{_ALONE}", re.M
)
_LAST_LINE = re.compile(r"^[^\w\n]*([A-Z])\W*\Z", re.MULTILINE)
_IN_PARENTHESES = re.compile(r"(?<!not )(?<!n't )(?<!n’t )\(([A-Z])\)")
_OPTION = re.compile(r"^[^\w\n]*([A-Z])[).:][^\n]*", re.MULTILINE)
_NONE_OR_MANY = re.compile(r"\W*(?:not|neither|either|both)\b", re.IGNORECASE)


def chosen_letter(text: str) -> str | None:
    r"""The capital letter that a completion chooses, or None.

    Reasoning in `<think>` is left out (not closed: there is no choice), and so is what follows a further question. Then
    the letter is looked for in what follows the last marker, `\boxed{}`, `####`, `Answer:`, `answer is`, `<answer>`, or
    the same with choice or option; in the whole text where there is none: the letter that opens it, else the letter
    that is its last line, else the last one in parentheses. One that opens stands alone: before a line's end,
    punctuation, a dash or because / since / as / is. So the article of "A cat" is no choice, nor is the I of "I think".
    Two letters are no choice, and options that are only repeated are not chosen. ⏎ is a line break:

        B                                                 → B
        **B**                                             → B
        B. Paris                                          → B
        B because it is larger                            → B
        Option C is right.                                → C
        The correct choice is D                           → D
        The answer is $\boxed{\text{B}}$.                 → B
        \boxed{\textbf{(C) } 12}                          → C
        Answer: Paris (B)                                 → B
        I think (C) is right                              → C
        Paris is in France. ⏎ ⏎ B                         → B
        A) Paris ⏎ B) Rome ⏎ ⏎ B                          → B
        B ⏎ ⏎ Question: And of Italy? ⏎ Answer: C         → B
        <think>The answer is A.</think> The answer is C.  → C
        <think>The answer is A.                           → None
        A cat sat on the mat                              → None
        Option A or B                                     → None
        The answer is (A) and (C).                        → None
        A) Paris ⏎ B) Rome                                → None
        The answer is not (B)                             → None
    """
    text = _before_a_further_question(_in_one_notation(after_reasoning(text)))
    marker = _last(_LETTER_MARKER.finditer(text))
    tail = text if marker is None else text[marker.end() :] if marker["box"] is None else marker["box"]
    if _NONE_OR_MANY.match(tail):
        return None
    if len(set(_OPTION.findall(tail))) > 1:
        tail = _OPTION.sub("", tail)
    listed = list(_IN_PARENTHESES.finditer(tail))
    letters = "".join(match[1] for match in listed)
    if len(letters) > 2 and letters in "ABCDEFGHIJ":  # the options in one line
        listed = []
    elif found := _OPENING.match(tail):
        return None if _ANOTHER.match(tail, found.end(1)) else found[1]
    if found := _LAST_LINE.search(tail):
        return found[1]
    if not listed or (len(listed) > 1 and _ANOTHER.match(tail, listed[-2].end() - 1)):
        return None
    return letters[-1]
