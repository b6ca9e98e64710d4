"""A section of a Markdown file that a script writes: it stands between two marks."""

from pathlib import Path


def write_section(path: Path, section: str, *, begin: str, end: str, title: str) -> None:
    """Replace the section between the marks, or append one; a new file starts with the title."""
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {title}\n"
    marked = f"{begin}\n{section}{end}\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        behind = rest.partition(end)[2].strip("\n")
        text = before + marked + (f"\n{behind}\n" if behind else "")
    else:
        text = f"{text.rstrip()}\n\n{marked}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
