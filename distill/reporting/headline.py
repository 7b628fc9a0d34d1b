"""The top of the page: what came of the run in one sentence and a few figures, how far it got, and what stopped it."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from distill.observability.energy.joules import job_joules
from distill.observability.numbers import finite, show, show_count, show_seconds, show_short
from distill.reporting.energy import show_joules
from distill.reporting.latency import Speed, device_of, in_runtime, runtime_words, speeds
from distill.reporting.markup import Markup, Section, folded, join, section, table, tag
from distill.reporting.plot import bar
from distill.reporting.run import Run


def headline(run: Run) -> Markup:
    """Return the title, the state, the sentence and the figures."""
    state, kind = _state(run)
    top = tag("header", tag("h1", run.title), tag("p", state, class_=f"state {kind}"))
    figures = _tiles(run) if run.finished else _progress_tiles(run)
    words = (_origin(run), tag("p", _sentence(run), class_="lead"))
    return join(top, *words, tag("div", *figures, class_="tiles"), _strip(run), _command(run))


def _state(run: Run) -> tuple[str, str]:
    if run.finished:
        diverged = [block.name for block in run.units if block.status == "diverged"]
        return (f"finished; diverged: {_some(diverged)}", "bad") if diverged else ("finished", "good")
    return (
        (f"failed in stage {run.current_stage}", "bad") if run.errors else (f"unfinished: {run.current_stage}", "open")
    )


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} blocks"


def _sentence(run: Run) -> str:
    if not run.finished:
        done = sum(block.entry is not None for block in run.units)
        blocks = f"{done} of {show_count(len(run.units), 'block')} finished. " if run.units else ""
        stages = ", ".join(stage for stage in run.order if run.done(stage)) or "none"
        sign = run.last_sign_s
        last = (
            f" Its files were last written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(sign))}." if sign else ""
        )
        return f"{blocks}Complete stages: {stages}.{last}"
    return " ".join((_accuracy_and_speed(run), _size(run), _work(run)))


def _accuracy_and_speed(run: Run) -> str:
    """What a student is made for: a small one that is slower is no success."""
    teacher, student = run.metrics["teacher"], run.metrics["student"]
    accuracy = (
        f"The student reaches {show(student.get('top1'))} % top-1 where its teacher has {show(teacher.get('top1'))} %"
    )
    told = [
        f"{one.images} in {show(one.student)} ms instead of {show(one.teacher)} ms "
        f"({_smaller(one.student, one.teacher, 'faster', 'slower')})"
        for one in speeds(run.metrics)
        if one.student is not None and one.teacher is not None
    ]
    return accuracy + (f", and answers {' and '.join(told)}, in {runtime_words(run.metrics)}." if told else ".")


def _size(run: Run) -> str:
    teacher, student = run.metrics["teacher"], run.metrics["student"]
    size, work = (_percent(_ratio(student.get(key), teacher.get(key))) for key in ("params", "flops"))
    return f"It has {show(size, '{:.1f}')} % of the parameters and {show(work, '{:.1f}')} % of the FLOPs."


def _work(run: Run) -> str:
    seconds, ranks = run.part("distill").get("seconds"), run.world_size
    where = f" on {show_count(ranks, 'rank')}" if ranks else ""
    source = run.part("distill").get("taken_from")
    elsewhere = f" in run {source}, from which they were taken" if source else ""
    return f"Distilling {show_count(len(run.units), 'block')} took {show_seconds(seconds)}{where}{elsewhere}."


def _origin(run: Run) -> Markup:
    """Return when, how long, where and by which version the run was made, as far as that is known."""
    made, place = run.metrics.get("run") or {}, run.metrics.get("environment") or {}
    attempt = "took" if run.attempts == 1 else f"attempt {run.attempts} took"
    version = place.get("distill") and f"distill {place['distill']}" + (
        f" ({place['commit']})" if place.get("commit") else ""
    )
    known = [
        made.get("finished_at"),
        made.get("duration_s") and f"{attempt} {show_seconds(made['duration_s'])}",
        place.get("host") and f"host {place['host']}",
        device_of(run.metrics),
        version,
    ]
    told = join(*(tag("span", str(fact)) for fact in known if fact))
    return tag("p", told, class_="origin") if told else Markup()


def _command(run: Run) -> Markup:
    command = (run.metrics.get("run") or {}).get("command")
    return tag("pre", str(command), tabindex=0) if command else Markup()


def _tiles(run: Run) -> list[Markup]:
    teacher, student = run.metrics["teacher"], run.metrics["student"]
    distill = run.part("distill")
    a, b = finite(teacher.get("top1")), finite(student.get("top1"))
    loss = "-" if a is None or b is None else f"{b - a:+.2f} points"
    speed = distill.get("images_per_second")
    tiles = [
        _tile("top-1 accuracy", show(b, "{:.2f} %"), f"teacher {show(a, '{:.2f} %')}", loss),
        *(_latency(one, eager=not in_runtime(run.metrics)) for one in speeds(run.metrics)),
        _tile("parameters", show_short(student.get("params")), f"teacher {show_short(teacher.get('params'))}",
              _smaller(student.get("params"), teacher.get("params"), "smaller", "larger")),
        _tile("FLOP per image", show_short(student.get("flops")), f"teacher {show_short(teacher.get('flops'))}",
              _smaller(student.get("flops"), teacher.get("flops"), "fewer", "more")),
        _tile("distill stage", show_seconds(distill.get("seconds")),
              f"predicted {show_seconds(distill.get('makespan_predicted_s'))}",
              "no step was taken" if speed is None else f"{show_short(speed)} images/s"),
    ]  # fmt: skip
    joules = job_joules(run.energy)
    if joules is not None:
        tiles.append(_tile("energy", show_joules(joules), "measured stages", ""))
    return tiles


def _latency(speed: Speed, *, eager: bool) -> Markup:
    change = _smaller(speed.student, speed.teacher, "faster", "slower")
    name = f"{'eager ' if eager else ''}latency, batch {speed.batch}"
    return _tile(name, show(speed.student, "{:.2f} ms"), f"teacher {show(speed.teacher, '{:.2f} ms')}", change)


def _progress_tiles(run: Run) -> list[Markup]:
    """Return how far every part of the distill stage is."""
    blocks = run.units
    if not blocks:
        return []
    done = sum(block.entry is not None for block in blocks)
    steps = sum(block.steps for block in blocks)
    budget = sum(block.budget if block.budget is not None else block.steps for block in blocks)
    predicted = run.plan.get("predicted_makespan_s")
    return [
        _tile("blocks finished", f"{done} of {len(blocks)}", "in the ledger, never trained again", ""),
        _tile(
            "steps done", f"{100 * steps / budget:.0f} %" if budget else "-", f"{steps:,} of {budget:,}, all blocks", ""
        ),
        _tile("attempt", str(run.attempts), f"on {show_count(run.world_size, 'rank')}" if run.world_size else "-", ""),
        _tile("plan", show_seconds(predicted), "predicted for what this attempt had to do", ""),
    ]


def _tile(name: str, figure: str, beside: str, change: str) -> Markup:
    parts = [tag("dt", name), tag("dd", figure, class_="figure"), tag("dd", beside)]
    return tag(
        "dl",
        *parts,
        *(
            [tag("dd", change, class_="change worse" if change.endswith(("slower", "larger", "more")) else "change")]
            if change
            else []
        ),
        class_="tile",
    )


def _ratio(value: object, base: object) -> float | None:
    a, b = finite(value), finite(base)
    return a / b if a is not None and b else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _smaller(value: object, base: object, less: str, more: str) -> str:
    share = _ratio(value, base)
    if not share:
        return "-"
    if abs(share - 1) < 0.005:
        return "the same"
    return f"{1 / share:.2f}x {less}" if share < 1 else f"{share:.2f}x {more}"


def _strip(run: Run) -> Markup:
    """Return the stages in order, each with its state and its seconds."""
    seconds = run.stage_seconds
    longest = max(seconds.values(), default=0.0)
    skipped = {"finetune"} if run.finetune_epochs == 0 else set()
    items = []
    for stage in run.order:
        if stage in skipped:
            kind, words = "skipped", "not asked for"
        elif run.done(stage):
            kind, words = "done", show_seconds(seconds[stage]) if stage in seconds else "done"
        elif stage == run.current_stage:
            kind, words = ("failed", "failed") if run.errors else ("open", "not finished")
        else:
            kind, words = "later", "not begun"
        length = bar([(seconds[stage], "stage")], whole=longest, label=f"{stage}: {words}") if stage in seconds else ""
        items.append(tag("li", tag("b", stage.replace("_", " ")), tag("span", words), length, class_=kind))
    return tag("ol", *items, class_="strip", aria_label="stages of the job")


def what_stopped(run: Run) -> list[Section]:
    """Return, for a run without an end, its last errors, the state of its blocks and the command that goes on."""
    if run.finished:
        return []
    stories = [join(tag("h3", name), tag("pre", "\n".join(lines), tabindex=0)) for name, lines in run.errors]
    last = [join(tag("h3", name), tag("pre", "\n".join(lines), tabindex=0)) for name, lines in run.last_lines if lines]
    blocks = [
        (b.name, str(b.rank if b.rank is not None else "-"), b.status,
         bar([(b.steps, "student")], whole=b.budget or max(b.steps, 1),
             label=f"{b.name}: {show_count(b.steps, 'step')}"),
         f"{b.steps} of {b.budget}" if b.budget else str(b.steps), show(b.last_error, "{:.4f}"))
        for b in run.units
    ]  # fmt: skip
    headings = ("block", "rank", "state", "steps done", "last step", "relative error")
    return [
        section("What stopped it", *stories),
        section("Go on", tag("pre", go_on_command(run), tabindex=0),
                note="The command that started this run goes on where it stopped; finished blocks are not trained "
                     "again. From the run's own record:"),
        section("How far each block is",
                table(headings, blocks, text=(0, 2, 3), tall=True, kind="sorts") if blocks else Markup()),
        section("Last lines of the logs", folded("Show them", *last, opened=not run.errors) if last else Markup()),
    ]  # fmt: skip


def go_on_command(run: Run) -> str:
    """Return a command for one node that goes on in this run directory with the run's own configuration."""
    where = run.path.resolve()
    given = Path(str(run.settings.get("run.dir") or where.relative_to(_above(where, 3))))  # outputs/NAME/FINGERPRINT
    lines = []
    if given.is_absolute() or ".." in given.parts:  # where it was started is not known
        given = where
    else:
        lines.append(f"cd {shlex.quote(str(_above(where, len(given.parts))))}")
    stage = run.settings.get("stage", "all")
    words = ["python", "-m", "distill", f"run={given}", *([f"stage={stage}"] if stage != "all" else [])]
    words.append(f"launch.nproc_per_node={run.settings.get('launch.nproc_per_node', run.world_size or 1)}")
    lines.append(shlex.join(words))
    return "\n".join(lines)


def _above(path: Path, steps: int) -> Path:
    return (path, *path.parents)[min(steps, len(path.parents))]
