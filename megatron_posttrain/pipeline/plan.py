"""What a pipeline would do, and what can be said of its stages before they run."""

import shlex
from collections.abc import Iterator

from megatron_posttrain.config.schema import Config
from megatron_posttrain.pipeline.graph import Pipeline, Stage
from megatron_posttrain.pipeline.hashes import Hashes
from megatron_posttrain.pipeline.run import RESULT, depends_on, reason_to_run
from megatron_posttrain.report.collect import read_json


def show(pipeline: Pipeline, assume: str | None) -> int:
    """Prints every stage in order. Exit status: 0, or 2 when a check failed."""
    hashes, changed, failed = Hashes(pipeline.output / ".hashes.json"), set[str](), False
    left_out = pipeline.left_out
    for number, stage in enumerate(pipeline.stages.values(), 1):
        if stage.name in left_out:
            print(f"{number}. {stage.name}: left out: {left_out[stage.name]}")
            continue
        waits = [other for other in stage.after if other in changed]
        result = read_json(stage.directory / RESULT)
        why = reason_to_run(stage, depends_on(pipeline, stage, hashes), result, hashes)
        if waits and not why:
            why = f"runs again if it gets something else from {', '.join(waits)}"
        if why:
            changed.add(stage.name)
        processes = f", {stage.config.processes} processes" if stage.config.processes > 1 else ""
        processes += f" on each of {stage.config.nodes} nodes" if stage.config.nodes > 1 else ""
        print(f"{number}. {stage.name}: {why or 'done, nothing changed'}{processes}")
        print(f"   {shlex.join([stage.command, *pipeline.line(stage)])}")
        for gate in stage.config.gates:
            for words, bound, _ in gate.bounds:
                print(f"   gate: {gate.metric} {words} {bound}" + f", margin {gate.margin:g}" * isinstance(bound, str))
        for status, text in _checks(pipeline, stage, assume) if why and stage.job is not None else ():
            failed |= status == "fail"
            print(f"   {status}: {text}")
    return 2 if failed else 0


def _checks(pipeline: Pipeline, stage: Stage, assume: str | None) -> Iterator[tuple[str, str]]:
    """The doctor's lines about a training stage; what is made by an earlier stage is not looked for."""
    from megatron_posttrain.doctor.findings import Findings
    from megatron_posttrain.doctor.job import Cluster, JobCheck

    assert stage.job is not None
    cluster, findings = Cluster.parse(assume) if assume else None, Findings()
    unmade = [what for what in stage.takes if not pipeline.place(*what).exists()]
    ranks = cluster.gpus if cluster else stage.config.processes * stage.config.nodes
    job = JobCheck(
        findings, stage.command, stage.job, ranks, cluster, _shapes(pipeline, stage.job) if cluster else None
    )
    if unmade and cluster is None:
        job.check_layout()
    else:
        job.run()
    for found in findings:
        if found.status in ("warn", "fail") or found.check == "memory":
            yield found.status, f"{found.check}: {found.found}" + (f"; {found.fix}" if found.fix else "")


def _shapes(pipeline: Pipeline, job: Config) -> str | None:
    """The model that the first of the stages before started from, where this one's is still to be made."""
    path = job.model.path
    for stage in reversed(pipeline.stages.values()):
        if stage.job is not None and path.startswith(f"{stage.directory}/"):
            path = stage.job.model.path
    return path if path != job.model.path else None
