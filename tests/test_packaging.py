"""The rules that no single module can keep: versions, layers, forbidden calls, and what the sdist holds."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cachegen
from tests.fixtures import REPOSITORY as ROOT
from tests.fixtures import SCRIPTS

PACKAGE = ROOT / "src" / "cachegen"

LAYERS = {
    # `cachegen` itself (its version; what it gives of `api` it imports late) and what C++ built stand below everything.
    "__init__": 0,
    "_native": 0,
    "errors": 0,
    "fields": 0,
    "files": 0,
    "config": 0,
    "versions": 0,
    "kv_archive": 0,
    "kv_cache": 0,
    "rotation": 0,
    "states": 0,
    "windows": 0,
    "format": 0,
    "coder": 1,
    "methods": 2,
    "store": 3,
    "device": 3,
    "pipeline": 4,
    "streaming": 5,
    "calibration": 5,
    "simulation": 6,
    "comparison": 6,
    "inspection": 6,
    "api": 6,
    "integrations": 6,
    "command_line": 7,
    "answer_scripts": 7,
    "startup": 7,
    "sweeps": 7,
    "experiments": 7,
    "__main__": 7,
}
"""The layer of each file or folder of src/cachegen; docs in CONTRIBUTING.md."""

MAY_IMPORT_TRANSFORMERS = {"pipeline", "calibration", "comparison"}

SERVING_ENGINES = {"lmcache", "vllm", "sglang", "kvpress"}

SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
SCRIPT_SOURCES = {name: ROOT / name for name in SCRIPTS if (ROOT / name).exists()}


# --- what the checks look at ------------------------------------------------------------------------------------------


def imported_names(name: str, source: str) -> Iterator[str]:
    """Yield each absolute dotted name that the module imports, wherever in the file the import stands.

    `from a import b` yields "a.b", since b may be a module; `name` is the path within src/cachegen.
    """
    folder = ["cachegen", *name.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join(parts + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def called_name(call: ast.Call) -> str:
    """Return the dotted name of what is called, or "" for anything but a name."""
    return ast.unparse(call.func) if isinstance(call.func, ast.Name | ast.Attribute) else ""


def layer_name(name: str) -> str:
    """Return the key of LAYERS for a path within src/cachegen."""
    return name.split("/")[0].removesuffix(".py")


def upward_imports(name: str, source: str) -> list[str]:
    """List the imports from a higher layer than the module's own, or from a module without a layer."""
    own = LAYERS[layer_name(name)]
    wrong = []
    for imported in imported_names(name, source):
        parts = imported.split(".")
        if parts[0] != "cachegen":
            continue
        part = parts[1] if len(parts) > 1 and not parts[1].startswith("__") else "__init__"
        if name == "__init__.py" and part == "api":  # the door: imported when it is first used
            continue
        if LAYERS.get(part, 99) > own:
            wrong.append(imported)
    return wrong


def forbidden_calls(source: str) -> list[str]:
    """List the lines that load a pickle, start a shell or read the environment."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        text = ""
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            name = called_name(node)
            if (
                name.endswith(("pickle.load", "pickle.loads", "Unpickler", "os.system", "os.popen"))
                or (
                    name.endswith("torch.load")
                    and name != "safetensors.torch.load"
                    and keywords.get("weights_only") != "True"
                )
                or keywords.get("weights_only", "True") != "True"
                or keywords.get("shell", "False") != "False"
                or keywords.get("allow_pickle", "False") != "False"
            ):
                text = name
        elif isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb", "putenv"):
            text = ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            banned = {
                "pickle": {"load", "loads", "Unpickler"},
                "torch": {"load"},
                "os": {"environ", "environb", "getenv", "getenvb", "putenv", "system", "popen"},
            }
            if names & banned.get(node.module or "", set()):
                text = ast.unparse(node)
        if text:
            wrong.append(f"line {node.lineno}: {text}")
    return wrong


def named_flags(source: str) -> list[str]:
    """List the strings of a module, docstrings apart, that name a flag of a command line."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    before_values = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    return [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in alone
        and (
            re.search(r"--[a-z]", node.value.replace("build_ext --inplace", ""))
            or (id(node) in before_values and node.value.endswith("--"))
        )
    ]


# --- layers and forbidden calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_has_a_layer(name: str) -> None:
    assert layer_name(name) in LAYERS, f"give src/cachegen/{name} a layer in LAYERS and in CONTRIBUTING.md"


@pytest.mark.parametrize("name", [name for name in SOURCES if layer_name(name) in LAYERS])
def test_a_module_imports_only_from_its_own_layer_or_below(name: str) -> None:
    assert upward_imports(name, SOURCES[name].read_text("utf-8")) == []


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, cachegen; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


@pytest.mark.parametrize("name", [*SOURCES, *SCRIPT_SOURCES])
def test_only_pipeline_calibration_and_comparison_import_transformers(name: str) -> None:
    source = (SOURCES | SCRIPT_SOURCES)[name].read_text("utf-8")
    imports = [imported for imported in imported_names(name, source) if imported.split(".")[0] == "transformers"]
    assert not imports or layer_name(name) in MAY_IMPORT_TRANSFORMERS


@pytest.mark.parametrize("name", [*SOURCES, *SCRIPT_SOURCES])
def test_a_serving_engine_is_imported_only_by_the_module_of_its_name(name: str) -> None:
    source = (SOURCES | SCRIPT_SOURCES)[name].read_text("utf-8")
    engines = {imported.split(".")[0] for imported in imported_names(name, source)} & SERVING_ENGINES
    assert engines <= {name.removeprefix("integrations/").removesuffix(".py")}


@pytest.mark.parametrize("name", [*SOURCES, *SCRIPT_SOURCES])
def test_no_pickle_no_shell_no_environment_variables(name: str) -> None:
    source = (SOURCES | SCRIPT_SOURCES)[name].read_text("utf-8")
    if name == "startup.py":  # sets what a library reads, which reads nothing
        source = source.replace('os.environ.setdefault("OMP_WAIT_POLICY", ', "set_default(")
    assert forbidden_calls(source) == []


@pytest.mark.parametrize("name", ["format/constants.py", "format/framing.py", "format/layout.py"])
def test_the_byte_layouts_import_the_standard_library_only(name: str) -> None:
    siblings = ("cachegen.errors", "cachegen.format")
    for imported in imported_names(name, SOURCES[name].read_text("utf-8")):
        allowed = imported.split(".")[0] in sys.stdlib_module_names or imported.startswith(siblings)
        assert allowed, f"{name} imports {imported}"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("config.py", "from cachegen import methods"),
        ("config.py", "def late():\n    import cachegen.coder.cpu"),
        ("coder/cpu.py", "from ..pipeline.encode import encode"),
        ("coder/cpu.py", "from .. import store"),
        ("methods/base.py", "importlib.import_module('cachegen.pipeline')"),
        ("pipeline/encode.py", "from cachegen.unheard_of import x"),
        ("__init__.py", "def late():\n    from cachegen.pipeline import encode"),
    ],
)
def test_the_layer_check_sees_an_import_from_above(name: str, source: str) -> None:
    assert len(upward_imports(name, source)) == 1


def test_the_layer_check_allows_imports_from_below() -> None:
    source = (
        "import os, torch\nfrom cachegen import __version__, _native\nfrom . import reference\nfrom ..errors import E"
    )
    assert upward_imports("coder/cpu.py", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(stream)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "os.environ.get('X')",
        "from os import environ",
        "os.getenv('X')",
    ],
)
def test_the_call_check_sees_each_forbidden_call(source: str) -> None:
    assert len(forbidden_calls(source)) == 1


@pytest.mark.parametrize("name", [name for name in SOURCES if LAYERS.get(layer_name(name), 0) < 7])
def test_messages_of_the_library_name_no_flags(name: str) -> None:
    """They name parameters in backticks; where there is a flag of that name, the scripts say it instead."""
    assert named_flags(SOURCES[name].read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source", ['raise E("give --profile")', 'raise E(f"--{name} is unknown")', 'f(hint="--a, --b")']
)
def test_the_flag_check_sees_flags(source: str) -> None:
    assert len(named_flags(source)) == 1


def test_the_flag_check_allows_docstrings_and_other_programs_flags() -> None:
    assert (
        named_flags('def f():\n    """The value of --json."""\n    g("python setup.py build_ext --inplace", "a -- b")')
        == []
    )


def test_the_call_check_allows_safe_calls() -> None:
    assert forbidden_calls("torch.load(path, weights_only=True, mmap=True)\nsubprocess.run(['ls'], shell=False)") == []


# --- versions ---------------------------------------------------------------------------------------------------------


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read_requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def read_constraints() -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "tools/constraints.txt").read_text("utf-8").splitlines())
    return read_requirements([line for line in lines if line])


def test_constraints_are_plain_pins() -> None:
    for requirement in read_constraints().values():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "+" not in pin.version and "*" not in pin.version, str(requirement)


def test_constraints_pin_every_requirement_within_its_range() -> None:
    project = read_pyproject()["project"]
    constraints = read_constraints()
    for name, requirement in read_requirements(
        project["dependencies"] + project["optional-dependencies"]["dev"] + read_pyproject()["build-system"]["requires"]
    ).items():
        assert name in constraints, f"tools/constraints.txt does not pin {name}"
        (pin,) = constraints[name].specifier
        assert requirement.specifier.contains(pin.version), f"{pin.version} is outside {requirement}"


def test_env_yml_agrees_with_pyproject() -> None:
    project = read_pyproject()["project"]
    environment = yaml.safe_load((ROOT / "env.yml").read_text("utf-8"))
    (pip_part,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    (python,) = [part for part in environment["dependencies"] if isinstance(part, str) and part.startswith("python")]
    assert environment["name"] == project["name"]
    assert Requirement(python).specifier == Requirement(f"python{project['requires-python']}").specifier
    assert pip_part[-1] == "-e ."
    assert read_requirements(pip_part[:-1]) == read_requirements(project["dependencies"])


def test_the_zoo_runs_on_the_lowest_and_the_newest_transformers() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/zoo.yml").read_text("utf-8"))
    lowest, newest = workflow["jobs"]["zoo"]["strategy"]["matrix"]["transformers"]
    (allowed,) = [line for line in read_pyproject()["project"]["dependencies"] if line.startswith("transformers")]
    assert newest == allowed and lowest == f"{allowed.replace('>=', '==')}.*"


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in SOURCES.values()}
    assert [folder.name for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_test_file_imports_another() -> None:
    paths = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in paths if path.name.startswith("test_")}
    imported = {
        (path.name, part)
        for path in paths
        for name in imported_names(path.name, path.read_text())
        for part in name.split(".")
    }
    assert [pair for pair in imported if pair[1] in tests] == []


def test_sdist_holds_the_native_sources_and_neither_model_nor_prompts_nor_builds(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for folder in ("src", "config", "docs", "models", "tools"):
        shutil.copytree(
            ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so")
        )
    unwanted = (
        "models/tiny/model.safetensors",
        "9k_prompts/0.txt",
        "tests/test_codec.py",
        "data/test_kv_0.pkl",
        "src/cachegen/_native.cpython-311-x86_64-linux-gnu.so",
    )
    for name in unwanted:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"not for the sdist")

    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar"], cwd=tree, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr

    with tarfile.open(tree / "dist" / f"cachegen-{cachegen.__version__}.tar.gz") as archive:
        shipped = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "csrc").rglob("*") if path.is_file()}
    modules = {f"src/cachegen/{name}" for name in SOURCES}
    profile = ROOT / "models/tiny-mistral/profile"
    profiles = {path.relative_to(ROOT).as_posix() for path in profile.rglob("*") if path.is_file()}
    others = {"setup.py", "pyproject.toml", "tools/constraints.txt", "env.yml", "LICENSE"}
    assert native | modules | profiles | others <= shipped
    assert shipped.isdisjoint(unwanted)
