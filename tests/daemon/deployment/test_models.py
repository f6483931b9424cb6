"""From a name to a directory, and the one clear line where there is none."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from peerllm.builtin import MODEL_DIR
from peerllm.daemon.deployment.described_model import DescribedModel
from peerllm.daemon.deployment.model_files import ModelOnDisk, dtype_of, resolve
from peerllm.daemon.facade import RunOptions
from peerllm.daemon.weights.hub import Repository
from peerllm.errors import ModelError, NotFoundError, UnavailableError
from tests.daemon.house import inspected

NO_GGUF = Path("/nowhere")  # a place for what GGUF files become


def quiet(share):
    pass


@pytest.fixture
def hub_files(monkeypatch):
    """The hub has one file of owner/model."""
    found = Repository("owner/model", "c" * 40, {"model.safetensors": 10})
    monkeypatch.setattr("peerllm.daemon.weights.hub.ask", lambda *_: found)


async def test_builtin_is_in_the_package_and_computes_in_float32():
    assert await resolve("builtin", NO_GGUF, quiet) == MODEL_DIR
    assert dtype_of("builtin", "auto") == "float32"
    assert dtype_of("other", "bfloat16") == "bfloat16"


async def test_a_list_of_tensors_that_others_wrote_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tensors.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tensors\.json, which is for GGUF files"):
        await resolve(str(tmp_path), NO_GGUF, quiet)


@pytest.mark.usefixtures("hub_files")
async def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"config\.json"):
        await resolve(str(tmp_path), NO_GGUF, quiet)
    (tmp_path / "config.json").write_text("{}")
    assert await resolve(str(tmp_path), NO_GGUF, quiet) == tmp_path.resolve()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("peerllm.daemon.deployment.model_files.download", lambda *_: (MODEL_DIR,))
    assert await resolve(tmp_path.name, NO_GGUF, quiet) == MODEL_DIR  # an id, whatever lies in the working directory
    assert await resolve(f"~/{tmp_path.name}", NO_GGUF, quiet) == tmp_path.resolve()


async def test_a_gguf_file_its_parts_and_a_directory_of_them_become_a_model_directory(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "peerllm.daemon.deployment.model_files.model_directory",
        lambda files, cache: seen.append([file.name for file in files]) or cache / "made",
    )
    parts = ["c-00001-of-00002.gguf", "c-00002-of-00002.gguf"]
    (tmp_path / "one").mkdir()
    for name in ("a.gguf", "B.GGUF", *parts, "mmproj-a.gguf", "one/d.gguf", "one/mmproj-d.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    for name in ("a.gguf", "B.GGUF", parts[1], "one"):
        assert await resolve(str(tmp_path / name), tmp_path / "kept", quiet) == tmp_path / "kept" / "made"
    assert seen == [["a.gguf"], ["B.GGUF"], parts, ["d.gguf"]]
    with pytest.raises(ModelError, match="holds several models"):
        await resolve(str(tmp_path), tmp_path, quiet)
    monkeypatch.setenv("HOME", str(tmp_path))
    await resolve("~/a.gguf", tmp_path / "kept", quiet)
    assert seen[-1] == ["a.gguf"]
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match=r"notes\.txt is no \.gguf file"):
        await resolve(str(tmp_path / "notes.txt"), tmp_path, quiet)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    assert await resolve(str(tmp_path), tmp_path / "kept", quiet) == tmp_path, "both: the safetensors"


@pytest.mark.parametrize(
    "name",
    ["/no/such/place", "/x.gguf", "a/b/c", "../up", "", "http://example.com/x", "a..b/c", "owner/", "a/b:", "a/b:../c"],
)
async def test_what_is_neither_a_directory_nor_an_id_goes_nowhere(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(NotFoundError, match="no such directory"):
        await resolve(name, NO_GGUF, quiet)


def answer(kind, status):
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=status))


NoRoute = type("ConnectError", (Exception,), {"__module__": "httpx2"})  # whichever client the hub's library uses


@pytest.mark.parametrize(
    ("raised", "kind", "line"),
    [
        (lambda: answer(hub.GatedRepoError, 403), ModelError, "gated.*HF_TOKEN"),
        (lambda: answer(hub.RepositoryNotFoundError, 404), NotFoundError, "no such model"),
        (lambda: hub.LocalEntryNotFoundError("offline"), UnavailableError, "cannot be reached"),
        (lambda: answer(hub.HfHubHTTPError, 500), UnavailableError, "refuses"),
        (lambda: NoRoute("no route"), UnavailableError, "cannot be reached.*no route"),
        (lambda: OSError(28, "No space left on device"), UnavailableError, "No space left"),
    ],
)
@pytest.mark.parametrize("step", ["ask", "download"])
@pytest.mark.usefixtures("hub_files")
async def test_the_hub_s_refusals_are_one_clear_line(monkeypatch, raised, kind, line, step):
    def refuse(*_, **__):
        raise raised()

    if step == "ask":
        monkeypatch.undo()
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    else:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=line) as caught:
        await resolve("owner/model", NO_GGUF, quiet)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub_files")
async def test_a_download_takes_data_only_and_tells_how_far_it_is(monkeypatch, tmp_path):
    seen = {}

    def download(model, *, tqdm_class, **options):
        seen.update(options, model=model)
        bar = tqdm_class(total=10, name="huggingface_hub.snapshot_download", desc="x", unit="B")
        for _ in range(10):
            bar.update(1)
        bar.close()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_TOKEN", "secret")
    shares = []
    assert await resolve("owner/model", NO_GGUF, shares.append) == tmp_path
    await asyncio.sleep(0)  # what the download's thread told is heard
    assert shares == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert seen["token"] == "secret" and seen["model"] == "owner/model"
    assert not any("py" in pattern or "bin" in pattern for pattern in seen["allow_patterns"])


async def test_a_model_is_named_as_people_do_not_by_its_directory():
    class Around:
        @asynccontextmanager
        async def looked_up(self, model, tell):
            yield ModelOnDisk(Path("/hub/c0ffee"), 0)

        async def inspect(self, *_):
            return inspected("c0ffee", 3)

    described = await DescribedModel(RunOptions("owner/huge"), Around(), lambda *_: None).describe()
    assert described.profile.name == "huge"
