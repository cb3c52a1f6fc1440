"""What is shipped: the packages that are built, and the workflow files that build, test and publish them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import rankkv
from rankkv.models.compat import OLDEST_TRANSFORMERS

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: What semver.org allows, without build metadata, which package indexes refuse.
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?")


def find_tracked(*folders):
    done = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout:
        pytest.skip("not under version control here")
    return done.stdout.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built by the real tools from a copy of what is under version control."""
    for package in ("build", "hatchling"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install "rankkv[dev]"')
    source = tmp_path_factory.mktemp("source")
    for name in find_tracked():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("dist")
    # The wheel comes out of the sdist, as with `make dist`, so the sdist is shown to be complete.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    tracked = {name for name in find_tracked("rankkv") if (ROOT / name).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == tracked
    assert "rankkv/py.typed" in names
    assert any(name.startswith("rankkv/profile/shipped/") and name.endswith(".json") for name in names)


def test_the_wheel_says_what_the_project_says(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == rankkv.__version__
    assert wheel.name == f"rankkv-{rankkv.__version__}-py3-none-any.whl"
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"transformers<6,>={OLDEST_TRANSFORMERS.removesuffix('.0')}" in metadata.get_all("Requires-Dist")


def test_the_sdist_holds_what_its_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        name for name in find_tracked("rankkv", "tests", "docs", "experiments") if (ROOT / name).is_file()
    } <= names
    assert {
        "README.md",
        "README.zh-CN.md",
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        ".ci/run",
        "LICENSE",
    } <= names


def test_the_wheel_alone_works(wheel, tmp_path):
    """Unpacked into an empty folder, with nothing of this repository on the path; `make dist` runs the demo from it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import rankkv
print(rankkv.__file__)
(path,) = (pathlib.Path(rankkv.__file__).parent / "profile" / "shipped").glob("smollm2*.json")
profile = rankkv.RankProfile.load(path)
ranks = [1.0] * len(profile.layer_indices)
print(sum(rankkv.BudgetAllocator().allocate(ranks, total_budget=900).budgets))
from rankkv.cli import main
sys.argv[1:] = ["methods"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    place, total, *methods = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert total == "900"
    assert "  snapkv" in methods


def clean_environment():
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_make_dist(tmp_path):
    """The target itself, in a copy: new environments, and a demo from the installed wheel."""
    for name in find_tracked():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["make", "dist", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(list((tmp_path / "dist").iterdir())) == 2
    assert "torch==" in (tmp_path / "build/release/lock.txt").read_text()
    import json

    bill = json.loads((tmp_path / "build/release/sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert {"rankkv", "torch", "transformers"} <= {component["name"] for component in bill["components"]}
    assert (tmp_path / "build/trial/demo/demo.json").is_file()


def test_versions_are_semantic_and_the_changelog_has_this_one():
    assert VERSION.fullmatch(rankkv.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "semver.org" in changelog
    assert re.search(rf"^## .*\b{re.escape(rankkv.__version__)}\b", changelog, re.MULTILINE)


# -- workflow files --------------------------------------------------------------------------------


def load(path):
    # YAML 1.1 reads the key `on` as True.
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def find_runs(path):
    return [
        step["run"] for job in load(path)["jobs"].values() for step in job.get("steps", []) if "run" in step
    ]


def test_workflows_follow_their_schema():
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip('check-jsonschema is not installed: pip install "rankkv[dev]"')
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "docs.yml", "release.yml", "weekly.yml"}
    # The schema comes with the package, so nothing is fetched.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.github-workflows",
            *map(str, WORKFLOWS),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_run_what_the_project_runs():
    """Nothing is built or tested there in a way that cannot be run here."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w.%-]+):", makefile, re.MULTILINE))
    for path in WORKFLOWS:
        for command in find_runs(path):
            if command.startswith("make "):
                (target,) = command.split()[1:]
                assert target in targets or re.sub(r"\d[\d.]*$", "%", target) in targets, command
            else:
                assert command == "bash .ci/run" or command.startswith("test -f "), command


def test_ci_covers_the_oldest_and_the_newest():
    runs = find_runs(ROOT / ".github" / "workflows" / "ci.yml")
    assert runs == ["bash .ci/run", f"make test-transformers-{OLDEST_TRANSFORMERS}"]
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert f"(torch {pins['torch']}, transformers {pins['transformers']})" in (ROOT / "README.md").read_text()
    pythons = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["newest"]["strategy"]["matrix"][
        "python"
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert (pythons[0], pythons[-1]) == (known[0], known[-1])


def test_workflows_may_write_only_where_they_publish():
    for path in WORKFLOWS:
        workflow = load(path)
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"] <= (350 if path.name == "weekly.yml" else 90)
            assert ("permissions" in job) == (name == "publish")
            assert "secrets." not in str(job)


def test_what_is_installed_is_pinned():
    """Every package that `make setup`, `make docs` or `make dist` names has a version in constraints.txt."""
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    named = {
        re.split(r"[\[<>=~! ]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    makefile = (ROOT / "Makefile").read_text()
    named |= set(
        re.search(r"\.venv-dist/bin/python -m pip install -c constraints\.txt (.+)", makefile)[1].split()
    )
    assert named <= pins
