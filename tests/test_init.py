"""The package's front: names resolve when used, importing loads nothing heavy and patches nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import rankkv

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets", "typer", "rich")


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    use = "import sys, rankkv; dir(rankkv)"
    code = f"{use}; print(rankkv.__version__, [n for n in {HEAVY} if n in sys.modules])"
    assert run_python(code) == f"{rankkv.__version__} []"


@pytest.mark.parametrize("name", rankkv.__all__)
def test_every_public_name_resolves_to_its_home(name: str) -> None:
    value = getattr(rankkv, name)
    if name != "__version__":
        assert value is getattr(importlib.import_module(rankkv._HOME_OF[name]), name)
        assert value.__name__ == name
        assert value.__doc__


def test_dir_lists_what_can_be_imported() -> None:
    assert set(rankkv.__all__) <= set(dir(rankkv))
    assert sorted(rankkv.__all__) == sorted(set(rankkv.__all__))
    assert set(rankkv._HOME_OF) | {"__version__"} == set(rankkv.__all__)
    namespace: dict[str, object] = {}
    exec("from rankkv import *", namespace)
    assert set(rankkv.__all__) <= set(namespace)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'rankkv' has no attribute 'compress_all'"):
        _ = rankkv.compress_all
    with pytest.raises(ImportError, match="compress_all"):
        exec("from rankkv import compress_all")


def test_importing_everything_patches_nothing() -> None:
    """Attention functions, generation and caches of transformers are the same objects before and after."""
    code = """
import inspect, pkgutil, importlib
import torch, transformers
from transformers import AttentionInterface, cache_utils, masking_utils, modeling_utils
from transformers.generation import GenerationMixin
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

def snapshot():
    seen = {("attention", name): AttentionInterface()[name] for name in AttentionInterface().valid_keys()}
    for module in (cache_utils, masking_utils, modeling_utils, modeling_llama, modeling_gpt_neox):
        for name, value in vars(module).items():
            seen[module.__name__, name] = value
            if inspect.isclass(value):
                seen |= {(module.__name__, name, member): item for member, item in vars(value).items()}
    seen |= {("GenerationMixin", name): item for name, item in vars(GenerationMixin).items()}
    seen["sdpa"] = torch.nn.functional.scaled_dot_product_attention
    return seen

before = snapshot()
import rankkv
for module in pkgutil.walk_packages(rankkv.__path__, "rankkv."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in rankkv.__all__:
    getattr(rankkv, name)
after = snapshot()
changed = [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]
print(len(before) > 100, changed)
"""
    assert run_python(code) == "True []"


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert rankkv.__version__ == version("rankkv")
