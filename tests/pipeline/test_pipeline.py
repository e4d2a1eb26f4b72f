"""Pipelines: the graph, what is run again and what is not, gates, and runs that are killed or stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_posttrain.cli.main import main
from megatron_posttrain.report.collect import json_lines, pipeline
from tests.helpers.launch import ROOT, environment
from tests.helpers.models import make_assets

# A stage that is cheap: writes OUT/text from its words and other files, line by line, and goes on where it was killed.
SCRIPT = """
import json, sys, time
from pathlib import Path
out, seconds, *words = sys.argv[1:]
out = Path(out)
out.mkdir(parents=True, exist_ok=True)
lines = [line for word in words for line in (Path(word).read_text().splitlines() if Path(word).is_file() else [word])]
(out / "text").touch()
done = (out / "text").read_text().splitlines()
for line in lines[len(done):]:
    time.sleep(float(seconds))
    with (out / "text").open("a") as file:
        file.write(line + "\\n")
with (out.parent.parent / "ran").open("a") as file:
    file.write(out.name + "\\n")
(out / "figures.json").write_text(json.dumps({"lines": len(lines), "nested": {"ok": True, "share": 0.25}}))
"""


class Place:
    """A directory with a pipeline of three stages: `second` and `third` take from `first`, `third` from `second`."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.script = directory, directory / "stage.py"
        self.script.write_text(SCRIPT)
        (directory / "data.txt").write_text("a\nb\n")
        self.content: dict[str, Any] = {
            "output": str(directory / "out"),
            "values": {"word": "x", "seconds": 0},
            "stages": {
                "third": self.stage("${first.text} ${second.text}"),
                "second": self.stage("${first.text} ${values.word}"),
                "first": self.stage(str(directory / "data.txt")),
            },
        }

    def stage(self, words: str, **keys: Any) -> dict[str, Any]:
        return {"run": f"{self.script} ${{output}} ${{values.seconds}} {words}", **keys}

    @property
    def file(self) -> Path:
        path = self.directory / "pipeline.yaml"
        path.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return path

    def run(self, *words: str) -> int:
        return main(["pipeline", str(self.file), *words])

    def ran(self) -> list[str]:
        """Names of the stages that ran to their end since the last question."""
        file = self.directory / "ran"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    def text(self, stage: str) -> str:
        return (self.directory / "out" / stage / "text").read_text()

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.directory / "out" / stage / "result.json").read_text())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield Place(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stages_run_in_order_and_again_only_for_other_content(place: Place) -> None:
    assert place.run() == 0
    assert place.ran() == ["first", "second", "third"]
    assert place.text("third") == "a\nb\na\nb\nx\n"
    assert place.result("first")["figures"] == {"lines": 2, "nested.share": 0.25}

    assert place.run() == 0
    assert place.ran() == []

    data = place.directory / "data.txt"
    os.utime(data, (1, 1))
    shutil.copytree(place.directory / "out", place.directory / "moved")
    assert place.run() == 0
    assert place.run(f"output={place.directory / 'moved'}") == 0
    assert place.ran() == []  # other times, another place: the same content

    place.content["values"]["word"] = "y"
    assert place.run() == 0
    assert place.ran() == ["second", "third"]
    assert place.text("third") == "a\nb\na\nb\ny\n"
    assert (place.directory / "out/replaced/third/text").read_text() == "a\nb\na\nb\nx\n"

    data.write_text("a\nc\n")
    assert place.run() == 0
    assert place.ran() == ["first", "second", "third"]

    # A stage that runs again and leaves the same: those after it stay.
    place.content["stages"]["first"] = place.stage("a c")
    assert place.run() == 0
    assert place.ran() == ["first"]

    (place.directory / "out/second/text").write_text("spoilt\n")
    assert place.run() == 0
    assert place.ran() == ["second"]
    assert place.text("second") == "a\nc\ny\n"


def test_a_list_of_values_is_several_words(place: Place) -> None:
    place.content["values"]["words"] = ["${first.text}", "x y", 7]
    place.content["stages"] = {"first": place.stage("a"), "second": place.stage("${values.words}")}
    assert place.run() == 0
    assert place.text("second") == "a\nx y\n7\n"
    assert 0 < place.result("second")["cpu_seconds"] < 60


def test_order_alone_runs_nothing_again(place: Place) -> None:
    place.content["stages"] = {"b": place.stage("b", after=["a"]), "a": place.stage("a")}
    assert place.run() == 0
    place.content["stages"]["a"] = place.stage("other")
    assert place.run() == 0
    assert place.ran() == ["a", "b", "a"]


def test_gates(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.content["stages"]["first"]["gates"] = [{"metric": "lines", "at_least": 2, "at_most": 5}]
    place.content["stages"]["second"]["gates"] = [{"metric": "lines", "at_most": "first", "margin": 0.5}]
    assert place.run() == 1
    assert place.ran() == ["first", "second"]
    said = capsys.readouterr().out
    assert "stage second: gate NOT PASSED: lines 3, at most 2.5 (first has 2, margin 0.5)" in said
    assert place.result("second")["status"] == "gate"
    assert place.result("first")["gates"] == [
        {"text": "lines 2, at least 2", "passed": True},
        {"text": "lines 2, at most 5", "passed": True},
    ]
    place.content["stages"]["second"]["gates"][0]["margin"] = 1.0
    assert place.run() == 0
    assert place.ran() == ["third"]  # what the gate had stopped; the stage itself is done

    place.content["stages"]["third"]["gates"] = [{"metric": "nested.shares", "at_least": 0.1}]
    assert place.run() == 2
    said = capsys.readouterr().err
    assert (
        "stage third has no figure 'nested.shares'; did you mean 'nested.share'? (one of lines, nested.share)" in said
    )


def test_gate_over_the_last_steps(place: Place) -> None:
    place.run()
    with (place.directory / "out/first/metrics.jsonl").open("w") as file:
        for step, loss in enumerate((9.0, 1.0, 2.0)):
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
    place.content["stages"]["first"]["gates"] = [{"metric": "loss", "at_most": 1.5, "steps": 2}]
    assert place.run() == 0
    assert place.result("first")["gates"][0]["text"] == "loss 1.5, at most 1.5"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"a": {"run": "sftt"}}, "stages.a.run: no command 'sftt'; did you mean 'sft'?"),
        ({"a": {"run": "no_such.py"}}, "stages.a.run: no script no_such.py"),
        ({"b": {"run": "data", "runs": "data"}}, "unknown key 'stages.b.runs'; did you mean 'run'?"),
        ({"first": {"run": "data ${frist.x}"}}, "${frist.x}: no stage 'frist'; did you mean 'first'?"),
        ({"a": {"run": "data x", "after": ["bb"]}, "b": {"run": "data x"}}, "stages.a.after: no stage 'bb'"),
        ({"a": {"run": "data ${b.x}"}, "b": {"run": "data ${a.x}"}}, "these stages wait for each other: a, b"),
        ({"a": {"run": "data ${values.wrd}"}}, "${values.wrd} has no value; did you mean 'word'? (one of word, null)"),
        ({"a": {"run": "data ${values.null}"}}, "${values.null} has no value; give values.null=..."),
        ({"a": {"run": "data 'x"}}, "stages.a.run: no closing quotation"),
        ({"a/b": {"run": "data x"}}, "stages.a/b: a name has letters"),
        ({"a": {"run": "data x", "gates": [{"metric": "x"}]}}, "stages.a.gates.0: it asks for nothing"),
        ({"a": {"run": "data x", "gates": [{"metric": "x", "at_most": "z"}]}}, "stages.a.gates: no stage 'z'"),
        ({"a": {"run": "data --jsonn x"}}, "stages.a.run: unrecognized arguments: --jsonn"),
        ({"a": {"run": "evaluate --model m --suite s --limit 3"}}, "--limit would be ignored beside --suite"),
        ({"a": {"run": "curate x --near 7"}}, "stages.a.run: --near 7: "),
        ({"a": {"run": "sft model.path=m data.train=t optimizer.l=1"}}, "unknown key 'optimizer.l'"),
        ({"a": {"run": "sft model.path=m data.train=t output=x"}}, "leave `output` out"),
        ({"a": {"run": "grpo model.path=m data.train=t training.global_batch_size=7"}}, "=7 does not divide"),
        ({"a": {"run": "data x"}, "b": {"run": "data x", "processes": 0}}, "key 'stages.b.processes'"),
    ],
)
def test_refused(place: Place, capsys: pytest.CaptureFixture[str], stages: dict[str, Any], said: str) -> None:
    place.content |= {"stages": stages, "values": {"word": "x", "null": None}}
    assert place.run() == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1
    assert not (place.directory / "out").exists()


def test_what_a_stage_does_not_leave(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.content["stages"]["third"] = place.stage("${first.texts}")
    assert place.run() == 2
    assert "stage first left no" in (said := capsys.readouterr().err)
    assert "did you mean 'text'?" in said
    place.content["stages"]["third"] = place.stage("${first.text}")
    assert place.run() == 0
    assert place.ran() == ["first", "third", "second"]  # the mistake cost nothing


def test_without_what_it_needs_a_stage_is_left_out(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """And those that wait for it; once it is there they run, and nothing else does."""
    place.content["stages"]["second"]["needs"] = str(place.directory / "tool")
    assert place.run("--dry-run") == 0
    assert "2. second: left out: " in capsys.readouterr().out
    assert place.run() == 0
    said = capsys.readouterr().out
    assert f"== stage second: left out: {place.directory}/tool is not here" in said
    assert "== stage third: left out: it waits for second" in said
    assert "done without second, third" in said
    assert place.ran() == ["first"]
    stages = {stage["name"]: stage for stage in pipeline(place.directory / "out")["stages"]}
    assert [stages[n]["status"] for n in ("first", "second", "third")] == ["done", "left out", "left out"]
    assert stages["third"]["reason"] == "it waits for second"
    (place.directory / "tool").touch()
    assert place.run() == 0
    assert place.ran() == ["second", "third"]


def test_a_failed_stage(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.directory / "fails.py").write_text("import sys; print('why'); sys.exit(3)")
    place.content["stages"] = {"a": {"run": "fails.py"}, "b": place.stage("x", after=["a"])}
    assert place.run() == 3
    assert "stage a: failed with status 3" in capsys.readouterr().out
    assert place.result("a")["reason"] == "status 3: why"
    assert place.ran() == []


def test_dry_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.content["stages"]["train"] = {
        "run": "sft model.path=${first} data.train=${first.text} parallel.tensor=2",
        "processes": 3,
    }
    assert place.run("--dry-run", "values.word=z") == 2
    said = capsys.readouterr().out
    assert "1. first: starts" in said
    assert f"out/second 0 {place.directory}/out/first/text z" in said
    assert "4. train: starts, 3 processes" in said
    assert "fail: layout: " in said
    assert not (place.directory / "out").exists()

    del place.content["stages"]["train"]
    assert place.run() == 0
    place.content["values"]["word"] = "y"
    capsys.readouterr()
    assert place.run("--dry-run") == 0
    said = capsys.readouterr().out
    assert "1. first: done, nothing changed" in said
    assert "2. second: runs again, since this changed: arguments" in said
    assert "3. third: runs again if it gets something else from second" in said


def test_one_stage_alone_and_one_that_a_job_runs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.content["stages"]["second"] |= {"nodes": 2, "gates": [{"metric": "lines", "at_least": 4}]}
    assert place.run("--only", "frist") == 2
    assert place.run("--only", "second") == 2
    assert place.run("--only", "first") == 0
    assert place.ran() == ["first"]
    assert place.run("--only", "second") == 2
    assert place.run("--only", "second", "--part", "end") == 2
    assert place.run("--part", "end") == 2
    assert place.run("--only", "first", "--dry-run") == 2
    said = capsys.readouterr().err.splitlines()
    assert "stage second has not begun" in said[3]
    assert "--part is for --only" in said[4]
    assert "--dry-run shows all stages" in said[5]
    assert "--only frist: no such stage; did you mean 'first'?" in said[0]
    assert "stage second waits for first, not done yet" in said[1]
    assert "stages.second.nodes=2: this machine is one" in said[2]
    assert place.run("--only", "second", "--part", "begin") == 0
    out = place.directory / "out"
    subprocess.run([sys.executable, place.script, out / "second", "0", out / "first/text", "x"], check=True)
    assert place.run("--only", "second", "--part", "end") == 1  # its gate
    place.content["stages"]["second"]["gates"][0]["at_least"] = 3
    assert place.run() == 0
    assert place.ran() == ["second", "third"]


def start(place: Place) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "megatron_posttrain", "pipeline", str(place.file)]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_killed_at_any_moment(place: Place) -> None:
    assert place.run() == 0
    whole = {name: place.text(name) for name in place.content["stages"]}
    shutil.rmtree(place.directory / "out")
    place.ran()
    place.content["values"]["seconds"] = 0.15
    rng = random.Random(0)
    for _ in range(6):
        process = start(place)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun with a stage
        time.sleep(rng.random() * 0.4)
        process.kill()
        process.wait()
    time.sleep(0.3)  # a stage dies with its pipeline: nobody writes any more
    before = {name: (place.directory / "out" / name / "text").exists() and place.text(name) for name in whole}
    time.sleep(0.4)
    assert before == {n: (place.directory / "out" / n / "text").exists() and place.text(n) for n in whole}
    assert place.run() == 0
    assert {name: place.text(name) for name in whole} == whole


def test_stop_saves_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training stage in two processes is asked to stop, resumes, and what it made is scored."""
    assets = make_assets(tmp_path)
    place = Place(tmp_path)
    place.content["stages"] = {
        "sft": {
            "run": f"sft --config {tmp_path}/sft.yaml",
            "processes": 2,
            "gates": [{"metric": "loss", "at_most": 9}],
        },
        "score": {"run": f"score --config {tmp_path}/sft.yaml model.path=${{sft.hf}} training.steps=null"},
    }
    config = {
        "model": {"path": str(assets / "model")},
        "parallel": {"tensor": 2},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(assets / "train.jsonl"), "sequence_length": 64},
        "training": {"steps": 20, "global_batch_size": 2, "micro_batch_size": 2},
        "logging": {"tensorboard": False},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    place.content["stages"]["score"]["run"] += " parallel.tensor=1"
    process = start(place)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, "".join(said)
    assert place.result("sft")["status"] == "stopped"
    done = len(list(json_lines(tmp_path / "out/sft/metrics.jsonl")))
    assert 2 <= done < 20
    process = start(place)
    said = [process.communicate()[0]]
    assert process.returncode == 0, said
    assert "== stage sft: goes on after attempt 1" in said[0]
    assert f"resumed after step {done}" in said[0]
    assert [line["step"] for line in json_lines(tmp_path / "out/sft/metrics.jsonl")] == list(range(1, 21))
    assert place.result("score")["status"] == "done"
    assert (tmp_path / "out/score/scores.jsonl").stat().st_size > 0
    environment_file = json.loads((tmp_path / "out/sft/environment.json").read_text())
    assert environment_file["ranks"] == 2
    assert "20 steps" not in environment_file["data"]
    assert environment_file["versions"]["torch"]


@pytest.mark.parametrize("name", ["classic/toy", "deepseek_r1/toy", "qwen3/toy"])
def test_recipes_resolve(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["pipeline", f"examples/recipes/{name}.yaml", "--dry-run", f"output={tmp_path}/out"]) == 0


@pytest.mark.parametrize("recipe", ["classic", "qwen3", "deepseek_r1"])
@pytest.mark.parametrize(("size", "cluster"), [("one_node", "8xH100"), ("many_nodes", "32xH100")])
def test_recipes_fit_what_they_are_for(
    recipe: str, size: str, cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["pipeline", f"examples/recipes/{recipe}/{size}.yaml", "--dry-run", "--assume", cluster]) == 0
    said = capsys.readouterr().out
    fits = re.findall(r"ok: memory: ([\d.]+) of (\d+) GiB", said)
    assert len(fits) >= (2 if recipe == "classic" else 5)
    assert all(float(used) <= 0.9 * float(of) for used, of in fits), "a tenth of the memory is to be spare"
