# SPDX-License-Identifier: Apache-2.0
"""Real English technical prose that a fresh machine has: Perl's manual or Python's own docstrings.

A corpus is a list of documents (name, text), one a file. Held-out documents are chosen by a hash
of the name, so the same files are held out on every machine. No network, no torch.
"""

from __future__ import annotations

import ast
import hashlib
import html
import re
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = ("auto", "perl", "python")

# Not prose (a table of contents, of properties, of C macros), or not English.
_SKIPPED_PODS = {"perltoc", "perluniprops", "perlapi", "perlintern"}
_SKIPPED_PODS |= {"perlcn", "perljp", "perlko", "perltw"}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
_HELD_OUT_SHARE = 20  # one file in 20
_RUN = 8  # words; that many in a row are a quotation, not chance

_ENTITIES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/", "amp": "&", "quot": '"'}
_NOTICE = re.compile(r"^(COPYRIGHT|LICEN[CS]E)|^Copyright\b", re.MULTILINE)
_OPENING = re.compile(r"([A-Z])(<<+\s|<)")


class Document(NamedTuple):
    name: str
    text: str


class CorpusError(RuntimeError):
    """The machine has no such text; the message says how to get it."""


def load(source: str, pod_folder: Path | None = None) -> tuple[list[Document], list[Document], str]:
    """(training documents, held-out documents, name of the source that was used).

    source: "perl" (the .pod files of Debian's perl-doc, or of any Perl's pod folder), "python"
    (docstrings of the running interpreter's standard library), or "auto": perl if there, else
    python. Documents come in the order of their names, without repeats of the same text.
    """
    if source == "auto":
        source = "perl" if _pod_files(pod_folder) else "python"
    found = _perl_documents(pod_folder) if source == "perl" else _python_documents()
    seen: set[str] = set()
    documents = []
    for document in sorted(found):
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        if digest not in seen:  # perldelta is the newest perl5*delta again
            seen.add(digest)
            documents.append(document)
    if not documents:
        raise CorpusError(
            f"no text found for the source {source!r}: install it (Debian, Ubuntu: "
            "apt-get install perl-doc), name a folder of .pod files with --pods, "
            "or take --source python"
        )
    training = [d for d in documents if not is_held_out(d.name)]
    held_out = [d for d in documents if is_held_out(d.name)]
    return training, without_repeats(held_out, training), source


def without_repeats(held_out: list[Document], training: list[Document]) -> list[Document]:
    """held_out less every paragraph of which training has more than a quarter.

    Release notes repeat each other, whole paragraphs and sentences: a paragraph goes when more
    than a quarter of its runs of _RUN words occur in training, too.
    """
    known = {run for document in training for run in _runs(document.text)}
    kept = []
    for document in held_out:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            runs = _runs(paragraph)
            if sum(run in known for run in runs) * 4 <= len(runs):
                paragraphs.append(paragraph)
        if paragraphs:
            kept.append(Document(document.name, "\n\n".join(paragraphs)))
    return kept


def _runs(text: str) -> list[int]:
    words = text.split()
    return [hash(tuple(words[i : i + _RUN])) for i in range(len(words) - _RUN + 1)]


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_SHARE == 0


def sample(documents: list[Document], num_bytes: int) -> str:
    """Whole paragraphs from the start of every document, at most num_bytes of UTF-8 in all.

    A document with a licence notice of its own is passed over: an excerpt may not carry it.
    """
    free = [d for d in sorted(documents) if not _NOTICE.search(d.text)]
    queues = [iter(d.text.split("\n\n")) for d in free]
    taken: list[list[str]] = [[] for _ in queues]
    size, open_queues = 0, set(range(len(queues)))
    while open_queues:
        for i in sorted(open_queues):
            paragraph = next(queues[i], None)
            length = 0 if paragraph is None else len(paragraph.encode()) + 2
            if paragraph is None or size + length > num_bytes:
                open_queues.discard(i)
            else:
                taken[i].append(paragraph)
                size += length
    return "".join("\n\n".join(paragraphs) + "\n\n" for paragraphs in taken if paragraphs)


def pod_to_text(pod: str) -> str:
    """Headings, items and running paragraphs of a POD page; one line each, a blank line between.

    Verbatim paragraphs (code), =begin/=for blocks and index entries are left out; formatting
    codes are replaced by what a reader would see.
    """
    lines: list[str] = []
    in_pod, in_block = False, False
    for paragraph in re.split(r"\n[ \t]*\n", pod.replace("\r\n", "\n")):
        paragraph = paragraph.strip("\n")
        command = re.match(r"=(\w+)\s*(.*)", paragraph, re.DOTALL)
        if command:
            name, rest = command[1], command[2]
            in_pod = name != "cut"
            if name == "begin":
                in_block = True
            elif name == "end":
                in_block = False
            elif not in_block and (name.startswith("head") or name == "item"):
                lines.append(re.sub(r"^(\*|\d+\.?)(\s+|$)", "", rest))
        elif in_pod and not in_block and paragraph and not paragraph[0].isspace():
            lines.append(paragraph)
    texts = (" ".join(_plain(line).split()) for line in lines)
    return "\n\n".join(text for text in texts if text)


def _plain(text: str) -> str:
    """text with POD's formatting codes (B<..>, C<< .. >>, L<text|page>, E<gt>) resolved."""
    out: list[str] = []
    position = 0
    while match := _OPENING.search(text, position):
        angles = match[2].strip()
        end = _closing(text, match.end(), len(angles))
        if end is None:  # a stray "A<", as in C code
            out.append(text[position : match.end()])
            position = match.end()
            continue
        out.append(text[position : match.start()])
        out.append(_format(match[1], text[match.end() : end]))
        position = end + len(angles)
    return "".join(out) + text[position:]


def _closing(text: str, start: int, angles: int) -> int | None:
    """Where the closing angle brackets of a code that began before start are."""
    if angles > 1:
        strict = re.compile(rf"\s>{{{angles}}}(?!>)").search(text, start)
        match = strict or re.compile(">" * angles).search(text, start)
        return match.end() - angles if match else None
    depth, i = 1, start
    while i < len(text):
        if nested := _OPENING.match(text, i):
            many = len(nested[2].strip())
            inner = _closing(text, nested.end(), many) if many > 1 else None
            if inner is not None:
                i = inner + many
                continue
            depth, i = depth + 1, nested.end()
            continue
        if text[i] == ">":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def _format(code: str, inner: str) -> str:
    if code in "XZ":
        return ""
    if code == "E":
        return _entity(inner.strip())
    if code == "L":
        label, bar, _ = inner.partition("|")
        if bar:
            return _plain(label)
        if "://" in label:
            return label
        page, slash, section = label.partition("/")
        section = section.strip('"')
        return _plain(f"{section} in {page}" if slash and page else section or page)
    return _plain(inner.strip())


def _entity(name: str) -> str:
    if name in _ENTITIES:
        return _ENTITIES[name]
    if re.fullmatch(r"(0x)?[0-9a-fA-F]+", name):
        base = 16 if name.startswith("0x") else 8 if name.startswith("0") else 10
        try:
            return chr(int(name, base))
        except (ValueError, OverflowError):
            return ""
    return html.unescape(f"&{name};")


def _pod_files(folder: Path | None) -> list[Path]:
    if folder is not None:
        return sorted(folder.rglob("*.pod"))
    if shutil.which("dpkg"):
        listing = subprocess.run(
            ["dpkg", "-L", "perl-doc"], capture_output=True, text=True, check=False
        )
        files = [Path(line) for line in listing.stdout.splitlines() if line.endswith(".pod")]
        files = [file for file in files if file.is_file()]
        if files:
            return sorted(files)
    for pattern in ("share/perl*/*/pod", "share/perl*/pod", "lib/perl5/*/pod", "lib/perl5/pod"):
        for root in (Path("/usr"), Path("/usr/local"), Path("/opt/homebrew")):
            files = sorted(f for d in root.glob(pattern) for f in d.glob("*.pod"))
            if len(files) > 50:  # Debian's perl without perl-doc has a handful
                return files
    return []


def _perl_documents(folder: Path | None) -> Iterator[Document]:
    for file in _pod_files(folder):
        if file.stem not in _SKIPPED_PODS:
            text = pod_to_text(file.read_text(encoding="utf-8", errors="replace"))
            if text:
                yield Document(file.stem, text)


def _python_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if not _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            continue
        if relative.parts[0] == "pydoc_data":
            continue  # topics.py is one dictionary of manual pages, read below
        text = _docstrings(file)
        if text:
            yield Document(relative.with_suffix("").as_posix(), text)
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"topic {name}", _unwrap(text))


def _docstrings(file: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""  # templates that are no Python
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in map(_unwrap, filter(None, found)) if text)


def _unwrap(text: str) -> str:
    """Paragraphs as one line each; indented and prompt-like ones (code) are left out."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        if not paragraph[:1].isspace() and not paragraph.startswith((">>>", "...")):
            kept.append(" ".join(paragraph.split()))
    return "\n\n".join(p for p in kept if p)
