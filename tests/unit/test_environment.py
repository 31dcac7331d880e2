"""What a machine is told to install: from imports and files to exact requirements."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from mlinfra_sdk.environment import builds, files, wheels
from mlinfra_sdk.environment.indexes import configured_indexes, travelling
from mlinfra_sdk.environment.installed import Sources, closure, optional
from mlinfra_sdk.environment.mirror import Draft, Packages
from mlinfra_sdk.errors import EnvironmentFailed, IndexUnreachable, PackageUnavailable, RequestError
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.namespace.imports import imports_of, modules_of
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.recipe import Platform, Recipe
from mlinfra_sdk.worker.uv import redacted, run_uv
from mlinfra_sdk.worker.versions import platform_here

Install = Callable[..., Path]

HERE = platform_here()
LINUX = HERE.markers | {"sys_platform": "linux", "platform_machine": "x86_64"}
MAC = HERE.markers | {"sys_platform": "darwin", "platform_machine": "arm64"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that distributions can be installed in."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def install(site: Path) -> Install:
    """Makes distributions that look as if they were installed here."""

    def make(
        name: str,
        version: str = "1.0",
        *,
        requires: tuple[str, ...] = (),
        extras: tuple[str, ...] = (),
        modules: tuple[str, ...] = (),
        url: dict[str, object] | None = None,
        pth: str = "",
    ) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Provides-Extra: {it}" for it in extras]
        lines += [f"Requires-Dist: {it}" for it in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        for module in modules:
            path = site / f"{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        record = [f"{module}.py,," for module in modules]
        if pth:
            (site / f"{name}.pth").write_text(pth + "\n")
            record.append(f"{name}.pth,,")
        (info / "RECORD").write_text("\n".join(record))
        if url is not None:
            (info / "direct_url.json").write_text(json.dumps(url))
        return info

    return make


# Imports


def test_imports_are_found_wherever_they_stand() -> None:
    code = """
        import a, b.c as d
        from e.f import g
        def function():
            from h import i
        try:
            import j
        except ImportError:
            j = None
        __import__("k"); importlib.import_module("l.m"); import_module(unknown)
        importlib.import_module(".o", __name__); importlib.import_module("", unknown)
        from . import n
    """
    found = imports_of(ast.parse(textwrap.dedent(code)))
    assert found == {"a", "b.c", "e.f", "e.f.g", "h", "h.i", "j", "k", "l.m"}


def test_cells_tell_what_they_import() -> None:
    magics = "get_ipython().run_cell_magic('time', '', 'import a\\n')\nimport b"
    assert cell_names(magics, {}).imports == {"a", "b"}
    assert cell_names("not python (", {}).imports == set()
    lines = (("matplotlib", "inline"), ("load_ext", "a.b"), ("time", "import c"), ("who", ""))
    magics = "\n".join(f"get_ipython().run_line_magic({name!r}, {it!r})" for name, it in lines)
    assert cell_names(magics, {}).imports == {"matplotlib", "a.b", "c"}


def test_objects_tell_what_they_need() -> None:
    code = compile("import json.decoder\ndef f():\n    import decimal\n", "cell", "exec")
    assert {"json.decoder", "decimal"} <= modules_of([code])
    assert modules_of([Path]) >= {"pathlib"}
    assert "given" in modules_of([ModuleType("given")])


# Distributions


def test_modules_belong_to_distributions(install: Install) -> None:
    install("Pack-Age", modules=("other_name/__init__",))
    install("space-one", modules=("space/one/__init__",))
    install("space-two", modules=("space/two",))
    found = Sources().distributions_for(
        ["other_name.sub", "space.two", "os.path", "no_such_module", "__main__"]
    )
    assert found == {"pack-age": "other_name.sub", "space-two": "space.two"}
    assert Sources().distributions_for(["space"]).keys() == {"space-one", "space-two"}


def test_scripts_are_no_modules(install: Install) -> None:
    info = install("with-script", modules=("with_script",))
    (info / "RECORD").write_text("../../bin/script,,\nwith_script.py,,\n")
    assert Sources().distributions_for([".script", "with_script"]).keys() == {"with-script"}


@pytest.mark.parametrize("backport", [False, True])
@pytest.mark.parametrize("left", [None, "", "Name: half\n", "Version: 1.0\n"])
def test_what_is_half_installed_does_not_hide_the_others(
    install: Install, site: Path, left: str | None, backport: bool
) -> None:
    if backport:  # takes over the looking up, and raises other errors
        pytest.importorskip("importlib_metadata")
    info = install("half", modules=("half",))
    install("whole", modules=("other_name",))
    metadata = info / "METADATA"
    metadata.unlink() if left is None else metadata.write_text(left)
    sources = Sources()
    for _ in range(2):
        assert "whole" in sources.distributions_for(["half", "no_such_module", "other_name"])
    assert optional("half", LINUX) == []
    pins = closure({"half": "", "whole": ""}, LINUX)
    assert pins.keys() - {"half"} == {"whole"}
    assert all(pin.version == "1.0" for pin in pins.values())


def test_modules_of_the_workspace_are_looked_through(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("needed", modules=("needed",))
    install("deep", modules=("deep",))
    work = tmp_path / "work"
    (work / "tools_here" / "inner").mkdir(parents=True)
    (work / "helper_here.py").write_text("def f():\n    import needed\n    import tools_here\n")
    (work / "tools_here" / "__init__.py").write_text("")
    (work / "tools_here" / "inner" / "m.py").write_text("import deep, helper_here\n")
    (work / "tools_here" / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(work))
    found = Sources().distributions_for(["helper_here"])
    assert found == {"needed": "needed", "deep": "deep"}


def test_editable_distributions_are_known_by_their_folder(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "src" / "edited_here.py").write_text("")
    install(
        "edited",
        url={"url": project.as_uri(), "dir_info": {"editable": True}},
        pth=str(project / "src"),
    )
    monkeypatch.syspath_prepend(str(project / "src"))
    assert Sources().distributions_for(["edited_here"]) == {"edited": "edited_here"}
    assert closure({"edited": ""}, LINUX)["edited"].folder == project


@pytest.fixture
def edited(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str], Path]:
    """Makes an editable project with one module, which is found; gives its folder of sources."""

    def make(name: str, module: str, pth: str) -> Path:
        project = tmp_path / name
        path = project / "src" / f"{module}.py"
        path.parent.mkdir(parents=True)
        path.write_text("")
        url = {"url": project.as_uri(), "dir_info": {"editable": True}}
        install(name, url=url, pth=pth.format(src=project / "src"))
        monkeypatch.setattr(sys, "path", [*sys.path, str(project / "src")])
        return project / "src"

    return make


def test_editable_distributions_are_found_by_where_their_modules_are(
    install: Install, edited: Callable[[str, str, str], Path]
) -> None:
    install("used-by-it", modules=("used_by_it",))
    src = edited("by-hook", "hooked/__init__", "import _by_hook_editable")
    install("corp-a", modules=("corp/a/__init__", "corp/deep/a"))
    edited("corp-b", "corp/b/__init__", "{src}")
    edited("corp-c", "corp/deep/c", "{src}")
    modules = ["hooked.part", "corp.b.f", "corp.deep.c"]
    assert Sources().distributions_for(modules) == {
        "by-hook": "hooked.part",
        "corp-b": "corp.b.f",
        "corp-c": "corp.deep.c",
    }
    assert Sources().distributions_for(["corp.a", "corp.deep.a"]).keys() == {"corp-a"}
    (src / "beside_it.py").write_text("import used_by_it")
    assert "used-by-it" in Sources().distributions_for(["beside_it"])


def test_an_environment_inside_an_editable_project_is_not_part_of_it(
    install: Install, site: Path
) -> None:
    url = {"url": site.parent.as_uri(), "dir_info": {"editable": True}}
    install("around", url=url, pth="import _around_editable")
    install("inside", modules=("inside",))
    assert Sources().distributions_for(["inside"]) == {"inside": "inside"}


def test_modules_of_the_workspace_may_have_names_that_distributions_have(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("stray", modules=("stray", "example_here", "space_here/inner"))
    install("needed", modules=("needed",))
    work = tmp_path / "work"
    (work / "space_here").mkdir(parents=True)
    (work / "example_here.py").write_text("import needed")
    (work / "space_here" / "own.py").write_text("from . import other")
    (work / "space_here" / "other.py").write_text("import needed")
    monkeypatch.syspath_prepend(str(work))
    assert Sources().distributions_for(["example_here"]) == {"needed": "needed"}
    assert Sources().distributions_for(["space_here.own"]) == {"needed": "needed"}
    assert Sources().distributions_for(["space_here.inner"]).keys() == {"stray"}


def test_parts_of_a_package_are_found_beside_the_one_that_has_its_name(install: Install) -> None:
    install("meta-here", modules=("meta_here/_bundle",))
    install("meta-here-core", modules=("meta_here/core/__init__",))
    install("meta-here-more", modules=("meta_here/more/deep/__init__",))
    for module, name in (
        ("meta_here.more.deep.it", "meta-here-more"),
        ("meta_here.core", "meta-here-core"),
        ("meta_here._bundle", "meta-here"),
        ("meta_here", "meta-here"),
    ):
        assert Sources().distributions_for([module]) == {name: module}


def test_what_a_build_has_left_in_a_project_is_not_taken_for_the_distribution(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "flat_here.egg-info").mkdir(parents=True)
    (project / "flat_here.egg-info" / "PKG-INFO").write_text("Name: flat-here\nVersion: 1.0\n")
    (project / "flat_here.egg-info" / "top_level.txt").write_text("flat_here\n")
    (project / "flat_here.py").write_text("")
    url = {"url": project.as_uri(), "dir_info": {"editable": True}}
    install("flat-here", url=url, pth=str(project))
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend("")
    assert Sources().distributions_for(["flat_here"]) == {"flat-here": "flat_here"}
    assert closure({"flat-here": ""}, LINUX)["flat-here"].folder == project


def test_what_is_installed_later_is_found(install: Install, site: Path) -> None:
    sources = Sources()
    assert sources.distributions_for(["late"]) == {}
    install("late", modules=("late",))
    assert sources.distributions_for(["late"]) == {"late": "late"}


def test_a_closure_follows_markers_and_extras_of_the_machine(install: Install) -> None:
    install(
        "root",
        requires=(
            "Leaf_One >=1",
            "leaf-mac; sys_platform == 'darwin'",
            "leaf-two[fast]",
            "not-installed; sys_platform == 'linux'",
            "leaf-extra; extra == 'more'",
            "this is no requirement",
        ),
        extras=("more",),
    )
    install("leaf-one", "2.0", requires=("root",))  # a circle
    install("leaf-mac")
    install("leaf-two", requires=("leaf-fast; extra == 'fast'", "leaf-slow; extra == 'slow'"))
    install("leaf-fast", "3.0+cpu")
    install("leaf-slow")
    install("leaf-extra")
    pins = closure({"root": "the cell imports it"}, LINUX)
    assert pins.keys() == {"root", "leaf-one", "leaf-two", "leaf-fast"}
    assert pins["leaf-fast"].asked_by == "leaf-two needs it"
    assert pins["leaf-one"].version == "2.0"
    assert "leaf-mac" in closure({"root": ""}, MAC)
    assert closure({"no-such": ""}, LINUX) == {}


def test_extras_that_are_installed_are_used(install: Install) -> None:
    install(
        "root",
        requires=(
            "engine; extra == 'parquet'",
            "reader; extra == 'docx'",
            "checker; extra == 'testing'",
            "checker; extra == 'tests-gpu'",
            "checker; extra == 'dev3'",
            "always",
            "root",
        ),
        extras=("parquet", "docx", "testing", "tests-gpu", "dev3"),
    )
    install("reader")
    install("engine")
    install("checker")
    install("always")
    assert optional("root", LINUX) == ["engine", "reader"]


# Recipes


def recipe(
    tmp_path: Path, roots: dict[str, str], platform: Platform = HERE
) -> tuple[Recipe, list[Path]]:
    draft = Draft(platform)
    draft.mirror(roots)
    return draft.finish(ChunkStore(tmp_path / "store"), lambda text: None)


def test_the_same_needs_give_the_same_key(install: Install, tmp_path: Path) -> None:
    install("one", modules=("one",))
    info = install("two", modules=("two",))
    first, _ = recipe(tmp_path, {"one": "a", "two": "b"})
    again, _ = recipe(tmp_path, {"two": "other reason", "one": "a"})
    assert first.key == again.key
    assert {"one==1.0", "two==1.0"} <= set(first.requirements)
    assert recipe(tmp_path, {"one": ""})[0].key != first.key
    info.rename(info.with_name("two-2.0.dist-info"))
    text = (info.with_name("two-2.0.dist-info") / "METADATA").read_text()
    (info.with_name("two-2.0.dist-info") / "METADATA").write_text(text.replace("1.0", "2.0"))
    other, _ = recipe(tmp_path, {"one": "", "two": ""})
    assert other.key != first.key and "two==2.0" in other.requirements


def test_a_recipe_has_what_every_kernel_needs(tmp_path: Path) -> None:
    made, paths = recipe(tmp_path, {})
    assert made.python == f"{sys.version_info[0]}.{sys.version_info[1]}"
    (sdk,) = paths
    assert f"mlinfra-sdk @ {{wheels}}/{sdk.name}" in made.requirements
    assert any(line.startswith("ipykernel==") for line in made.overrides)
    assert "uv ; sys_platform == 'never'" in made.overrides
    assert [wheel.file for wheel in made.wheels] == [sdk.name]


def test_builds_follow_the_accelerator(install: Install, tmp_path: Path) -> None:
    install(
        "torchvision", "0.99+cpu", requires=("nvidia-part-cu12==12.1", "plain"), modules=("tv",)
    )
    install("jax", "9.9", modules=("jax",), extras=("cuda12",))
    install("nvidia-part-cu12", "12.1")
    install("plain", "2.0")
    gpu = Platform(LINUX, [], "12.8")
    there, _ = recipe(tmp_path, {"torchvision": "", "jax": ""}, gpu)
    assert {"torchvision==0.99", "plain==2.0"} <= set(there.overrides)
    assert not [line for line in there.overrides if line.startswith("nvidia-part")]
    assert "jax[cuda12]==9.9" in there.requirements
    without, _ = recipe(tmp_path, {"torchvision": "", "jax": ""}, Platform(LINUX))
    assert "jax==9.9" in without.requirements
    assert builds.torch_backend(gpu) == "auto"
    assert builds.torch_backend(Platform(LINUX)) == "cpu"
    assert builds.torch_backend(Platform(MAC)) == ""


@pytest.mark.parametrize(("driver", "build"), [("550.144.03", r"cu12\d"), ("", "cpu")])
def test_the_resolver_asks_for_the_build_that_fits_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, build: str
) -> None:
    """PyTorch's own index is not asked, so that this is the same everywhere: what counts is which
    one uv turns to for the backend that we name."""
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CUDA_DRIVER_VERSION", driver)
    (tmp_path / "torch.in").write_text("torch\n")
    backend = builds.torch_backend(Platform(LINUX, [], "12.4" if driver else ""))
    command = ["pip", "compile", "--no-cache", "--torch-backend", backend, "torch.in"]
    with pytest.raises(IndexUnreachable, match=rf"https://download\.pytorch\.org/whl/{build}/"):
        portal().call(run_uv(command, folder=tmp_path, tell=lambda line: None))


def test_the_wheel_of_the_sdk_is_made_again_when_the_cache_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path))
    content = wheels.of_the_sdk().read_bytes()
    wheels.of_the_sdk().unlink()
    assert wheels.of_the_sdk().read_bytes() == content
    assert wheels.of_the_sdk().is_relative_to(tmp_path)


def test_packages_from_version_control_are_asked_for_by_commit(
    install: Install, tmp_path: Path
) -> None:
    vcs = {"vcs": "git", "commit_id": "abc123"}
    install("checkedout", url={"url": "https://host.test/it.git", "vcs_info": vcs})
    below = {"url": "https://host.test/it.git", "vcs_info": vcs, "subdirectory": "python"}
    install("within", url=below)
    made, _ = recipe(tmp_path, {"checkedout": "", "within": ""})
    assert "checkedout @ git+https://host.test/it.git@abc123" in made.requirements
    at = "git+https://host.test/it.git@abc123#subdirectory=python"
    assert f"within @ {at}" in made.requirements


def test_a_project_that_is_gone_is_explained(install: Install, tmp_path: Path) -> None:
    install("gone", url={"url": (tmp_path / "gone").as_uri(), "dir_info": {"editable": True}})
    with pytest.raises(EnvironmentFailed, match=r"gone was installed from .*not there any more"):
        recipe(tmp_path, {"gone": ""})


def test_what_a_package_was_built_from_need_not_be_there(install: Install, tmp_path: Path) -> None:
    there = tmp_path / "there-1.0-py3-none-any.whl"
    there.write_bytes(b"wheel")
    install("there", url={"url": there.as_uri(), "archive_info": {}})
    install("of-conda", url={"url": "file:///home/conda/feedstock_root/work", "dir_info": {}})
    gone = {"url": (tmp_path / "gone-1.0-py3-none-any.whl").as_uri(), "archive_info": {}}
    install("gone", url=gone)
    made, paths = recipe(tmp_path, {"there": "", "of-conda": "", "gone": ""})
    assert {"of-conda==1.0", "gone==1.0"} <= set(made.requirements)
    assert there in paths


def test_errors_say_who_asks(install: Install, tmp_path: Path) -> None:
    install("root", requires=("leaf",))
    install("leaf", "9.9")
    draft = Draft(HERE)
    draft.mirror({"root": "root.sub is imported"})
    said = EnvironmentFailed("there is no version of leaf==9.9 and you require leaf==9.9")
    explained = draft.explained(said)
    assert "leaf 9.9 is installed here; root needs it." in explained.message
    assert "env=FILE" in explained.hint


# Secrets


def test_credentials_are_not_shown_and_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Failed to fetch: https://user:secret@host.test/simple/ and https://token@other.test"
    assert redacted(said) == "Failed to fetch: https://host.test/simple/ and https://other.test"
    assert redacted("of git+https://user:p@ss@host.test/x") == "of git+https://host.test/x"
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    urls = "named=https://plain.test/simple https://user:secret@host.test/simple file:///here"
    monkeypatch.setenv("UV_INDEX", urls)
    monkeypatch.setenv("UV_EXTRA_INDEX_URL", "http://127.0.0.1:8080/simple https://t@o.test/s")
    assert configured_indexes() == ["https://plain.test/simple"]
    assert configured_indexes(credentials=True) == [
        "https://plain.test/simple",
        "https://user:secret@host.test/simple",
        "https://t@o.test/s",
    ]
    assert "http://127.0.0.1:8080/simple" in configured_indexes(here=True)


def test_indexes_that_pip_is_configured_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("UV_INDEX", "UV_DEFAULT_INDEX", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.test/100%25/simple\n"
        "extra-index-url =\n  https://b.test/simple\n  https://user:secret@c.test/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert configured_indexes() == ["https://a.test/100%25/simple", "https://b.test/simple"]
    assert "https://user:secret@c.test/simple" in configured_indexes(credentials=True)
    config.write_text("no section")
    configured_indexes()


@pytest.mark.parametrize("pip", [True, False])
def test_wheels_come_from_an_index_on_this_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pip: bool
) -> None:
    """To a machine that cannot ask it; with pip in this environment or without."""
    folder = tmp_path / "index" / "simple" / "privy"
    folder.mkdir(parents=True)
    name = "privy-3.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        info = "privy-3.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: privy\nVersion: 3.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{name}">{name}</a>')
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    if not pip:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("UV_INDEX", f"http://127.0.0.1:{server.server_port}/simple")
        recipe = Recipe(".".join(map(str, sys.version_info[:2])), ["privy==3.0"])
        indexes = configured_indexes(here=True)
        _, paths = wheels.fetch(recipe, [], HERE, [], indexes, lambda text: None)
        server.shutdown()
    assert [path.name for path in paths] == [name]


# Files


def test_requirements_files(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "more.txt").write_text("six  # with -r\n-r requirements.txt\n")
    (tmp_path / "limits.txt").write_text("numpy<3\n")
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# a comment\n"
        "pandas >=2,\\\n <4 ; python_version > '3' --hash=sha256:00\n"
        "-r more.txt\n-c limits.txt\n-e project\n./project\n"
        "--index-url https://index.test/simple\n--prefer-binary\n"
    )
    stated = files.read(path)
    assert stated.requirements == ['pandas<4,>=2; python_version > "3"', "six"]
    assert stated.constraints == ["numpy<3"]
    assert stated.projects == [files.Project(tmp_path / "project")] * 2
    assert stated.indexes == ["https://index.test/simple"]
    assert stated.notes == ["requirements.txt: --prefer-binary is not passed to the machine."]


def test_lines_are_read_as_pip_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t0k")
    here = tmp_path / "my project"
    here.mkdir()
    (tmp_path / "base.txt").write_text("six\n", encoding="utf-8-sig")
    path = tmp_path / "requirements.txt"
    path.write_text(
        "-rbase.txt\n"
        "git+https://host.test/one.git@main\n"
        "-e git+https://${TOKEN}@host.test/r.git@v1#egg=two&subdirectory=sub\n"
        "https://host.test/three-1.0-py3-none-any.whl ; python_version > '3'\n"
        "--editable=./my project[dev]\n./my project[a,b] ; python_version > '3'\n"
        f"four[x] @ {here.as_uri()} ; python_version > '3'\n"
        "five @ https://host.test/${NOT_SET}/five.zip\n"
        "--extra-index-url https://${TOKEN}@index.test/simple\n",
        encoding="utf-8-sig",
    )
    stated = files.read(path)
    assert stated.requirements == [
        "six",
        "git+https://host.test/one.git@main",
        "two @ git+https://t0k@host.test/r.git@v1#subdirectory=sub",
        "https://host.test/three-1.0-py3-none-any.whl ; python_version > '3'",
        "five @ https://host.test/${NOT_SET}/five.zip",
    ]
    assert stated.projects == [
        files.Project(here, "[dev]"),
        files.Project(here, "[a,b]", "python_version > '3'"),
        files.Project(here, "[x]", 'python_version > "3"'),
    ]
    assert stated.indexes == ["https://t0k@index.test/simple"]


@pytest.mark.parametrize(
    "line",
    [
        "git+https://SECRET@host.test/r.git@main#egg=not!",
        "-e git+https://SECRET@host.test/r.git#egg=not!",
        "name at https://user:SECRET@host.test/r.whl",
        "-r https://SECRET@host.test/base.txt",
    ],
)
def test_errors_show_no_credentials_of_a_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(line)
    with pytest.raises(RequestError, match=r"://host\.test/") as raised:
        files.read(path)
    assert "SECRET" not in str(raised.value)


def draft_of(path: Path, text: str, platform: Platform = HERE) -> Draft:
    path.write_text(text)
    draft = Draft(platform)
    draft.from_file(path, lambda note: None)
    return draft


@pytest.mark.parametrize("line", ["torch>=2.0", "Torch==2.5.1", "torchvision>=0.1", "transformers"])
def test_builds_of_what_a_file_states_follow_the_accelerator(tmp_path: Path, line: str) -> None:
    draft = draft_of(tmp_path / "requirements.txt", line, Platform(LINUX))
    made, _ = draft.finish(ChunkStore(tmp_path / "store"), lambda text: None)
    assert made.torch == "cpu"


def test_indexes_of_a_file_are_asked(tmp_path: Path) -> None:
    path, store = tmp_path / "requirements.txt", ChunkStore(tmp_path / "store")
    plain = draft_of(path, "torch\n", Platform(LINUX))
    draft = draft_of(path, "--index-url https://user:old@a.test/simple\ntorch\n", Platform(LINUX))
    assert draft.indexes == ["https://user:old@a.test/simple"]
    assert travelling(draft.indexes) == []
    assert travelling(draft.indexes, credentials=True) == draft.indexes
    made, _ = draft.finish(store, lambda text: None)
    assert made == plain.finish(store, lambda text: None)[0]
    assert draft.key(made) != plain.key(made) == made.key
    renewed = draft_of(path, path.read_text().replace("old", "new"), Platform(LINUX))
    assert renewed.key(made) == draft.key(made)
    build = "--extra-index-url https://download.pytorch.org/whl/cu124\ntorch\n"
    draft = draft_of(path, build, Platform(LINUX, [], "12.8"))
    assert draft.finish(store, lambda text: None)[0].torch == "cu124" and draft.indexes == []
    assert draft_of(path, build, Platform(MAC)).finish(store, lambda text: None)[0].torch == ""


def test_indexes_of_a_file_travel_by_the_rule_for_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is asked with those that may travel; what is fetched here is with all."""
    for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "requirements.txt"
    path.write_text("-i https://t@a.test/s\n--extra-index-url https://b.test/s\nsix\n")
    asked: list[list[str]] = []

    class Machine:
        closed = None
        next_id = itertools.count().__next__

        def ask(self, message: object, kind: object) -> Platform:
            return HERE

        def send(self, message: m.Prepare | m.GiveUp) -> Future[object]:
            if isinstance(message, m.Prepare):
                asked.append(message.indexes)
            answer: Future[object] = Future()
            answer.set_exception(PackageUnavailable("six was not found"))
            return answer

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *given: None

    def fetch(*given: Any) -> None:
        asked.append(given[4])
        raise EnvironmentFailed("nor here")

    monkeypatch.setattr(wheels, "fetch", fetch)
    packages = Packages(ChunkStore(tmp_path / "store"), str(path))
    with pytest.raises(PackageUnavailable):
        packages.renew(cast(Any, Machine()), [], cast(Any, Machine()))
    assert asked == [["https://b.test/s"], ["https://t@a.test/s", "https://b.test/s"]]


def test_projects_in_folders_of_one_name_are_all_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(project: Path, name: str, tell: object) -> Path:
        wheel = tmp_path / f"{project.parent.name}_x-1.0-py3-none-any.whl"
        wheel.write_text("")
        return wheel

    monkeypatch.setattr(wheels, "of_project", lambda *given: build(*given))
    for name in "ab":
        (tmp_path / name / "python").mkdir(parents=True)
    draft = draft_of(tmp_path / "requirements.txt", "-e ./a/python[dev]\n-e ./b/python\n")
    made, _ = draft.finish(ChunkStore(tmp_path / "store"), lambda text: None)
    assert {
        "a-x[dev] @ {wheels}/a_x-1.0-py3-none-any.whl",
        "b-x @ {wheels}/b_x-1.0-py3-none-any.whl",
    } <= set(made.requirements)
    assert len(made.wheels) == 3


def test_pyproject_files(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\nname = "x"\ndependencies = ["six>=1"]\n')
    assert files.read(path).requirements == ["six>=1"]
    path.write_text('[project]\nrequires-python = "<3"\n')
    with pytest.raises(RequestError, match=r"is for Python <3, this process has"):
        files.read(path)
    path.write_text('[tool.poetry.dependencies]\nsix = "*"\n')
    with pytest.raises(RequestError, match=r"has no \[project\] table"):
        files.read(path)
    path.write_text('[project]\ndynamic = ["dependencies"]\n')
    with pytest.raises(RequestError, match="dynamic"):
        files.read(path)


def test_indexes_of_a_lock_file_are_asked(tmp_path: Path) -> None:
    packages = {"one": "https://own.test/s", "two": "https://pypi.org/simple"}
    dependencies = ", ".join(f'{{ name = "{name}" }}' for name in packages)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\ndependencies = ["one", "two"]\n'
    )
    (tmp_path / "uv.lock").write_text(
        'version = 1\nrequires-python = ">=3.10"\n'
        '[[package]]\nname = "x"\nversion = "1"\nsource = { virtual = "." }\n'
        f"dependencies = [{dependencies}]\n"
        + "".join(
            f'[[package]]\nname = "{name}"\nversion = "1.0"\nsource = {{ registry = "{index}" }}\n'
            f'sdist = {{ url = "{index}/{name}-1.0.tar.gz", hash = "sha256:{"0" * 64}" }}\n'
            for name, index in packages.items()
        )
    )
    stated = files.read(tmp_path / "uv.lock")
    assert stated.requirements == ["one==1.0", "two==1.0"]
    assert stated.indexes == ["https://own.test/s"]


def test_sources_of_uv_decide_where_a_dependency_is_from(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "pyproject.toml"
    head = '[project]\nname = "x"\ndependencies = ["My_Lib[a]>=1", "six"]\n'
    indexes = (
        '[[tool.uv.index]]\nname = "own"\nurl = "https://own.test/s"\nexplicit = true\n'
        '[[tool.uv.index]]\nurl = "https://all.test/s"\n'
    )

    def stated(source: str) -> files.Stated:
        path.write_text(f"{head}{indexes}[tool.uv.sources]\nmy-lib = {source}\n")
        return files.read(path)

    local = stated('{ path = "mine", editable = true }')
    assert local.projects == [files.Project(tmp_path / "mine", "[a]")]
    assert local.requirements == ["six"] and local.indexes == ["https://all.test/s"]
    git = stated('{ git = "https://h.test/r.git", tag = "v1", subdirectory = "p" }')
    assert git.requirements[0] == "My_Lib[a] @ git+https://h.test/r.git@v1#subdirectory=p"
    own = stated('{ index = "own" }')
    assert own.requirements[0] == "My_Lib[a]>=1"
    assert own.indexes == ["https://own.test/s", "https://all.test/s"]
    for source in ("{ workspace = true }", '[{ path = "mine", marker = "a" }]'):
        with pytest.raises(RequestError, match=r"takes My_Lib from a place in \[tool.uv.sources"):
            stated(source)


def test_conda_files_give_their_pip_part_and_say_so(tmp_path: Path) -> None:
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    path = tmp_path / "environment.yml"
    path.write_text(
        f"dependencies:\n- python={minor}.99=h955ad1f_0\n- pip>=20\n- python-dateutil=2.8\n"
        f"- pip-tools\n- conda-forge::python {minor}\n- pip:\n  - six==1.17.0\n"
    )
    stated = files.read(path)
    assert stated.requirements == ["six==1.17.0"]
    assert "not python-dateutil=2.8, pip-tools" in stated.notes[0]
    for line in ("python=2.7", "python 2.7", "python=2.7.*", "conda-forge::python=2.7", "python<3"):
        path.write_text(f"dependencies:\n- {line}\n")
        with pytest.raises(RequestError, match="is for Python"):
            files.read(path)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("missing.txt", None, "cannot be read"),
        ("setup.cfg", "", "is of no kind that is known"),
        ("requirements.txt", "not a requirement !!\n", "which is no requirement"),
        ("requirements.txt", "-r missing.txt\n", "names missing.txt"),
        ("requirements.txt", "./missing[dev]\n", "asks for ./missing, which is not there"),
        ("requirements.txt", "git+file:///missing\n", "which the machine cannot reach"),
        ("pyproject.toml", "[", "is not valid TOML"),
        ("environment.yml", "a: [", "is not valid YAML"),
        ("environment.yml", "name: x\n", "has no list of dependencies"),
        ("uv.lock", "[", "is not valid TOML"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, text: str | None, complaint: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=complaint):
        files.read(tmp_path / name)


def test_files_in_other_encodings_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("six\n", encoding="utf-16")
    with pytest.raises(RequestError, match="is not text in UTF-8"):
        files.read(path)
