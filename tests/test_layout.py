"""Rules of the tree that no linter knows: names that would shadow, literals, budgets."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    # Budgets of source lines, docstrings not counted (docs/decisions raise them).
    "crds/btx_api": 1600,
    "operator/btx_operator": 4720,
    "trainer_image/btx_trainer": 7170,
}
SOURCES = [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
CORE = ("reconcile", "decide", "attempts", "methods")


def code_lines(path: Path) -> int:
    """Lines of a file; docstrings, imports and blank lines do not count (decision 0004)."""
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and number not in left_out for number, line in lines)


def functions() -> list[tuple[str, int, int]]:
    """(where, lines without docstring, nesting) of every function."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    lines -= (first.end_lineno or first.lineno) - first.lineno + 1
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found.append((where, lines, nesting(node)))
    return found


def nesting(node: ast.AST) -> int:
    """Deepest block within a function, nested functions not counted."""
    blocks = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match
    depths = [0]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        # `elif` is an If in the orelse of an If: the same depth for a reader.
        chained = isinstance(node, ast.If) and child in node.orelse and isinstance(child, ast.If)
        depths.append(nesting(child) + (isinstance(child, blocks) and not chained))
    return max(depths)


def test_no_package_shadows_the_standard_library() -> None:
    """`operator/__init__.py`, `tests/operator/__init__.py` and a module `queue` break Python."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()

    assert [name for name in tracked if re.search(r"(^|/)operator/__init__\.py$", name)] == []
    assert [name for name in tracked if re.match(r"tests/.*__init__\.py$", name)] == []
    assert [name for name in tracked if name.endswith("/queue.py")] == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_packages_stay_within_their_budget(folder: str) -> None:
    """A package over its budget of lines needs a decision note, not a quiet rise."""
    total = sum(code_lines(path) for path in (ROOT / folder).rglob("*.py"))

    assert total <= PACKAGES[folder]


def test_files_stay_within_their_budgets() -> None:
    """500 lines a file, 200 in the engine's core, 100 in a stage."""
    over = []
    for path in SOURCES:
        limit = 500
        if path.stem in CORE:
            limit = 200
        elif path.parent.name == "stages":
            limit = 100
        if code_lines(path) > limit:
            over.append(f"{path.relative_to(ROOT)}: {code_lines(path)} > {limit}")

    assert over == []


def test_functions_stay_short_and_flat() -> None:
    """90 % of functions have at most 40 lines, none more than 80; nesting is at most 3."""
    found = functions()
    lines = sorted(size for _, size, _ in found)

    assert lines[int(0.9 * (len(lines) - 1))] <= 40
    assert [where for where, size, _ in found if size > 80] == []
    assert [where for where, _, depth in found if depth > 3] == []


def test_shared_names_are_written_once() -> None:
    """Names that two processes share stand in names.py only."""
    literals = ("BTX_TASK", "BTX_SETTINGS", "btx.dev/", "manifest.json")
    names = ROOT / "crds/btx_api/names.py"
    found = [
        f"{path.relative_to(ROOT)}: {node.value!r}"
        for path in SOURCES
        if path != names
        for node in constants(path)
        if any(literal in str(node.value) for literal in literals)
    ]

    assert found == []


def constants(path: Path) -> list[ast.Constant]:
    """String constants of a file that are not docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_every_module_and_public_name_says_what_it_is() -> None:
    """Modules, public classes and public functions have docstrings."""
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            silent.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            # Enums of one word per value explain themselves where they are used.
            enum = isinstance(node, ast.ClassDef) and "StrEnum" in ast.dump(node)
            if public and not enum and node.name[0] != "_" and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")

    assert silent == []


def test_no_file_names_this_machine_or_a_download_address() -> None:
    """Nothing tracked holds a lock file's address or a path of the machine it was made on."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    hosts = re.compile(r"files\.pythonhosted|pypi\.org|registry\.npmjs|/root/|/work/" "main")
    found = [
        name
        for name in tracked
        if (ROOT / name).is_file()
        and name != "tests/test_layout.py"
        and hosts.search((ROOT / name).read_text(errors="replace"))
    ]

    assert found == []


def test_nothing_can_read_a_pickle() -> None:
    """No module that unpickles is imported, and no reader is called that might."""
    modules = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    readers = {"torch.load", "np.load", "numpy.load", "pd.read_pickle"}
    found = []
    for path in [*SOURCES, *sorted((ROOT / "examples").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            if set(names) & modules or (
                isinstance(node, ast.Call) and ast.unparse(node.func) in readers
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
