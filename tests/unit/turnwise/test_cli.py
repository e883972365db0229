"""The turnwise command as a user meets it: output, exit codes, and errors of one line."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from turnwise import __version__
from turnwise.cli import main, printable

COMMAND = [sys.executable, "-m", "turnwise"]
GROUPS = {
    "groups": [
        {
            "rollouts": [
                {"scores": [-2, -1, -0.2], "outcome": 1.0},
                {"scores": [-2, -2.1, -1.5], "outcome": 0.4},
            ]
        }
    ]
}


@pytest.fixture(autouse=True)
def _clean_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, no variable that somebody may have set, logging as it was."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("TURNWISE_") or name == "PYTHONUNBUFFERED":
            monkeypatch.delenv(name)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail with exit code 2 and one line; return what the line says."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turnwise: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("turnwise: error: ").rstrip("\n")


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["version"], ["--version"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == f"turnwise {__version__}\n"


def test_config_prints_each_value_with_its_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("turnwise.toml").write_text("[credit]\ngamma = 0.9\n")
    monkeypatch.setenv("TURNWISE_API_TOKEN", "s3cret")

    assert main(["config"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["log_level", "info", "default"] in rows
    assert ["credit.gamma", "0.9", "turnwise.toml"] in rows
    assert ["api_token", "**********", "TURNWISE_API_TOKEN"] in rows

    assert main(["config", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["credit.gamma"] == {"value": 0.9, "source": "turnwise.toml"}
    assert values["credit.norm"] == {"value": None, "source": "default"}
    assert values["api_token"]["value"] == "**********"


def test_config_reads_the_file_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.toml").write_text('log_level = "debug"')

    assert main(["config", "--config", "my.toml"]) == 0
    assert capsys.readouterr().out.startswith("log_level      debug    my.toml\n")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "no command given; `turnwise --help` lists them"),
        (["--hlep"], "unknown argument --hlep; the nearest is --help"),
        (["config", "--jsn"], "unknown argument --jsn; the nearest is --json"),
        (["config", "--js"], "unknown argument --js"),  # no abbreviations
        (["config", "--config"], "argument --config: expected one argument"),
        (["config", "--config", "nowhere"], "nowhere: No such file or directory"),
        (["config", "--config", "/"], "/: Is a directory"),
        (["config", "--config", "a\nb\x1b[31m"], "a\\nb\\x1b[31m: No such file or directory"),
        (["config", "--config", "\udcff"], "\\udcff: No such file or directory"),
        (["credit", "nowhere"], "nowhere: No such file or directory"),
        (["credit", ""], "file: has an empty name"),
    ],
)
def test_a_wrong_call_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert refused(capsys, *argv).startswith(line)


def test_a_word_too_much_is_near_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "version", "now") == "unknown argument now"


def test_an_unknown_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "confg")

    assert line.startswith("argument COMMAND: unknown confg, not one of ")
    assert line.endswith("; the nearest is config")


def test_a_wrong_setting_stops_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNWISE_LOG_LEVL", "debug")

    assert refused(capsys, "config").endswith("the nearest is TURNWISE_LOG_LEVEL")


@pytest.fixture
def _not_root() -> Iterator[None]:
    """Root may read everything, so be nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_a_file_that_may_not_be_read_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "mine.toml"
    path.touch(mode=0)
    main(["config"])  # loads every module while they may be read
    capsys.readouterr()
    request.getfixturevalue("_not_root")

    assert refused(capsys, "config", "--config", str(path)) == f"{path}: Permission denied"


def test_a_message_stays_one_printable_line() -> None:
    assert printable("a\nb\tc\x1b[0m \u2028é") == "a\\nb\\tc\\x1b[0m \\u2028é"


def credit(*argv: str, **environ: str) -> list[float]:
    """Run `turnwise credit -` on GROUPS in a process; return the advantages of all turns."""
    done = subprocess.run(
        [*COMMAND, "credit", "-", *argv],
        input=json.dumps(GROUPS),
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    rollouts = json.loads(done.stdout)["groups"][0]["rollouts"]
    return [value for rollout in rollouts for value in rollout["advantages"]]


def test_credit_takes_its_defaults_from_the_settings() -> None:
    separate = [2.567852, 1.542716, 0.999997, -2.567852, -0.939694, -0.999997]
    joint = [2.468938, 1.472700, 0.996238, -2.468938, -0.606406, -0.563091]
    assert credit() == pytest.approx(separate, abs=1e-6)

    Path("turnwise.toml").write_text('[credit]\nnorm = "joint"\ngamma = 0.9\n')
    assert credit(TURNWISE_CREDIT__GAMMA="1") == pytest.approx(joint, abs=1e-6)
    assert credit("--gamma", "1", "--norm", "separate") == pytest.approx(separate, abs=1e-6)


@pytest.fixture(params=["buffered", "unbuffered"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at home, and as in many a container."""
    if request.param == "unbuffered":
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("argv", [["config"], ["--help"]])
def test_a_reader_that_leaves_early_sees_no_complaint(argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, *argv], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)

    assert (done.returncode, done.stderr) == (141, b"")


@pytest.fixture
def large() -> str:
    """A file whose reply no pipe holds at once."""
    rollouts = ", ".join(['{"scores": [-2, -1], "outcome": 1}'] * 5000)
    Path("large.json").write_text('{"groups": [{"rollouts": [' + rollouts + "]}]}")
    return "large.json"


@pytest.mark.usefixtures("_both_ways")
def test_a_reader_that_leaves_in_the_middle_is_told_by_the_exit_code(large: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "credit", large], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(10) == b'{"groups":'
    process.stdout.close()

    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.usefixtures("_both_ways")
def test_a_reply_that_does_not_fit_is_an_error_and_not_cut_short(large: str) -> None:
    with Path("reply.json").open("wb") as file:
        done = subprocess.run(
            [*COMMAND, "credit", large],
            stdout=file,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
            check=False,
        )

    assert done.stderr == b"turnwise: error: standard output: File too large\n"
    assert done.returncode == 2


@pytest.mark.parametrize("argv", ["version", "--help", "credit -"])
def test_a_closed_standard_output_is_one_line(argv: str) -> None:
    command = f"{sys.executable} -m turnwise {argv} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, input=b"{}", check=False)

    line = b"turnwise: error: standard output is closed\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", line)


def test_a_closed_standard_error_leaves_standard_output_clean() -> None:
    command = f"{sys.executable} -m turnwise credit nowhere 2>&-"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=False)

    assert (done.returncode, done.stdout) == (2, b"")


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # each thread reserves memory
    scores = "0," * (4 * 2**20) + "0"
    Path("large.json").write_text(
        '{"groups": [{"rollouts": [{"scores": [' + scores + '], "outcome": 1}]}]}'
    )
    done = subprocess.run(
        [*COMMAND, "credit", "large.json"],
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (250 * 2**20, 250 * 2**20)),
        check=False,
    )

    line = b"turnwise: error: out of memory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", line)


@pytest.mark.usefixtures("_both_ways")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "config"], stdout=full, stderr=subprocess.PIPE, check=False
        )

    line = b"turnwise: error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_ctrl_c_ends_quietly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*COMMAND, "credit", str(pipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with pipe.open("wb"):  # opens as soon as the command reads
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", b"")
    assert process.returncode == 130


def test_an_ascii_terminal_is_no_error() -> None:
    Path("é.toml").touch()
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    Path("é.toml").write_text('log_level = "debug"')
    done = subprocess.run(
        [*COMMAND, "config", "--config", "é.toml"], env=environ, capture_output=True, check=True
    )

    assert done.stdout.startswith(b"log_level      debug    \\xe9.toml\n")


def test_help_answers_in_half_a_second_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from turnwise.cli import main; main(['--help']);"
        "print(*{'torch', 'numpy', 'pydantic', 'grpc', 'msgspec'} & set(sys.modules), 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"

    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
