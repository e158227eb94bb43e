"""The house: imports go one way, the front door lists what it opens, importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import swalp

SOURCE = Path(swalp.__file__).parent
# Each module may import only from floors below its own, or from its own package.
FLOORS = [
    {"_kernels", "noise"},
    {"extension"},
    {"_validation", "buffers", "durable", "packed_views"},
    {"formats"},
    {"format_text", "rounding"},
    {"quantize"},
    {"packed", "recipe"},
    {"recipe_text"},
    {"recipes"},
    {"matmul"},
    {"layers"},
    {"convert"},
    {"optim", "summary", "averaging", "batchnorm", "schedules", "export"},
    {"the front door"},
    {"training"},
    {"lab"},
    {"report"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "swalp":
            inner = (node.module or "").split(".")[1:]
            names |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "swalp"]
            names |= {(*module.split("."), "the front door")[1] for module in modules}
    return {name if name in FLOOR else "the front door" for name in names}


def test_imports_go_one_way():
    for path in SOURCE.rglob("*.py"):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for name in imported(path):
            assert name == own or FLOOR[name] < FLOOR[own], f"{path} imports swalp.{name}"
        assert "swalp_command" not in path.read_text(), f"{path} knows of the command line"


def test_all_is_honest():
    public = {name for name in vars(swalp) if not name.startswith("_")}
    submodules = {path.stem for path in SOURCE.iterdir()}
    assert set(swalp.__all__) <= public
    assert public - set(swalp.__all__) <= submodules
    assert list(swalp.__all__) == sorted(swalp.__all__)
    assert swalp.__doc__


def test_import_needs_only_torch_numpy_and_safetensors():
    heavy = ["typer", "rich", "pydantic", "sklearn", "pooch", "matplotlib", "scipy"]
    heavy += ["torch._dynamo"]  # which takes longer than all of swalp
    code = f"import sys, swalp; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
