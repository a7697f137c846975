"""Stock nnU-Net finds the trainers after `pip install`; nothing else is changed, broken or left behind.

Every environment is a new venv without pip. Its torch and nnU-Net come from the running environment by plain path lines
of a .pth file: these extend sys.path, but the .pth files in those folders (our own installation there) are not read.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nnunetv2
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nnunet_fratmae", "pretraining", "plans", "nnUNet_raw_conversion")
STARTUP_FILE = "nnunet_fratmae.pth"
DEPENDENCIES = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
OFFLINE = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")

PRINT_VARIABLE = "import os; print(os.environ.get('nnUNet_extTrainer'))"
FIND_TRAINERS = """
import json, sys
import nnunetv2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
files = {name: find(name).__init__.__code__.co_filename for name in sys.argv[1:]}
print("\\n" + json.dumps({"nnunetv2": nnunetv2.__file__, **files}))
"""
USER_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class {name}(nnUNetTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
"""


class Environment:
    """A new venv that borrows the dependencies; `first` are folders that come before them on sys.path."""

    def __init__(self, folder, *first):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        self.site = next(folder.glob("lib/python*/site-packages")).resolve()
        (self.site / "zz_dependencies.pth").write_text("\n".join(map(str, [*first, *DEPENDENCIES])), encoding="utf-8")

    def python(self, *arguments, cwd=None, **variables):
        """stdout and stderr of this environment's Python, which must succeed, in a folder without our sources."""
        dropped = ("PYTHONPATH", "nnUNet_extTrainer")
        env = {name: value for name, value in os.environ.items() if name not in dropped} | variables
        done = subprocess.run(
            [self.bin / "python", *arguments],
            cwd=cwd or self.bin,
            env=env,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr.strip()

    def install(self, *what):
        """`pip install`, although the path lines show pip the running environment's installation."""
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        subprocess.run([*pip, "install", *OFFLINE, "--ignore-installed", *what], check=True)

    def uninstall(self):
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "nnunet-fratmae"], check=True)

    def find(self, *names, **variables):
        """The files of the trainer classes that stock nnU-Net finds, and of nnU-Net itself."""
        lines = self.python("-c", FIND_TRAINERS, *names, **variables)[0].splitlines()
        return {name: Path(file).resolve() for name, file in json.loads(lines[-1]).items()}


def copy_source(folder):
    """What a checkout has, without what building and testing leave in it."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def user_folder(folder, name):
    """A folder as a user of nnUNet_extTrainer has it, with one trainer."""
    folder.mkdir()
    (folder / "trainers_of_mine.py").write_text(USER_TRAINER.format(name=name), encoding="utf-8")
    return folder


def contents(*folders):
    """Every file below the folders, with size and time."""
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files if not path.is_dir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_source(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, source]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel."""
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


def test_wheel_has_every_module_and_the_startup_file_and_no_more_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert "nnunet_fratmae/ext_trainers/fratmae_trainers.py" in modules
    assert modules <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES, STARTUP_FILE}


def test_found_after_installing_the_wheel_and_nothing_is_written_into_nnunet(wheel, tmp_path):
    """Here nnU-Net is a checkout of the user's; in the next test it is the one in site-packages."""
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(nnunetv2.__file__).parent, checkout / "nnunetv2")
    environment, before = Environment(tmp_path / "venv", checkout), contents(checkout)
    environment.install(wheel)
    found = environment.find("FratMAETrainer")
    assert found["nnunetv2"] == checkout / "nnunetv2" / "__init__.py"
    assert found["FratMAETrainer"] == environment.site / "nnunet_fratmae" / "trainer.py"
    assert contents(checkout) == before


def test_found_beside_the_users_own_trainers(installed, tmp_path):
    one, two = user_folder(tmp_path / "one", "TrainerOne"), user_folder(tmp_path / "two", "TrainerTwo")
    found = installed.find("TrainerOne", "TrainerTwo", "FratMAETrainer", nnUNet_extTrainer=f"{one}{os.pathsep}{two}")
    assert found["nnunetv2"] == Path(nnunetv2.__file__).resolve()
    assert [found[name].parent for name in ("TrainerOne", "TrainerTwo")] == [one, two]
    assert found["FratMAETrainer"] == installed.site / "nnunet_fratmae" / "trainer.py"


@pytest.mark.parametrize(
    "before, after", [("", "OURS"), ("A", "A OURS"), ("A B", "A B OURS"), ("A ", "A OURS"), ("OURS A", "OURS A")]
)
def test_users_folders_stay_first_and_nothing_comes_twice(installed, before, after):
    ours = str(installed.site / "nnunet_fratmae" / "ext_trainers")
    before, after = (value.replace(" ", os.pathsep).replace("OURS", ours) for value in (before, after))
    assert installed.python("-c", PRINT_VARIABLE, nnUNet_extTrainer=before) == (after, "")


def test_a_checkout_in_the_working_folder_is_not_hidden_by_the_installation(installed, tmp_path):
    source = copy_source(tmp_path / "source")
    command = "import nnunet_fratmae.discovery as ours, plans; print(ours.__file__, plans.__file__)"
    files = installed.python("-c", command, cwd=source)[0].split()
    assert files == [str(source / "nnunet_fratmae" / "discovery.py"), str(source / "plans" / "__init__.py")]


def test_editable_install_is_found_and_silent_when_its_source_is_gone(tmp_path):
    source, environment = copy_source(tmp_path / "source"), Environment(tmp_path / "venv")
    environment.install("--editable", source)
    assert environment.find("FratMAETrainer")["FratMAETrainer"] == source / "nnunet_fratmae" / "trainer.py"

    source.rename(tmp_path / "moved")
    assert environment.python("-c", PRINT_VARIABLE) == ("None", "")
    message = environment.python("-c", "import torch")[1]
    assert STARTUP_FILE not in message and "editable" not in message


@pytest.mark.parametrize("remains", [{}, {"__init__.py": ""}, {"__init__.py": "no Python"}, {"discovery.py": "1 / 0"}])
def test_startup_is_silent_whatever_is_left_of_the_package(wheel, tmp_path, remains):
    environment = Environment(tmp_path / "venv")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(STARTUP_FILE, environment.site)
    (environment.site / "nnunet_fratmae").mkdir()
    for name, text in remains.items():
        (environment.site / "nnunet_fratmae" / name).write_text(text, encoding="utf-8")
    assert environment.python("-c", PRINT_VARIABLE) == ("None", "")


def test_explicit_way_without_the_startup_file(wheel, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.install(wheel)
    folder = str(environment.site / "nnunet_fratmae" / "ext_trainers")
    assert environment.python("-m", "nnunet_fratmae.discovery") == (folder, "")

    (environment.site / STARTUP_FILE).unlink()
    assert environment.python("-c", PRINT_VARIABLE) == ("None", "")
    assert environment.python("-m", "nnunet_fratmae.discovery") == (folder, "")
    found = environment.find("FratMAETrainer", nnUNet_extTrainer=folder)
    assert found["FratMAETrainer"] == environment.site / "nnunet_fratmae" / "trainer.py"


def test_our_folder_does_not_stop_the_search_in_an_environment_without_us(tmp_path):
    """A variable set by hand in a shell, or inherited by a process of another environment."""
    source, mine = copy_source(tmp_path / "source"), user_folder(tmp_path / "mine", "TrainerOfMine")
    value = os.pathsep.join([str(source / "nnunet_fratmae" / "ext_trainers"), str(mine)])
    found = Environment(tmp_path / "venv").find("TrainerOfMine", nnUNet_extTrainer=value)
    assert found["TrainerOfMine"].parent == mine


def test_a_file_that_is_called_as_a_package_of_ours_does_not_stop_the_search(tmp_path):
    """As a user's plans.py beside his script."""
    (tmp_path / "plans.py").write_text("PLANS = 1\n", encoding="utf-8")
    file = Path(__file__).parents[1] / "nnunet_fratmae" / "ext_trainers" / "fratmae_trainers.py"
    code = f"import runpy; runpy.run_path({str(file)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True
    )
    assert "WARNING: its trainers cannot be used" in done.stderr
    assert f"plans is {tmp_path}/plans.py, rename it" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("editable", [False, True])
def test_uninstalling_leaves_nothing(wheel, tmp_path, editable):
    environment = Environment(tmp_path / "venv")
    before = contents(environment.site, environment.bin)
    environment.install(*(["--editable", copy_source(tmp_path / "source")] if editable else [wheel]))
    assert (environment.site / STARTUP_FILE).is_file()
    assert (environment.bin / "fratmae_pretrain").is_file()
    environment.uninstall()
    assert contents(environment.site, environment.bin) == before
