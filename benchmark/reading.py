"""How the scripts read, in numbers: prints a Markdown table, a row for each script.

    python benchmark/reading.py                      # the scripts of this repository
    python benchmark/reading.py path/to/script.py    # any others

*Tokens* are Python's own, without comments, docstrings, line ends and indentation; an f-string is
one. *A line* is a line of code: one where a token begins. *Formatted* is the number of lines after
`ruff format` at 100 columns. Statements and complexity of `main` are ruff's PLR0915 and C901.

Every token belongs to one of three parts, by the function or class at the top level it is in:

- *algorithm*: `ALGORITHM` below, and in `main` what an iteration computes, which is the body of
  its loop from the first statement behind the `break` to the call of `update`;
- *machine*, which is saving, logging, flags and what is done for speed: `MACHINE` below, and the
  rest of that loop;
- neither: imports, `Args`, `validate`, the environment, `evaluate`, and the start of `main`.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
ALGORITHM = re.compile(
    r"\w*loss|gae|normalize|\w*noise|flip_\w+|collect\w*|update|\w*Agent|layer_init|mlp"
    r"|RMSprop\w*|token_\w+"
)
MACHINE = re.compile(
    r"read_flags|refusing|start_logging|write_logs|save_\w+|set_seeds|spare_\w+|in_numpy"
)
NOT_COUNTED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
HEADER = [
    "file",
    "lines",
    "formatted",
    "tokens",
    "tokens a line",
    f"lines over {COLUMNS} columns",
    "statements in `main`",
    "complexity of `main`",
    "algorithm",
    "saving, logging, machine",
]


def docstrings(tree: ast.Module) -> set[tuple[int, int]]:
    """Where docstrings begin: (line, column)."""
    starts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            starts.add((node.body[0].lineno, node.body[0].col_offset))
    return starts


def code_tokens(source: str) -> list[tokenize.TokenInfo]:
    """The tokens that count. From Python 3.12 on f-strings come in pieces; the first one counts."""
    left_out = docstrings(ast.parse(source))
    tokens = []
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        depth -= name == "FSTRING_END"
        inside = depth > 0 or name == "FSTRING_END"
        depth += name == "FSTRING_START"
        if not inside and token.type not in NOT_COUNTED and token.start not in left_out:
            tokens.append(token)
    return tokens


def tokens_a_line(source: str) -> float:
    tokens = code_tokens(source)
    return len(tokens) / len({token.start[0] for token in tokens})


def calls_update(statement: ast.stmt) -> bool:
    calls = (node for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any(getattr(call.func, "id", "") == "update" for call in calls)


def lines_of(nodes: list[ast.stmt]) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def with_decorators(node: ast.stmt) -> list[ast.stmt]:
    return [*getattr(node, "decorator_list", []), node]


def parts_of_main(main: ast.FunctionDef) -> tuple[set[int], set[int]]:
    """Lines of its loop that are the algorithm, and those that are not."""
    loops = [node for node in ast.walk(main) if isinstance(node, ast.For) and calls_update(node)]
    if not loops:
        return set(), set()
    body = loops[0].body
    breaks = [i for i, x in enumerate(body) if any(isinstance(y, ast.Break) for y in ast.walk(x))]
    first = breaks[-1] + 1 if breaks else 0
    last = next(i for i, x in enumerate(body) if calls_update(x))
    algorithm = lines_of(body[first : last + 1])
    return algorithm, lines_of([loops[0]]) - algorithm


def shares(source: str) -> tuple[float, float]:
    """Of the tokens: the algorithm's, and those of saving, logging and the machine."""
    algorithm = set()
    machine = set()
    for node in ast.parse(source).body:
        name = getattr(node, "name", "")
        if name == "main":
            mine, rest = parts_of_main(node)
            algorithm |= mine
            machine |= rest
        elif ALGORITHM.fullmatch(name):
            algorithm |= lines_of(with_decorators(node))
        elif MACHINE.fullmatch(name):
            machine |= lines_of(with_decorators(node))
    lines = [token.start[0] for token in code_tokens(source)]
    return tuple(sum(line in part for line in lines) / len(lines) for part in (algorithm, machine))


def ruff(*arguments: str, source: str) -> str:
    """What ruff says of a source, with these settings alone."""
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "-"]
    return subprocess.run(command, input=source, capture_output=True, encoding="utf-8").stdout


def formatted(source: str) -> str:
    """After `ruff format`, also where a comment asks it to keep off."""
    source = re.sub(r"# fmt: (on|off|skip)", "", source)
    return ruff("format", f"--line-length={COLUMNS}", source=source)


def sizes_of_main(source: str) -> tuple[int | None, int | None]:
    """Its statements and its complexity; None without a `main`."""
    rules = ["--select=PLR0915,C901", "--output-format=json"]
    limits = ["lint.pylint.max-statements=0", "lint.mccabe.max-complexity=0"]
    report = ruff("check", *rules, *(f"--config={limit}" for limit in limits), source=source)
    lines = source.splitlines()
    found = {}
    for entry in json.loads(report):
        if lines[entry["location"]["row"] - 1].startswith("def main("):
            found[entry["code"]] = int(re.search(r"\((\d+) > 0\)", entry["message"])[1])
    return found.get("PLR0915"), found.get("C901")


def row(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    statements, complexity = sizes_of_main(source)
    algorithm, machine = shares(source)
    return [
        f"`{path.name}`",
        str(len(lines)),
        str(len(formatted(source).splitlines())),
        f"{len(code_tokens(source)):,}",
        f"{tokens_a_line(source):.1f}",
        str(sum(len(line) > COLUMNS for line in lines)),
        str(statements or "-"),
        str(complexity or "-"),
        f"{algorithm:.0%}",
        f"{machine:.0%}",
    ]


def main(paths: list[Path]) -> None:
    for cells in [HEADER, ["---"] * len(HEADER), *map(row, paths)]:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(ROOT.glob("*.py")))
