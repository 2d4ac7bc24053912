"""The pages of docs/: what they take from elsewhere is there, and their commands are otdd's."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

if not DOCS.is_dir():
    pytest.skip("not run from the sources", allow_module_level=True)

spec = importlib.util.spec_from_file_location("otdd_docs_hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}


def asked(kind):
    found = (re.findall(rf"^<!-- {kind}: (.+) -->$", text, re.M) for text in PAGES.values())
    return [name for names in found for name in names]


def commands():
    """Every line of a page's shell blocks that calls otdd, with its continuations."""
    for page, text in PAGES.items():
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"\botdd ([a-z-]+ .*)", line):
                    yield page, shlex.split(match[1])


@pytest.mark.parametrize("name", hooks.TABLES)
def test_tables_of_the_results(name):
    head, rule, *body = hooks.TABLES[name]().splitlines()
    assert body
    assert {line.count(" | ") for line in [head, rule, *body]} == {head.count(" | ")}


def test_every_table_is_shown():
    assert sorted(asked("figures")) == sorted(hooks.TABLES)


def test_sections_of_the_readme():
    names = asked("readme")
    assert names
    for name in names:
        assert hooks.section(name)
    with pytest.raises(ValueError, match="no single heading 'Nothing'"):
        hooks.section("Nothing")


def test_a_section_ends_at_the_next_heading_but_not_at_a_comment_of_code():
    text = hooks.section("Command line")
    assert "# otdd run --config" in text
    assert "exit code" in text
    assert "OTDiTPipeline" not in text


def test_links_of_the_readme_are_those_of_the_page():
    text = "[notes](benchmarks/NOTES.md)"
    assert hooks.relink(text, "") == "[notes](notes.md)"
    assert hooks.relink(text, "how-to") == "[notes](../notes.md)"


def test_included_files_are_there():
    """And the lines that include them are whole: a formatter may take them for Python."""
    lines = [line for text in PAGES.values() for line in text.splitlines() if line[:3] == "--8"]
    assert lines
    for line in lines:
        match = re.fullmatch(r'--8<-- "(.+)"', line)
        assert match, line
        assert (ROOT / match[1]).is_file()


def test_formulas():
    pytest.importorskip("latex2mathml")
    text = hooks.formulas("a $`x_i`$ and\n\n```math\nx = 1\ny = 2\n```\n")
    assert text.count("<math") == 3
    assert text.count('display="block"') == 2
    assert "$" not in text


def test_commands_have_flags_that_exist():
    from otdd import cli, tools
    from otdd.flags import flags_of

    classes = dict.fromkeys(cli.ABOUT, cli.RunFlags)
    classes |= {name: tools.flags_class(name) for name in cli.TOOLS}
    known = {
        name: {spelling for flag in flags_of(kind) for spelling in flag.spellings()}
        for name, kind in classes.items()
    }
    seen = list(commands())
    assert len(seen) > 10
    for page, (command, *words) in seen:
        flags = {word for word in words if word[:2] == "--"}
        assert flags <= known[command], f"{page}: otdd {command}"


def test_navigation_has_every_page():
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(PAGES)
