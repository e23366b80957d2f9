"""From the docstrings of luxtorch, which are plain text with sections, to reStructuredText."""

from __future__ import annotations

import re
import textwrap

SECTION = re.compile(r"^(Args|Attributes|Parameters|States|Shape|Returns|Yields|Raises|Example|Source):$")
ITEM = re.compile(r"^`?([*\w.]+(?:(?:, | and )[*\w.]+)*)`?: (.*)$")
VERBATIM = re.compile(r"(^ *>>> .*\n(?:.*\S.*\n)*|^ *```python\n(?:.*\n)*? *```\n)", re.M)
CODE = re.compile(r"`([^`]+)`")


def to_rest(lines: list[str]) -> list[str]:
    """Convert a docstring: sections become fields, items a list, and backquoted text gets the role `lux`."""
    result: list[str] = []
    text: list[str] = []
    for line in [*lines, "Source:"]:  # the last one only ends what comes before it
        if SECTION.match(line):
            result += block(text)
            text = []
        text.append(line)
    return result


def block(lines: list[str]) -> list[str]:
    """Convert what stands before the first section, or one section with all that follows it."""
    head = SECTION.match(lines[0]) if lines else None
    if head is None:
        return marked(lines)
    size = next((i for i, line in enumerate(lines[1:], 1) if line and not line.startswith(" ")), len(lines))
    body = textwrap.dedent("\n".join(lines[1:size])).strip("\n").splitlines()
    if head[1] == "Example":
        section = [".. rubric:: Example", "", *marked(body)]
    else:
        section = [f":{head[1]}:", *(f"    {line}" for line in marked(items(body)))]
    return ["", *section, "", *marked(lines[size:])]


def items(body: list[str]) -> list[str]:
    """Make list items of lines such as `name: text`, with the lines that are indented below them."""
    result: list[str] = []
    in_item = False
    for line in body:
        item = ITEM.match(line)
        if item:
            result += ["", f"- `{item[1]}`: {item[2]}"]
            in_item = True
        elif line[:1] == " ":
            result.append(f"  {line[4:]}" if in_item else line.strip())
        else:
            result += [""] * in_item + [line]
            in_item = in_item and not line
    return result


def marked(lines: list[str]) -> list[str]:
    """Escape the stars of plain text, and give backquoted text its role; code stays as it is."""
    chunks = VERBATIM.split("".join(f"{line}\n" for line in lines))
    return "".join(fenced(chunk) if i % 2 else plain(chunk) for i, chunk in enumerate(chunks)).splitlines()


def fenced(chunk: str) -> str:
    """Make a directive of a block of Python between fences; return a session of Python as it is."""
    if chunk.lstrip().startswith(">>>"):
        return chunk
    indent, code = re.findall(r"^ *", chunk)[0], "".join(chunk.splitlines(True)[1:-1])
    return f"{indent}.. code-block:: python\n\n{textwrap.indent(code, '    ')}\n"


def plain(text: str) -> str:
    """Mark up plain text. What is named as a source is somebody else's, and no link."""
    paragraphs = re.split(r"(\n\s*\n)", text)
    return "".join(inline(part, "code" if part.lstrip().startswith("Source:") else "lux") for part in paragraphs)


def inline(text: str, role: str) -> str:
    """Escape what is special to reStructuredText, and give backquoted text its role."""
    parts = CODE.split(text)
    for i, part in enumerate(parts):
        escaped = part.replace("\\", "\\\\")
        # Escaped spaces end a role where a letter follows, as in "`x`s"; a file's URL would become a link to nowhere.
        special = re.sub(r"([*|]|_(?!\w)|(?<=\bfile):)", r"\\\1", escaped)
        parts[i] = rf"\ :{role}:`{escaped}`\ " if i % 2 else special
    return "".join(parts)
