"""Find words that this project does not use, in everything that a person reads.

    python -m tests.docs.words [PATH...]

It prints each hit with a better word, and how many hits each file has. It reads
docstrings, comments, messages and names of tests in Python files, and the text of
pages. It skips code blocks and everything that is marked as code.

It uses the standard library alone, so that a copy of it runs anywhere.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from inspect import cleandoc
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

CHECKED = "tgstream", "tests", "examples", "docs", "README.md"
"""The paths that are read without arguments."""

WORDS = {
    r"seats?": "slot",
    r"mend(?:s|ed|ing)?": "fix",
    r"told|tells?|telling": "reported, logged, shown",
    r"says|said|saying|(?:cannot|can|not|must) say": "contains, states, cannot encode",
    r"hears?|heard|hearing": "receives",
    r"(?<!frequently )(?:asks|asked|asking)": "requests, checks, calls, reads",
    r"(?:hold|holds|held|holding) (?:\w+ )?back": "buffers, buffered",
    r"held against": "compared with",
    r"(?:make|makes|made|making) no sense": "must be ...",
    r"makes of": "converts to",
    r"half-way": "halfway",
    r"for ever": "forever",
    r"anew": "again",
    r"as ever": "as usual",
    r"(?:come|comes|came|coming) back": "reconnects, returns",
    r"end(?:s|ed|ing)? well": "ends normally; graceful shutdown",
    r"(?:looks?|looked|if) whole": "complete",
    r"(?<!there )(?:is|are|was|were) no "
    r"(?!longer|more|less|fewer|other|\w+er than)[a-z]+": "is not a ..., invalid",
    r"(?<!there )(?:is|are|was|were) (?-i:none)": "is not a ..., invalid",
    r"pieces?": "output, chunk, part",
    r"gather(?:s|ed|ing)?": "buffer, collect",
    r"beats?": "heartbeat",
    r"(?:in|of|the|a|its|this) silence": "idle",
    r"core writes count": "Core statements are included",
    r"ways? out": "how errors reach the client",
    r"(?-i:Rule:)": "describe what the module is for",
    r"one's": "custom",
    r"(?:client|browser|user|listener|reader)s? (?:that |who |which )?"
    r"(?:has |have |had )?(?:leaves?|left)": "disconnects",
    r"chunks? (?:that |which )?(?:leaves?|left)": "is sent",
    r"(?:response|transfer|body|bodie)s? (?:that |which )?"
    r"(?:breaks?|broke|(?:is|are|was) broken)": "is aborted; incomplete",
    r"(?:is|are|was|were) (?:not )?to (?:be|have)": "must; the imperative",
    r"shall|wants": "must, needs",
    r"(?<=, )for (?:it|they|there|nobody|nothing|its|one)": "because",
    r"the (?:former|latter)|"
    r"that one(?=\W*$|[.,;]| (?:is|was|has|goes|fails|knows))": "repeat the noun",
    r"(?:by|to|for|from) who(?! is| are)": "name the actor",
}
"""Words that are never right here, as regular expressions, and better words."""

_RULES = [
    (re.compile(rf"(?<!\w)(?:{word})(?!\w)", re.IGNORECASE), better)
    for word, better in WORDS.items()
]
_SEMICOLON = re.compile(r";(?=\s|\Z)")
_CLAUSE = re.compile(
    r"(?:\A(?P<first>[Ww])|(?<=[.!?|] )W)(?:hat(?! to do)|ho|here)(?:so)?(?:ever|se)?\b"
)
_END = re.compile(r"[.!?](?=\s|\Z)")
_CODE = re.compile(
    r":[\w:]+:`[^`]+`|``.+?``|`[^`]+`_{0,2}"  # roles, literals and links
    r"|https?://\S+|import \w+; \w+[.\w]*"
    r"|(?:[\w-]+/[\w.+*-]+|attachment|inline|form-data)(?:; ?[\w*-]+=\S+)+"
    r"|&#?\w+;"
)
_FIELD = re.compile(r":\w+(?: [^:`]+)?: +|\.\. \w+:: ?|(?:[-*+]|\d+\.|#\.) +|\|")
_PRAGMA = re.compile(r"type: ignore|noqa|pragma:|!|-\*-")


class Passage(NamedTuple):
    """Text that belongs together, such as a paragraph or a message.

    :param line: the number of its first line in the file.
    :param lines: its lines, without the markers of comments and lists.
    :param opens: whether its first word begins a sentence.
    :param is_name: whether it is the name of a test.
    """

    line: int
    lines: list[str]
    opens: bool = True
    is_name: bool = False


class Hit(NamedTuple):
    """A word that is not used here."""

    line: int
    word: str
    better: str
    context: str


def hits(passage: Passage) -> Iterator[Hit]:
    """The words of a passage that are not used here."""
    text = " ".join(passage.lines)
    masked = _CODE.sub(lambda match: "X" * len(match[0]), text)

    def hit(start: int, end: int, better: str) -> Hit:
        line, position = passage.line, -1
        for text_line in passage.lines:
            position += len(text_line) + 1
            if start <= position:
                break
            line += 1
        context = text[max(0, start - 30) : end + 30]
        return Hit(line, text[start:end], better, context)

    for pattern, better in _RULES:
        for match in pattern.finditer(masked):
            yield hit(*match.span(), better)
    for match in _CLAUSE.finditer(masked):
        end = _END.search(masked, match.end())
        is_question = end is not None and end[0] == "?"
        if not is_question and (passage.opens or match["first"] is None):
            yield hit(*match.span(), "begin with the actor")
    if not passage.is_name:
        for match in _SEMICOLON.finditer(masked):
            yield hit(*match.span(), "two sentences")


# Passages of Python files.


def python_passages(source: str, every_text: bool = False) -> Iterator[Passage]:
    """Docstrings, comments, messages and names of tests.

    :param every_text: whether every string of three words or more is a message.
    """
    yield from _comments(source)
    tree = ast.parse(source)
    documented = set()
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and _text_of(child.value) is not None:
                documented.add(id(child.value))
                yield from _docstring(child.value)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield Passage(node.lineno, [node.name[5:].replace("_", " ")], is_name=True)
    yield from _messages(tree, documented, every_text)


def _text_of(node: ast.AST) -> str | None:
    """The text of a string constant or an f-string, with X for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(value) or "X" for value in node.values)
    return None


def _docstring(node: ast.expr) -> Iterator[Passage]:
    """The paragraphs and fields, without indented blocks of code."""
    lines: list[str] = []
    for line in cleandoc(_text_of(node) or "").splitlines():
        is_code = line.startswith("    ") and not (lines and lines[-1].strip())
        lines.append("" if is_code else line)
    yield from paragraphs(lines, node.lineno)


def _comments(source: str) -> Iterator[Passage]:
    """Comments. Comments on adjacent lines are one passage."""
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]

    def block(numbered: tuple[int, tokenize.TokenInfo]) -> tuple[int, int]:
        index, token = numbered
        return token.start[1], token.start[0] - index

    for _, group in groupby(enumerate(tokens), key=block):
        comments = [token for _, token in group]
        texts = [token.string.lstrip("# ") for token in comments]
        if not _PRAGMA.match(texts[0]):
            yield Passage(comments[0].start[0], texts)


_LOGGING = re.compile(r"\b(log|logger|logging|warnings)\.|\bwarn\w*$|Error$|\bfail$")


def _messages(
    tree: ast.AST, documented: set[int], every_text: bool
) -> Iterator[Passage]:
    """The texts of errors, log lines and assertions, or every text that has spaces."""
    seen = documented
    for root in [tree] if every_text else _readers_of_messages(tree):
        for node in ast.walk(root):
            if not isinstance(node, ast.expr) or id(node) in seen:
                continue
            if (text := _text_of(node)) is None:
                continue
            seen |= {id(part) for part in ast.walk(node)}
            if len(re.findall(r"[a-z]{2,}", text)) > 2 and " " in text.strip():
                opens = not text[0].isspace()
                yield Passage(node.lineno, [" ".join(text.split())], opens)


def _readers_of_messages(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements and calls that show a text to a person."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            yield node
        elif isinstance(node, ast.Assert) and node.msg is not None:
            yield node.msg
        elif isinstance(node, ast.Call) and _LOGGING.search(ast.unparse(node.func)):
            yield node
        elif isinstance(node, ast.keyword) and node.arg in ("match", "reason", "help"):
            yield node.value


# Passages of pages.


def paragraphs(lines: Iterable[str], first: int = 1) -> Iterator[Passage]:
    """Paragraphs, and items of lists, fields and cells of tables as their own."""
    passage = Passage(first, [])
    for number, line in enumerate(lines, first):
        text = line.strip()
        while marker := _FIELD.match(text):
            text = text[marker.end() :].strip()
        starts = text != line.strip() or not text
        if starts and passage.lines:
            yield passage
            passage = Passage(number, [])
        if not passage.lines:
            passage = Passage(number, [])
        if text and not re.fullmatch(r"([^\w\s])\1+[^\w]*", text):
            passage.lines.append(text)
    if passage.lines:
        yield passage


_LITERAL = re.compile(
    r"(?P<margin> *)(?:\.\. (?:code-block|literalinclude|image|figure|toctree"
    r"|parsed-literal|raw|highlight|auto\w+|module|currentmodule|only)::.*"
    r"|(?!\.\. ).*::)$"
)


def rst_passages(source: str) -> Iterator[Passage]:
    """The text of a page, without blocks of code."""
    lines: list[str] = []
    margin: int | None = None
    for line in source.splitlines():
        indent = len(line) - len(line.lstrip())
        if margin is not None and line.strip() and indent <= margin:
            margin = None
        if margin is None and (literal := _LITERAL.match(line)):
            margin = len(literal["margin"])
            lines.append("" if line.lstrip().startswith("..") else line)
        else:
            lines.append(line if margin is None else "")
    yield from paragraphs(lines)


def markdown_passages(source: str) -> Iterator[Passage]:
    """The text of a page, without blocks of code."""
    lines, is_code = [], False
    for line in source.splitlines():
        is_fence = line.startswith("```")
        is_code = is_code != is_fence
        lines.append("" if is_code or is_fence else line)
    yield from paragraphs(lines)


# Files.

_READERS: dict[str, Callable[[str], Iterator[Passage]]] = {
    ".rst": rst_passages,
    ".md": markdown_passages,
}


def file_hits(path: Path) -> list[Hit]:
    """The words of a file that are not used here, from the first line on."""
    source = path.read_text()
    if path.suffix == ".py":
        package = any((parent / "py.typed").exists() for parent in path.parents)
        passages = python_passages(source, every_text=package)
    else:
        passages = _READERS[path.suffix](source)
    return sorted({hit for passage in passages for hit in hits(passage)})


def files(root: Path) -> list[Path]:
    """The files below a path that can be read here."""
    paths = [root] if root.is_file() else sorted(root.rglob("*"))
    return [path for path in paths if path.suffix in (".py", *_READERS)]


def main(arguments: list[str]) -> int:
    """Print the hits of the files below some paths.

    :returns: the exit status: 1 if there is a hit.
    """
    counts = {}
    for argument in arguments or CHECKED:
        for path in files(Path(argument)):
            in_file = file_hits(path)
            counts[path] = len(in_file)
            for line, word, better, context in in_file:
                print(f"{path}:{line}: {word!r} -> {better} | {context}")
    for path, count in counts.items():
        if count:
            print(f"{count:>5} {path}")
    print(f"{sum(counts.values()):>5} in all, in {len(counts)} files")
    return int(any(counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
