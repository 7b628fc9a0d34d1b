"""What is typed reaches the configuration as it was typed, or is refused in words that help."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config.command_line import TEXTS, VERBS
from distill.config.command_line import overrides as in_hydras_words
from distill.config.compose import compose
from distill.config.fingerprint import run_directory
from distill.config.load import from_yaml, to_yaml
from distill.config.outside import DOORS
from distill.config.paths import whole
from distill.config.reference import setting_kinds
from distill.errors import ConfigError, DistillError
from distill.launch.answers import answer
from distill.launch.sweep import list_jobs, read_sweep
from distill.storage.files import write_commented
from distill.storage.paths import expanded

FILE_NAMES = [
    "/data/epoch=3.ckpt", "/data/My Images (2)", "/home/jos\u00e9/imgs", "~/imgs", "/data/[raw]", "/data/R&D", "/a,b",
    "a${b", "$x", "{x}", "1e3", "007", "true", "~", "-x", "--x", "#x", "a: b", "a #b", "%x", " x ", "x\ny", "a==b", ":",
    "'x", "x'", "'a' 'b'", '"a"b"', "a\"b'c", "x\\", "C:\\a b\\c", "\\,", "'a\\'b\"", "choice(a,b)", "[a", "a]",
    "{a:b}", "[a,b]", "(", "@x", "a@b", "+x", "~x", "?", "*", "a;b|c`d!^", "\t", "x\u00a0y", "\u65e5\u672c", "str(3)",
]  # fmt: skip
STRANGE = ("RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")  # of a launcher, and which changes who meets a closed pipe
ANY_DATA = ("data=imagefolder", "data.root=/images")


@pytest.mark.parametrize("name", FILE_NAMES)
def test_the_name_of_a_file_is_taken_as_it_is_typed_and_written_down(name: str) -> None:
    paths = {"data.root", "teacher.weights", "cache.dir", "run.dir"}
    assert paths <= {key for key, kind in setting_kinds().items() if kind in TEXTS}
    config = compose([*ANY_DATA, *(f"{path}={name}" for path in paths)])
    weights = whole(name) if "/" in name else name  # else they may be published ones
    for known in (config, from_yaml(to_yaml(config))):
        found = [known.data.root, known.cache.dir, known.run.dir, known.teacher.weights]
        assert found == [*[whole(name)] * 3, weights if name != "~x" else whole(name)]


def test_every_text_is_taken_as_it_is_typed() -> None:
    checked = {
        "run.tag",
        "finetune.sparsity_scope",
        *(door.setting for door in DOORS),
    }  # part of a name; names of things
    texts = sorted({key for key, kind in setting_kinds().items() if kind in TEXTS} - checked)
    config = compose([*ANY_DATA, *(f"{key}=1e3=[x, y]" for key in texts)])
    for key in texts:
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) in ("1e3=[x, y]", whole("1e3=[x, y]")), key


def test_quotes_of_hydra_null_and_interpolations_mean_what_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/there")
    assert compose([*ANY_DATA, "data.root='/a b'"]).data.root == "/a b"
    assert compose([*ANY_DATA, 'data.root="/a=b"']).data.root == "/a=b"
    assert compose(["data.root=null"]).data.root is None
    assert compose([*ANY_DATA, "data.root=${oc.env:PLACE}/a b"]).data.root == "/there/a b"
    assert compose([*ANY_DATA, "data.root=\\${run}"]).data.root == whole("${run}")


def test_null_is_no_value_for_settings_of_every_kind_that_may_have_none() -> None:
    kinds = [key for key, kind in setting_kinds().items() if kind.endswith("| None") and "." in key]
    assert len(kinds) > 20
    composed = compose(
        [*ANY_DATA, "distill.steps=3", "distill.epochs=null", "distill.clip_norm=NULL", "data.mean=null"]
    )
    assert (composed.distill.epochs, composed.distill.clip_norm) == (None, None)
    assert [in_hydras_words([f"{key}=null"], groups=()) for key in kinds] == [[f"{key}=null"] for key in kinds]


def test_a_keyword_of_the_architecture_that_hydra_cannot_read_is_a_text() -> None:
    options = ("+teacher.options.path=/a=b", "+teacher.options.width=2", "+teacher.options.list=[1,2]")
    assert compose(options).teacher.options == {"path": "/a=b", "width": 2, "list": [1, 2]}


def test_the_last_value_of_a_setting_counts() -> None:
    config = compose(["seed=1", "seed=2", "teacher=resnet50", "teacher=resnet18"])
    assert (config.seed, config.teacher.name) == (2, "resnet18")


def test_a_run_directory_is_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_directory(compose(["run.dir=~/mine"]), {}) == tmp_path / "mine"
    (tmp_path / "mine").mkdir()
    write_commented(tmp_path / "mine" / "resolved.yaml", to_yaml(compose(["seed=5"])))
    again = compose(["run=~/mine"])
    assert (again.seed, run_directory(again, {})) == (5, tmp_path / "mine")
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_commas_separate_values_in_a_sweep_alone() -> None:
    roots = ["/a=b", "/c d", "/e,f", "/(g)"]
    sweep = read_sweep([*ANY_DATA, "data.root=/a=b,/c d,'/e,f',/(g)"])
    assert [compose(job).data.root for job in sweep.jobs] == roots
    assert read_sweep([*ANY_DATA, "data.root=/a=b,/c d,/e\\,f,/(g)"]).jobs == sweep.jobs
    assert [compose(job).teacher.name for job in read_sweep(["teacher=choice(resnet18,resnet50)"]).jobs] == [
        "resnet18",
        "resnet50",
    ]


def test_listed_jobs_of_a_sweep_over_paths_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_jobs([*ANY_DATA, "data.root=/a=b,/c d"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [compose(shlex.split(line)).data.root for line in lines] == ["/a=b", "/c d"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root="], "data.root: got ''; expected a value after the ="),
        (["distill.lr", "0.1"], "distill.lr: got no value; expected distill.lr=0.1, no spaces around the ="),
        (["distill.lr", "=", "0.1"], "distill.lr: got no value; expected distill.lr=VALUE, no spaces"),
        (["data.root=/My", "Images"], "got 'Images'; expected setting=value, .* quoted for the shell"),
        (["--distill.lr=0.1"], "got '--distill.lr=0.1'; expected distill.lr=0.1: settings take no dashes"),
        (["--teacher", "resnet18"], "got '--teacher'; expected teacher=resnet18: settings take no dashes"),
        (["\u2014multirun"], "expected plain dashes, as in -multirun"),
        (["--mulitrun"], "got '--mulitrun'; expected '--multirun' \\(the nearest\\)"),
        (["--info"], "got '--info'; expected setting=value, group=choice, or one of --help"),
        (["reprot", "x"], "got 'reprot'; expected 'report' \\(the nearest\\)"),
        (["~distill.lr"], "got '~distill.lr'; expected distill.lr=VALUE"),
        (["experiment=null"], "experiment: got 'null'; expected a choice; for none, leave experiment= out"),
        (
            ["lr=0.1"],
            "lr: this setting does not exist; expected one of teacher.fit.lr, distill.lr, refine.lr, finetune.lr$",
        ),
        (["run.dir=\udcff"], "run.dir: got .*; expected a name in UTF-8"),
        (["=3"], "command line: got '=3'"),
        (["seed=a=b"], "seed: got 'a=b'; expected an integer"),
        (["data.mean=[1,2"], "data.mean: got '\\[1,2'; expected a list of numbers"),
        (["data=/my/images"], "data: got '/my/images'; expected one of cifar10"),
        (["data.root=${nowhere}"], "data.root: got \"Interpolation key 'nowhere' not found\"; expected .* that names"),
        (["hydra.run.dir=/x"], "hydra.run.dir: got '/x'; expected --multirun beside it: run.dir=PATH says where"),
        (["hydra/launcher=basic"], "hydra/launcher: got 'basic'; expected --multirun beside it"),
    ],
)
def test_a_mistake_is_told_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(DistillError, match=told) as caught:
        compose(words)
    assert "\n" not in str(caught.value)
    assert "ydra.cc" not in str(caught.value)


def test_help_lists_every_command_group_and_flag() -> None:
    told = answer(["seed=1", "--help"]) or ""
    for word in (*VERBS, "--multirun", "--cfg job", "imagefolder", "paper_vgg16_cifar10", "data.root=PATH"):
        assert word in told
    assert max(map(len, told.splitlines())) <= 120


def test_a_part_of_the_configuration_is_shown_as_it_would_be_taken() -> None:
    assert from_yaml(answer(["seed=3", "--cfg", "job"]) or "").seed == 3
    assert answer(["-c", "run", "run.name=a=b"]) == "name: a=b\ndir: null\ntag: null\ncode: null\n"
    assert "submitit" not in (answer(["--cfg=hydra.launcher", "hydra/launcher=basic"]) or "")
    with pytest.raises(ConfigError, match=r"--cfg: got 'jb'; expected 'job' \(the nearest\)"):
        answer(["--cfg", "jb"])
    assert answer(["seed=3"]) is None


def started(*words: str, **streams: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distill", *words]
    environment = {key: value for key, value in os.environ.items() if key not in STRANGE}
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=environment, **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("verb", [*VERBS, "--help"])
def test_every_command_has_help_and_its_reader_may_leave(verb: str) -> None:
    words = [verb] if verb == "--help" else [verb, "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    process = started(*words, stdout=writing)
    os.close(writing)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")


def test_a_job_whose_reader_leaves_goes_on() -> None:
    program = (
        "from distill.reporting import console; import sys; out = console(); [out.print('line') for _ in range(9)];"
        "sys.exit(7)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr.count("\n")) == (7, 1)
    assert done.stderr.startswith("distill: standard output has been closed; what was begun goes on")


def test_text_that_the_terminal_cannot_show_is_escaped() -> None:
    command = [sys.executable, "-m", "distill", "--cfg", "run", "run.name=caf\u00e9"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, b"name: caf\\xe9")


CTRL_C = """
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
from distill.__main__ import main
sys.argv = ["distill", "stage=plan"]
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["hydra", "antlr4", "distill.config.schema"])
@pytest.mark.parametrize("rank", [None, "0"])
def test_ctrl_c_amid_the_first_imports_ends_without_a_word(module: str, rank: str | None, tmp_path: Path) -> None:
    environment = os.environ | ({"RANK": rank, "WORLD_SIZE": "1"} if rank else {})
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C.replace("MODULE", repr(module))],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT if rank else 130, "")
    assert list(tmp_path.iterdir()) == []
