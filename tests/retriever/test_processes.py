"""Several threads, several processes, and a process that is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retriever.embed import HashEmbedder
from retriever.parse import from_text
from retriever.retriever import Retriever

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from pathlib import Path
from retriever.embed import HashEmbedder
from retriever.parse import from_text
from retriever.retriever import Retriever

retriever = Retriever.open(Path(sys.argv[1]), HashEmbedder(), lambda text: len(text.split()), chunk_tokens=20)
print("open", flush=True)
for line in sys.stdin:
    command, first, last, version = line.split()
    for n in range(int(first), int(last)):
        if command == "delete":
            retriever.delete_document(f"doc{n}")
        else:
            text = "\\n\\n".join(f"number{n} version{version} part{part} " + "word " * 16 for part in range(3))
            retriever.ingest("default", [from_text(text, title=f"Title {n}", document_id=f"doc{n}")])
        print(n, flush=True)
"""


class Child:
    """Another process on the same folder; every line it prints is an acknowledgement."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, command: str, first: int, last: int, version: int = 1) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} {first} {last} {version}\n")
        self.process.stdin.flush()

    def run(self, command: str, first: int, last: int, version: int = 1) -> None:
        self.start(command, first, last, version)
        assert [self.read() for _ in range(first, last)] == [str(n) for n in range(first, last)]

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def open_here(folder: Path) -> Retriever:
    return Retriever.open(folder, HashEmbedder(), lambda text: len(text.split()), chunk_tokens=20)


def found(retriever: Retriever, query: str) -> set[str]:
    by_mode = [
        {hit.document.id for hit in retriever.search(["default"], query, k=3, mode=mode) if query in hit.chunk.text}
        for mode in ("dense", "text")
    ]
    assert by_mode[0] == by_mode[1]
    return by_mode[0]


def test_what_another_process_ingests_replaces_and_deletes_is_seen(tmp_path: Path) -> None:
    with open_here(tmp_path) as retriever:
        retriever.ingest("default", [from_text("number777 here", document_id="mine")])
        assert found(retriever, "number777") == {"mine"}
        child = Child(tmp_path)
        try:
            assert child.read() == "open"
            child.run("put", 0, 3)
            assert found(retriever, "number1") == {"doc1"}
            assert found(retriever, "number777") == {"mine"}
            child.run("put", 1, 2, version=2)
            assert found(retriever, "version2") == {"doc1"}
            assert len(retriever.chunks("doc1")) == 3
            retriever.ingest("default", [from_text("number888 too", document_id="mine2")])
            child.run("delete", 1, 2)
            assert found(retriever, "number1") == set()
            assert found(retriever, "number2") == {"doc2"}
            assert found(retriever, "number888") == {"mine2"}
            assert retriever.check() == []
        finally:
            child.end()


def test_two_processes_may_create_the_folder_and_write_at_once(tmp_path: Path) -> None:
    children = [Child(tmp_path / "new") for _ in range(2)]
    try:
        assert [child.read() for child in children] == ["open", "open"]
        for at, child in enumerate(children):
            child.start("put", 20 * at, 20 * at + 20)
        for at, child in enumerate(children):
            assert [child.read() for _ in range(20)] == [str(n) for n in range(20 * at, 20 * at + 20)]
    finally:
        for child in children:
            child.end()
    with open_here(tmp_path / "new") as retriever:
        assert len(retriever.documents()) == 40
        assert retriever.check() == []


@pytest.mark.parametrize("acknowledged", [0, 3, 11])
def test_killing_the_process_loses_no_acknowledged_document(tmp_path: Path, acknowledged: int) -> None:
    with open_here(tmp_path) as retriever:
        retriever.ingest("default", [from_text(f"old{n}", document_id=f"doc{n}") for n in range(0, 40, 2)])
    child = Child(tmp_path)
    assert child.read() == "open"
    child.start("put", 0, 400)
    seen = [child.read() for _ in range(acknowledged)]
    time.sleep(0.001 * acknowledged)  # somewhere inside the next document
    os.kill(child.process.pid, signal.SIGKILL)
    assert child.process.stdout is not None
    seen += [line.strip() for line in child.process.stdout if line.strip()]
    child.end()
    with open_here(tmp_path) as retriever:
        assert retriever.check() == []
        for n in map(int, seen):
            assert len(retriever.chunks(f"doc{n}")) == 3
            assert "version1" in retriever.document_text(f"doc{n}")
        for info in retriever.documents():
            chunks = retriever.chunks(info.id)
            assert [chunk.text for chunk in chunks] in (
                [f"old{info.id[3:]}"],
                [c.text for c in chunks if "version1" in c.text],
            )
            assert len(chunks) in (1, 3), "old or new, never a mixture"


def test_threads_search_while_others_ingest_and_delete(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    with open_here(tmp_path) as retriever:
        retriever.ingest("default", [from_text("anchor stays", document_id="anchor")])

        def guarded(work: object) -> None:
            try:
                work()  # type: ignore[operator]
            except BaseException as error:
                errors.append(error)

        def ingest(name: str) -> None:
            for n in range(15):
                retriever.ingest("default", [from_text(f"{name} text {n}", document_id=f"{name}{n % 4}")])
                if n % 3 == 0:
                    retriever.delete_document(f"{name}{n % 4}")

        def look() -> None:
            for _ in range(40):
                hits = retriever.search(["default"], "anchor stays", k=3)
                assert hits[0].document.id == "anchor"

        works = [lambda: ingest("left"), lambda: ingest("right"), look, look]
        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert retriever.check() == []
