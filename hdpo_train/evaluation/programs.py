"""The program in a completion: which of its lines are the solution, and what of the prompt they need.

prompt, completion ── blocks ──> preamble of the prompt · definitions of the other blocks · the solution
"""

import ast
import re
import warnings

from hdpo_train.evaluation.answers import after_reasoning

_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[^`\n]*)")
_PYTHON = re.compile(r"(?:\{\.|\{)?(?:python|py)[\d.]*\b|\s*\Z", re.IGNORECASE)  # a fence may name no language
_NEXT = re.compile(r"\n(?=class|def|#|if|print)")  # where HumanEval's authors stop a completion: arXiv 2107.03374
_INDENTED = re.compile(r"(?:[ \t]*\n)*(?:\t| {2,})\S")  # one space may be that of a word
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_UNREADABLE = (ValueError, RecursionError, MemoryError)  # null bytes, half a surrogate pair; nested too deeply
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


def solution(prompt: str | list[dict[str, str]], completion: str, entry_point: str) -> str:
    r"""The program of a completion that defines `entry_point`, with what it needs of the prompt.

    Reasoning in `<think>` is left out. Then the solution is

    1. to a prompt that is text, the prompt and the lines of the completion before the first fence, if these begin
       indented: they go on with the prompt's function;
    2. else the first fenced block that defines the function; fences are ``` or ~~~, indented or not, marked python,
       python3, py or not at all, closed or not;
    3. else, to a prompt that is text, the prompt and the first block, if that begins indented;
    4. else the completion up to a stray fence: by itself and without what follows it that is not Python, if it defines
       the function or the prompt is a chat; or else behind the prompt and up to the next thing at the left margin.

    Before a solution that stands by itself come the prompt's lines above the function (its imports only, if they are
    not a program) and the imports, functions, classes and constants of the completion's other blocks; what else these
    blocks do, such as calling the function as an example, is left out.

    Completions to the prompt `def total(xs):`, whose tests are right for a sum (⏎ is a line break, · an indentation):

        ·return sum(xs)                                                            → right
        ·return sum(xs) ⏎ ``` ⏎ That is all.                                       → right
        ·return sum(xs) ⏎ ⏎ print(total(                                           → right
        ```python ⏎ def total(xs): ⏎ ·return sum(xs) ⏎ ```                         → right
        ```python3 ⏎ def total(xs): ⏎ ·return sum(xs) ⏎ ```                        → right
        ``` ⏎ def total(xs): ⏎ ·return sum(xs) ⏎ ```                               → right
        ~~~ ⏎ def total(xs): ⏎ ·return sum(xs) ⏎ ~~~                               → right
        1. So: ⏎ ·```py ⏎ ·def total(xs): ⏎ ··return sum(xs) ⏎ ·```                → right
        ```python ⏎ ·return sum(xs) ⏎ ```                                          → right
        def total(xs): ⏎ ·return sum(xs) ⏎ ```                                     → right
        def total(xs): ⏎ ·return sum(xs) ⏎ ⏎ It adds.                              → right
        ```python ⏎ total = sum ⏎ ```                                              → right
        ```python ⏎ def f(x): ⏎ ·return sum(x) ⏎ ``` ⏎ ``` ⏎ total = lambda x: f(x) ⏎ ``` → right
        <think>```python ⏎ def total(xs): return 0 ⏎ ```</think>```python ⏎ total = sum ⏎ ``` → right
        ```bash ⏎ pip install x ⏎ ``` ⏎ ```python ⏎ total = sum ⏎ ```              → right
        <think>```python ⏎ total = sum ⏎ ```                                       → wrong
        ```javascript ⏎ total = sum ⏎ ```                                          → wrong
        ```python ⏎ total = max ⏎ ``` ⏎ or ⏎ ```python ⏎ total = sum ⏎ ```         → wrong
        ```python ⏎ def totals(xs): ⏎ ·return sum(xs) ⏎ ```                        → wrong
        ```python ⏎ The sum. ⏎ total = sum ⏎ ```                                   → wrong
        Here you are: return sum(xs)                                               → wrong
    """
    completion = after_reasoning(completion.replace("\r\n", "\n"))
    defines = re.compile(
        rf"^(?:@.*\n){{0,9}}(?:(?:async\s+)?def\s+{re.escape(entry_point)}\b|{re.escape(entry_point)}\s*(?::[^=\n]*)?=(?!=))",
        re.MULTILINE,
    )
    before, blocks = _blocks(completion)
    is_text = isinstance(prompt, str)
    prompt = prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt)
    if is_text and _INDENTED.match(before):
        return prompt + _NEXT.split(before, maxsplit=1)[0]
    chosen = next((block for block in blocks if defines.search(block)), None)
    others = [block for block in blocks if block is not chosen]
    if chosen is None:
        if is_text and blocks and _INDENTED.match(blocks[0]):
            return prompt + blocks[0]
        if is_text and not defines.search(before):
            return prompt + _NEXT.split(before, maxsplit=1)[0]
        chosen, others = _up_to_prose(before), []
    pieces = [_preamble(prompt, defines), *(_definitions(block, entry_point) for block in others), chosen]
    program = "\n".join(piece for piece in pieces if piece)
    return "".join(_FUTURE.findall(program)) + _FUTURE.sub("", program)


def _blocks(text: str) -> tuple[str, list[str]]:
    """What comes before the first fence, and the Python in fences. A fence that names a language opens a block always,
    so that a stray one before it takes nothing away."""
    before: list[str] = []
    blocks: list[list[str]] = []
    mark, indent, python = "", "", False  # of the open fence
    fenced = False
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence and mark and fence["mark"].startswith(mark) and not fence["language"]:
            mark = ""
        elif fence and (not mark or fence["language"]):
            fenced, mark, indent = True, fence["mark"], fence["indent"]
            python = bool(_PYTHON.match(fence["language"]))
            if python:
                blocks.append([])
        elif mark and python:
            blocks[-1].append(line.removeprefix(indent))
        elif not fenced:
            before.append(line)
    return "\n".join(before), ["\n".join(block) + "\n" for block in blocks]


def _preamble(prompt: str, defines: re.Pattern[str]) -> str:
    """What stands above the function in the prompt, or in the block of code that a prompt holds."""
    before, blocks = _blocks(prompt.replace("\r\n", "\n"))
    for code in [*blocks, before]:
        if found := defines.search(code):
            above = code[: found.start()]
            if _parsed(above) is not None:
                return above
            return "\n".join(re.findall(r"^(?:import|from)\s.+$", above, re.MULTILINE))
    return ""


def _definitions(block: str, entry_point: str) -> str:
    """Imports, functions, classes and constants of a block; nothing of one that is not Python."""
    tree, lines, kept = _parsed(block), block.split("\n"), []
    for node in tree.body if tree else []:
        is_other = getattr(node, "name", None) != entry_point
        is_constant = isinstance(node, _ASSIGNMENTS) and not _mentions(node, entry_point)
        if is_other and (is_constant or isinstance(node, _DEFINITIONS)):
            first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
            kept += lines[first - 1 : node.end_lineno]
    return "\n".join(kept)


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _up_to_prose(text: str) -> str:
    """The lines before the first statement that is not Python; all of them where two cuts do not find it."""
    lines = text.split("\n")
    for _ in range(3):
        try:
            _parse("\n".join(lines))
            break
        except SyntaxError as error:
            last = min(error.lineno or len(lines), len(lines)) - 1
            del lines[next((i for i in range(last, -1, -1) if lines[i][:1].strip()), 0) :]
        except _UNREADABLE:
            break
    return "\n".join(lines)


def _parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a model wrote, such as "\d"
        return ast.parse(code)


def _parsed(code: str) -> ast.Module | None:
    try:
        return _parse(code)
    except (SyntaxError, *_UNREADABLE):
        return None
