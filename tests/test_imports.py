"""Each heavy library has one home, and nothing shadows our room `kernels`. (Rooms against rooms: import-linter.)"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("app", "blend", "retriever", "store", "kernels")

# Library -> the only places that may import it.
HOMES = {
    "vllm": ("blend/engines/vllm/*",),
    "faiss": ("retriever/*",),
    "sentence_transformers": ("retriever/*",),
    "lmdb": ("store/*",),
    "zstandard": ("store/codec/*",),
    "fastapi": ("app/*",),
    "starlette": ("app/*",),
    "uvicorn": ("app/*",),
    "typer": ("app/cli/*",),
    "triton": ("kernels/*/triton.py",),
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}


def files() -> list[Path]:
    return [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that `path` imports, at any depth, with their lines; literal `import_module("x")` calls too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node.lineno


def test_there_is_something_to_check() -> None:
    assert len(files()) > 20


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files()
        for name, line in imports(path)
        if name.split(".")[0] == library
        and not any(fnmatch(str(path.relative_to(ROOT)), home) for home in HOMES[library])
    ]
    assert not strays, f"{library} belongs in {', '.join(HOMES[library])}; imported in {', '.join(strays)}"


def test_nothing_is_pickled() -> None:
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files()
        for name, line in imports(path)
        if name.split(".")[0] in PICKLES
    ]
    for path in files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                strays.append(f"{path.relative_to(ROOT)}:{node.lineno} (torch.load)")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                strays.append(f"{path.relative_to(ROOT)}:{node.value.lineno} (allow_pickle)")
    assert not strays, f"pickle runs code from files: {', '.join(strays)}"


def test_the_room_kernels_imports_nothing_at_its_door() -> None:
    found = [name for name, _ in imports(ROOT / "kernels" / "__init__.py") if name != "__future__"]
    assert not found, f"kernels/__init__.py imports {found}"


def test_the_hugging_face_package_kernels_is_not_installed() -> None:
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    pytest.fail(
        f"the Hugging Face package 'kernels' {version} is installed; it has the import name of our room kernels/, and "
        "transformers cannot be imported with both: pip uninstall kernels, then make setup"
    )


@pytest.mark.parametrize("lock", ["cpu.txt", "gpu.txt"])
class TestLock:
    def test_pins_everything_with_hashes(self, lock: str) -> None:
        text = (ROOT / "requirements" / lock).read_text("utf-8")
        pins = re.findall(r"^([A-Za-z0-9._-]+)==\S+( ; .*)? \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M)
        lines = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
        assert len(pins) == len(lines) > 100

    def test_leaves_out_what_breaks_or_shadows(self, lock: str) -> None:
        text = (ROOT / "requirements" / lock).read_text("utf-8")
        names = {re.sub(r"[-_.]+", "-", n).lower() for n in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.M)}
        assert not names & {"kernels", "torch", "torchvision", "torchaudio", "torchcodec"}

    def test_names_no_machine(self, lock: str) -> None:
        text = (ROOT / "requirements" / lock).read_text("utf-8")
        assert not re.findall(r"^--(?:find-links|index-url|extra-index-url|trusted-host).*", text, re.M)
        assert not re.findall(r"\b(?:file|https?)://\S+", text)

    def test_has_every_direct_dependency(self, lock: str) -> None:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        extras = project["optional-dependencies"]
        asked = project["dependencies"] + extras["dev"] + extras[lock.removesuffix(".txt")]
        text = (ROOT / "requirements" / lock).read_text("utf-8").lower()
        for requirement in asked:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert match
            name = match.group().lower()
            assert name == "torch" or f"\n{name}==" in text, f"{name} is not in {lock}: make lock"
