"""The house stands as drawn: contracts hold and can break, a command starts light, the base
install is small, the reference pages are what the code says, and no file knows this machine."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest

from tierline.workload.trace import read_trace

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
HEAVY = ("hypothesis", "jinja2", "numpy", "pyarrow", "scipy", "tomli_w", "torch", "tqdm")


# Import contracts


def lint_imports(source: Path, folder: Path) -> tuple[int, str]:
    """Status and output of the project's contracts over the package in `source`."""
    code = "from importlinter.cli import lint_imports_command as run; run()"
    config = str(ROOT / "pyproject.toml")
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", config, "--no-cache"],
        cwd=source,
        env={"PYTHONPATH": str(source), "HOME": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copied_source(tmp_path: Path) -> Path:
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "data"))
    return source


def add(source: Path, files: dict[str, str]) -> None:
    """Append a line to a module, or make a package of that name with that line."""
    for name, line in files.items():
        path = source / "tierline" / name
        if not name.endswith(".py"):
            path.mkdir(exist_ok=True)
            path = path / "__init__.py"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")


def test_the_contracts_hold(tmp_path: Path) -> None:
    status, output = lint_imports(ROOT / "src", tmp_path)

    assert status == 0, output
    assert f"{len(CONTRACTS['contracts'])} kept, 0 broken" in output


@pytest.mark.parametrize(
    ("files", "broken"),
    [
        ({"base/errors.py": "import tierline.planner"}, "Bands"),  # upwards
        ({"catalog/gpu.py": "import tierline.workload"}, "Bands"),  # between siblings
        ({"engine": "", "kv": "import tierline.engine"}, "Bands"),  # a room to come, upwards
        ({"engine": "", "sim": "import tierline.engine"}, "Bands"),  # two executors never meet
        ({"kv": "", "perf/evidence.py": "import tierline.kv"}, "Bands"),
        ({"helpers": ""}, "Bands"),  # a package that nobody drew
        ({"perf/evidence.py": "import torch"}, "Decisions are pure"),
        ({"planner/finding.py": "import asyncio"}, "Decisions are pure"),
        ({"workload/slo.py": "import socket"}, "Decisions are pure"),
        ({"base/errors.py": "import tierline.base.names"}, "No cycles"),
    ],
)
def test_a_contract_breaks_when_it_is_broken(
    copied_source: Path, tmp_path: Path, files: dict[str, str], broken: str
) -> None:
    add(copied_source, files)
    status, output = lint_imports(copied_source, tmp_path)

    assert status == 1, output
    assert re.search(rf"{broken}.* BROKEN", output), output


def test_rooms_to_come_have_their_place(copied_source: Path, tmp_path: Path) -> None:
    """The counterpart of the table above: what is drawn is allowed."""
    add(
        copied_source,
        {
            "kv": "import tierline.perf",
            "scheduling": "import tierline.kv",
            "engine": "import tierline.scheduling\nimport asyncio",
            "sim": "import tierline.scheduling",
        },
    )
    status, output = lint_imports(copied_source, tmp_path)

    assert status == 0, output


# A light start, a small install


def loaded_by(code: str) -> set[str]:
    """Top-level modules in memory after `code`, in a fresh process."""
    code += "\nimport sys; print(*{m.partition('.')[0] for m in sys.modules})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize(
    "code",
    [
        "import tierline",
        "import tierline.cli; tierline.cli.build_parser().format_help()",
        "import tierline.catalog.gpus, tierline.catalog.models, tierline.catalog.deployment",
    ],
)
def test_starting_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) & set(HEAVY) == set()


def test_loading_something_heavy_is_seen() -> None:
    """Negative control of the test above."""
    assert "numpy" in loaded_by("import tierline, numpy")


def test_the_base_install_is_four_small_packages() -> None:
    """What a user gets, from the metadata of the installed package."""
    base = {
        re.split(r"[<>=!~;\s]", r)[0] for r in requires("tierline") or () if "extra ==" not in r
    }

    assert base == {"jinja2", "numpy", "tomli-w", "tqdm"}


@pytest.mark.slow
def test_the_wheel_holds_everything_a_plan_needs(tmp_path: Path) -> None:
    """Built, unpacked far from the sources, and asked for a plan."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    code = """
import tierline
answer = tierline.plan("llama-3.1-8b", workload="chat", rps=5, slo="ttft_p99=2s", gpus=["l40s"])
print(tierline.__file__, answer.recommended.gpu.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == f"{tmp_path / 'site' / 'tierline' / '__init__.py'} l40s\n", done.stderr


def test_the_package_imports_only_what_it_declares() -> None:
    declared = {"jinja2", "numpy", "tomli_w", "tqdm"}
    extras = {  # by the room that may use them
        "engine": {"gguf", "llguidance", "safetensors", "tokenizers", "torch", "triton"},
        "telemetry": {"opentelemetry", "prometheus_client"},
        "server": {
            *("httptools", "opentelemetry", "orjson", "prometheus_client", "pydantic"),
            *("starlette", "uvicorn", "uvloop"),
        },
    }
    allowed = {*declared, "markupsafe", "tierline", *sys.stdlib_module_names}  # jinja2's own text
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    imported: dict[str, set[str]] = {}
    for file in (ROOT / "src" / "tierline").rglob("*.py"):
        room = file.relative_to(ROOT / "src" / "tierline").parts[0]
        found = code_imports(pattern, file.read_text(encoding="utf-8"))
        imported.setdefault(room, set()).update(found)

    for room, found in imported.items():
        assert found - allowed - extras.get(room, set()) == set(), room
    assert "numpy" in imported["perf"]  # the pattern finds imports at all
    assert "torch" in imported["engine"]


def code_imports(pattern: re.Pattern[str], text: str) -> set[str]:
    """Imported top-level names outside docstrings."""
    return set(pattern.findall(re.sub(r'"""(?:.|\n)*?"""', "", text)))


# The reference pages


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


docs = load_tool("docs")


def test_reference_pages_are_what_the_code_says() -> None:
    assert docs.stale_pages(ROOT / docs.REFERENCE) == []


def test_a_stale_missing_or_orphaned_page_is_found(tmp_path: Path) -> None:
    """Negative control of the test above."""
    docs.write_pages(tmp_path)
    assert docs.stale_pages(tmp_path) == []
    page = tmp_path / "cli.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--slo", "--slos"), encoding="utf-8")
    (tmp_path / "errors.md").unlink()
    (tmp_path / "gone.md").write_text(docs.NOTICE, encoding="utf-8")
    (tmp_path / "other.md").write_text("written by another tool", encoding="utf-8")

    assert docs.stale_pages(tmp_path) == ["cli.md", "errors.md", "gone.md"]


@pytest.mark.parametrize(
    ("language", "text", "works"),
    [
        ("console", "$ echo one two\none two", True),
        ("console", "$ echo one two\none ...", True),
        ("console", "$ echo one \\\n  two\none two\n$ echo three\nthree", True),
        ("console", "$ echo any", True),
        ("console", "$ echo one two\none three", False),
        ("console", "$ false", False),
        ("console", "$ tierline gpus h100-smx\nerror: unknown gpu 'h100-smx'\n\nhint: ...", True),
        ("console", "$ tierline gpus h100-sxm\nerror: ...", False),
        ("python", "assert 1 + 1 == 2", True),
        ("python", "assert 1 + 1 == 3", False),
    ],
)
def test_an_example_works_or_says_what_it_did(language: str, text: str, works: bool) -> None:
    example = docs.Example(where="here", language=language, text=text)
    failure = docs.failure_of(example)

    assert (failure is None) == works, failure


def test_marked_blocks_are_found_and_a_mark_without_a_block_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- run -->\n```console\n$ true\n```\n```console\n$ false\n```\n")
    (found,) = docs.examples_in(page)
    page.write_text("<!-- run -->\nno block\n")

    assert (found.language, found.text) == ("console", "$ true")
    with pytest.raises(AssertionError, match="no block follows"):
        docs.examples_in(page)


@pytest.mark.parametrize(
    ("shown", "recorded"),
    [
        ("$ echo new\nold\n$ echo silent", "$ echo new\nnew\n$ echo silent"),
        ("$ seq 5\n1\n7\n...", "$ seq 5\n1\n2\n..."),  # as many lines as before
        ("$ date\n...:...", "$ date\n...:..."),  # what varies is not written down
    ],
)
def test_recording_writes_what_is_printed_and_nothing_else(
    tmp_path: Path, shown: str, recorded: str
) -> None:
    page = tmp_path / "page.md"
    text = "before\n<!-- run -->\n```console\n{}\n```\nafter\n"
    page.write_text(text.format(shown))
    docs.record_examples(page)

    assert page.read_text() == text.format(recorded)


def test_the_bundled_trace_is_what_its_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("make_example")
    shipped = list(read_trace(tool.OUT))

    assert len(shipped) == tool.REQUESTS
    assert shipped == tool.requests()
    monkeypatch.setattr(tool, "SEED", tool.SEED + 1)
    assert shipped != tool.requests()  # control: the seed decides


@pytest.mark.slow
def test_every_example_in_the_documents_works(capsys: pytest.CaptureFixture[str]) -> None:
    failures = docs.run_examples(ROOT)

    assert failures == 0, capsys.readouterr().out


def test_links_between_documents_lead_somewhere() -> None:
    assert broken_links([ROOT / "CONTRIBUTING.md", *docs.documents(ROOT)]) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """Negative control of the test above."""
    page = tmp_path / "page.md"
    page.write_text("[here](page.md#part), [gone](gone.md), [far](https://example.org/x.md)")

    assert broken_links([page]) == ["page.md: gone.md"]


def broken_links(pages: list[Path]) -> list[str]:
    """Relative links whose file is not there; the part after # is not looked at."""
    found = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file = target.partition("#")[0]
            if file and "://" not in file and not (page.parent / file).exists():
                found.append(f"{page.name}: {file}")
    return found


def test_every_invariant_is_tested_by_a_test_that_exists() -> None:
    page = (ROOT / "docs/internals/invariants.md").read_text(encoding="utf-8")

    assert missing_tests(page) == []
    for entry in page.split("\n## ")[1:]:
        assert "\nTested by   " in entry, entry
        assert "\nControl     " in entry, entry


def test_a_test_that_does_not_exist_is_missed() -> None:
    """Negative control of the test above."""
    page = "`tests/test_house.py::test_not_there`, `tests/test_base.py::test_sizes`"

    assert missing_tests(page) == [
        "tests/test_house.py::test_not_there",
        "tests/test_base.py::test_sizes",  # a part of a name is not a name
    ]


def missing_tests(page: str) -> list[str]:
    """Tests that a page names and no file has."""
    return [
        f"{file}::{name}"
        for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
        if not re.search(rf"def {name}\(", (ROOT / file).read_text(encoding="utf-8"))
    ]


# What a committed file may not know

# Put together from parts, so that this file passes its own test.
FOREIGN = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:wo" r"rk|tm" r"p/w|ro" r"ot|ho" r"me/\w+)/",  # paths of one machine
            r"pypi\.o" r"rg|pythonho" r"sted|index-u" r"rl|registry\.np" r"mjs",  # registry hosts
        ]
    )
)


def committed_texts() -> dict[str, str]:
    """Every text file that git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    texts = {}
    for path in paths:
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content and not content.startswith(b"\x1f\x8b"):
            texts[str(path.relative_to(ROOT))] = content.decode("utf-8")
    return texts


def test_no_committed_file_knows_a_machine_or_a_registry() -> None:
    found = {
        name: m.group() for name, text in committed_texts().items() if (m := FOREIGN.search(text))
    }

    assert found == {}


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("read /wo" + "rk/data", True),
        ("--index-u" + "rl=x", True),
        ("src/wo" + "rkload/trace.py", False),
        ("./wo" + "rk/x", False),
    ],
)
def test_what_counts_as_foreign(text: str, foreign: bool) -> None:
    assert bool(FOREIGN.search(text)) == foreign
