"""The house keeps its shape: imports point downwards, and the doors open fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "pixcell"
FOUNDATIONS = {"errors", "geometry", "files", "config", "console", "parallel", "provenance"}
BELOW = {
    "cli": {"tasks", "training", "evaluation", "diffusion", "data", "models"},
    "tasks": {"training", "evaluation", "diffusion", "data", "models"},
    "training": {"diffusion", "data", "models"},
    "evaluation": {"diffusion", "data", "models"},
    "diffusion": {"models"},
    "data": set(),
    "models": set(),
}
WITHOUT_TORCH = FOUNDATIONS | {
    "data.backends",
    "data.colour",
    "data.drawn",
    "data.packing",
    "data.published_layout",
    "data.qc",
    "data.slides",
    "data.sources",
    "data.store",
    "data.tiling",
    "data.tissue",
    "cli",
    "tasks.pack",
    "tasks.tile",
    "tasks.training_report",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative imports hide where things come from"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("pixcell.")} - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    room = name_of(path).split(".")[0]
    allowed = FOUNDATIONS if room in FOUNDATIONS else FOUNDATIONS | BELOW[room] | {room}
    upwards = {name for name in imported_rooms(path) if name in FOUNDATIONS | set(BELOW)} - allowed
    assert not upwards, f"{name_of(path)} imports {upwards}, which lie above or beside it"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_what_tile_workers_import_loads_no_torch(module):
    code = f"import sys, pixcell.{module}; print(sorted({{'torch', 'diffusers', 'timm'}} & set(sys.modules)))"
    assert run_python(code) == "[]\n"


def test_import_pixcell_loads_neither_torch_nor_numpy():
    assert run_python("import sys, pixcell; print({'torch', 'numpy'} & set(sys.modules))") == "set()\n"


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom pixcell.cli import main\nsys.argv = ['pixcell', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code).endswith("False\n")


def test_every_public_name_is_where_it_is_said_to_be():
    import pixcell

    for name in pixcell.__all__:
        assert getattr(pixcell, name) is not None


def test_every_module_opens_with_its_idea():
    for path in [*MODULES, *PACKAGE.rglob("__init__.py")]:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path} has no docstring"


def test_no_source_file_needs_two_sittings():
    long = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}
