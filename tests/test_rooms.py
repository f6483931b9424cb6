"""The walls: every import of ours runs along an arrow of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "peerllm"
SHARED = {
    "types", "errors", "byte_spelling", "chat_templates", "codec", "logprobs", "regular_files", "request_ids",
    "reused_layers", "saved_files", "stored_types", "wrapped_models", "__init__",
}  # fmt: skip
ALLOWED = {
    "planner": {"planner"},
    "transport": {"transport"},
    "engine": {"engine", "transport"},
    "daemon": {"daemon", "planner", "transport", "engine.messages", "builtin"},
    "api": {"api", "daemon.facade", "web", "engine.messages", "transport.listening"},
    "web": {"web"},
    "cli": {"cli", "api", "daemon", "builtin", "planner"},
    "builtin": {"builtin"},
}
# Imported only when it is needed: --in-process runs the engine in a thread, the demo asks what its model takes.
LAZY_ENGINE = {"daemon/engine_link/engine_host.py", "cli/demo/demo_memory.py"}

MOST_FILES = 15  # side by side in one folder

# Engine modules that a device with graphs alone runs.
ENGINE = "peerllm.engine.process.runtime, peerllm.engine.process.launch, peerllm.engine.backends"
TORCH = ("torch", "transformers")


def imports(path: Path) -> set[str]:
    """Modules of ours that `path` names, without the package's own name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("peerllm"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("peerllm")}
    return {name.removeprefix("peerllm").removeprefix(".") for name in found} - {""}


def test_imports_follow_the_arrows() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0] if len(relative.parts) > 1 else ""
        for name in imports(path):
            top = name.split(".")[0]
            if top in SHARED or name in {"__version__", "PROTOCOL_VERSION"}:
                continue
            allowed = ALLOWED.get(room, set()) if room else ({"cli"} if relative.name == "__main__.py" else set())
            if top in allowed or any(name.startswith(one) for one in allowed if "." in one):
                continue
            if relative.as_posix() in LAZY_ENGINE and top == "engine":
                continue
            wrong.append(f"{relative} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("modules", "unused"),
    [
        ("peerllm.cli.main, peerllm.daemon.daemon, peerllm.api.server", TORCH),
        (ENGINE, (*TORCH, "aiohttp")),  # an answer waits for an engine that starts anew
    ],
)
def test_only_the_torch_backend_imports_torch(modules: str, unused: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print([m for m in {unused} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_only_the_engine_and_training_import_torch() -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for room in ("planner", "transport", "daemon", "api", "web", "cli")
        for path in sorted((PACKAGE / room).rglob("*.py"))
    ]
    code = (
        "import importlib, sys; sys.modules |= dict.fromkeys(('torch', 'transformers')); "
        "[importlib.import_module(name) for name in sys.argv[1:]]"
    )
    argv = [sys.executable, "-c", code, *modules]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_each_noun_names_one_module_and_one_class() -> None:
    modules, classes = defaultdict(list), defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in {"__init__", "__main__"}:
            modules[path.stem].append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(path)
    for found in (modules, classes):
        assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def test_no_folder_is_crowded() -> None:
    counts = Counter(path.parent for path in PACKAGE.rglob("*.py"))
    assert not {folder: count for folder, count in counts.items() if count > MOST_FILES}


def test_no_imports_run_in_a_circle() -> None:
    """Neither between modules, nor between the folders of a room that stand side by side."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    arrows: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = {f"peerllm.{name}" for name in imports(path)}
        arrows[module] = {name if name in modules else name.rpartition(".")[0] for name in named} - {module}
    tuple(TopologicalSorter(arrows).static_order())  # CycleError names the circle

    folders: dict[str, set[str]] = {}
    for module, named in arrows.items():
        folder = modules[module].parent
        for name in named & set(modules):
            other = modules[name].parent
            if other not in (folder, *folder.parents) and folder not in other.parents:
                folders.setdefault(str(folder), set()).add(str(other))
    tuple(TopologicalSorter(folders).static_order())
