"""From a name to a directory, and the one clear line where there is none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from peerllm.builtin import MODEL_DIR
from peerllm.daemon.deployment.model_files import dtype_of, resolve
from peerllm.errors import ModelError, NotFoundError, UnavailableError


def quiet(share):
    pass


async def test_builtin_is_in_the_package_and_computes_in_float32():
    assert await resolve("builtin", quiet) == MODEL_DIR
    assert dtype_of("builtin", "auto") == "float32"
    assert dtype_of("other", "bfloat16") == "bfloat16"


async def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"config\.json"):
        await resolve(str(tmp_path), quiet)
    (tmp_path / "config.json").write_text("{}")
    assert await resolve(str(tmp_path), quiet) == tmp_path.resolve()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("peerllm.daemon.deployment.model_files.download", lambda *_: MODEL_DIR)
    assert await resolve(tmp_path.name, quiet) == MODEL_DIR  # an id, whatever lies in the working directory
    assert await resolve(f"~/{tmp_path.name}", quiet) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["/no/such/place", "a/b/c", "../up", "", "http://example.com/x", "a..b/c", "owner/"])
async def test_what_is_neither_a_directory_nor_an_id_goes_nowhere(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(NotFoundError, match="no such directory"):
        await resolve(name, quiet)


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
async def test_the_hub_s_refusals_are_one_clear_line(monkeypatch, raised, kind, line):
    def download(*_, **__):
        raise raised()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind, match=line) as caught:
        await resolve("owner/model", quiet)
    assert "\n" not in str(caught.value)


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
    assert await resolve("owner/model", shares.append) == tmp_path
    await asyncio.sleep(0)  # what the download's thread told is heard
    assert shares == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert seen["token"] == "secret" and seen["model"] == "owner/model"
    assert not any("py" in pattern or "bin" in pattern for pattern in seen["allow_patterns"])
