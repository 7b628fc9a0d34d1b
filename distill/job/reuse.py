"""The teacher and the blocks of a job by what they depend on, and taking them from a sibling run that has them.

A run in a directory of its own choice (run.dir) computes everything itself; others look at the runs under the same
outputs/ that have the same run.tag.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from distill.blocks.chain import Chain
from distill.config.fingerprint import TEST, TEST_ITEMS, fingerprint
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.observability.numbers import show_count
from distill.storage.files import DamagedFileError, read_bytes, write_bytes
from distill.storage.ledger import Entry, Ledger
from distill.storage.run_directory import RunDirectory
from distill.storage.siblings import Siblings

log = logging.getLogger(__name__)

TEACHER = "teacher.safetensors"  # of the run directory, where the teacher was trained here

# What a stage does not depend on; a setting that is not named here is taken to matter.
_AFTER_BLOCKS = ("assemble.", "finetune.", "deploy.", TEST, TEST_ITEMS, "data.test_split")
_NOT_THE_TEACHERS = (
    *_AFTER_BLOCKS, "blocks.", "budget.", "student.", "search.", "distill.", "plan.", "cache.", "teacher.amp",
)  # fmt: skip
# What is in a block's identity by what it comes to: the teacher's tensors, the operations, what is replaced, the steps.
_BY_EFFECT = (
    "blocks.", "search.", "teacher.fit.", "teacher.weights", "student.first_layer", "distill.steps", "distill.epochs",
    "budget.seconds",
)  # fmt: skip


def _without(facts: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if not key.startswith(prefixes)}


def teacher_identity(facts: Mapping[str, Any]) -> str:
    """Return what decides the teacher that a job with the identity `facts` trains, as a digest."""
    return fingerprint(_without(facts, _NOT_THE_TEACHERS))


def tensors_digest(network: nn.Module) -> str:
    """Return a digest of all parameters and buffers by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def unit_identities(
    facts: Mapping[str, Any],
    *,
    blocks: Blocks,
    teacher: nn.Module,
    budget: int,
    trained: Mapping[int, str] = MappingProxyType({}),
) -> dict[int, str]:
    """Return what decides the weights of every unit, as digests by its number.

    That is the teacher's tensors, the operations up to and in the unit's blocks (which are its inputs, its targets and
    its place, from which first weights are drawn), what is replaced, and the settings of data, students and training.
    How the user asked for these blocks does not count. First weights that were `trained` before count as what they are,
    by their digests.
    """
    shared = _without(facts, _AFTER_BLOCKS + _BY_EFFECT) | {"budget": budget, "tensors": tensors_digest(teacher)}
    operations, found = _operations(blocks.chain), {}
    for number, unit in blocks.units.items():
        own = {"shared": shared, "operations": operations[: unit.target], **blocks.candidates[number].facts}
        found[number] = fingerprint(own | ({"trained": trained[number]} if number in trained else {}))
    return found


def candidates_identity(
    facts: Mapping[str, Any],
    chain: Chain,
    candidates: Sequence[Sequence[Mapping[str, Any]]],
    *,
    teacher: nn.Module,
    images: int,
) -> str:
    """Return what decides the scores of candidates (of each, for every block that it changes: which it is, recipe,
    options and changes), as a digest: not the budgets, nor how the chosen ones are trained."""
    shared = _without(facts, (*_AFTER_BLOCKS, *_BY_EFFECT, "distill.", "plan.", "cache."))
    own = {"candidates": list(candidates), "operations": _operations(chain), "images": images}
    return fingerprint({"shared": shared, "tensors": tensors_digest(teacher), **own})


def _operations(chain: Chain) -> list[str]:
    """Return what every block computes, and the form of what it gives."""
    found = []
    for index in range(len(chain.blocks)):
        form = chain.boundaries[index + 1]
        found.append(f"{form.shape} {form.stride} {form.dtype}\n{_described(chain, index)}")
    return found


def _described(chain: Chain, index: int) -> str:
    """What a block computes, in words: its operations and its modules with their options."""
    try:
        module = chain.block_module(index)
    except NotImplementedError:  # lies between listed modules: only the network as a whole can run it
        return repr(asdict(chain.blocks[index]))
    return f"{module.code if isinstance(module, fx.GraphModule) else ''}\n{module!r}"


def siblings_of(context: Context) -> Siblings | None:
    """Return the runs that this one may take from; None for a run in a directory of its own choice."""
    config = context.config
    return None if config.run.dir is not None else Siblings(context.run.path, tag=config.run.tag)


def take_teacher(context: Context) -> dict[str, Any] | None:
    """Copy the trained teacher from a sibling that has it; return its stage's result, or None. Rank 0 calls this."""
    return _take(context, "teacher", teacher_identity(context.identity), [TEACHER], did="trained")


def take_candidates(context: Context, identity: str, files: Sequence[str]) -> dict[str, Any] | None:
    """Copy the first weights of candidates (`files`) from a sibling that has scored the same ones; return its stage's
    result, or None. Rank 0 calls this."""
    return _take(context, "candidates", identity, files, did="scored")


def _take(context: Context, stage: str, identity: str, files: Sequence[str], *, did: str) -> dict[str, Any] | None:
    siblings = siblings_of(context)
    if siblings is None:
        return None
    siblings.note(**{stage: identity})
    for run in siblings.with_same(stage, identity):
        there = RunDirectory(run)
        result = there.result(stage)
        if result is None:
            continue
        try:
            for name in files:
                write_bytes(context.run.path / name, there.read(name))
        except DamagedFileError as damage:
            log.warning("%s: that of run %s is not taken: %s", stage, siblings.name_of(run), damage.why)
            continue
        source = str(result.get("taken_from") or siblings.name_of(run))
        context.say(f"{stage}: taken from run {source}, which {did} the same")
        return dict(result) | {"taken_from": source}
    return None


def take_units(context: Context, identities: Mapping[int, str], names: Mapping[int, str]) -> None:
    """Record the finished blocks of siblings that are the same as some of this run's (`identities` and `names` by
    number), and where these are all, complete the stage with the figures of the run that trained them.

    Rank 0 calls this, before a plan is made for what is left.
    """
    siblings = siblings_of(context)
    if siblings is None:
        return
    siblings.note(blocks={str(block): identity for block, identity in identities.items()})
    ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
    for run, theirs in siblings.with_blocks():
        wanted = {b: theirs[same] for b, same in identities.items() if same in theirs and b not in ledger.entries}
        if wanted:
            for block, entry, content in _finished(run, wanted):
                source, generation = entry.source or siblings.name_of(run), context.control.generation
                own = replace(entry, unit=block, name=names[block], source=source, generation=generation)
                ledger.record(own, content)
    sources = Counter(entry.source for entry in ledger.entries.values() if entry.source is not None)
    for source, count in sources.items():
        context.say(f"distill stage: {count} of {show_count(len(identities), 'block')} taken from run {source}")
    if sources and ledger.entries.keys() >= identities.keys():
        _take_stage(context, siblings, set(identities.values()), made=ledger.files)


def _finished(run: Path, wanted: Mapping[int, int]) -> Iterator[tuple[int, Entry, bytes]]:
    """Yield those of the blocks `wanted` (own index -> index there) that a run has finished, with their weights."""
    try:
        there = Ledger(run, origin=RunDirectory(run).origin(TEACHER))
    except DamagedFileError as damage:
        log.warning("blocks are not taken: %s", damage)
        return
    for block, index in wanted.items():
        entry = there.entries.get(index)
        if entry is not None:
            with suppress(DamagedFileError):  # gone since
                yield block, entry, there.content(entry)


def _take_stage(context: Context, siblings: Siblings, identities: set[str], *, made: Sequence[str]) -> None:
    """Complete the stage with the plan and the figures of a sibling that has completed it with just these blocks."""
    for run, theirs in siblings.with_blocks():
        result = RunDirectory(run).result("distill") if theirs.keys() == identities else None
        if result is None:
            continue
        with suppress(DamagedFileError):
            # all are read before one is written: where one of them is damaged, nothing here has changed
            files = {name: read_bytes(run / name) for name in ("plan.json", "costs.json")}
            for name, content in files.items():
                write_bytes(context.run.path / name, content)
            result = dict(result) | {"taken_from": str(result.get("taken_from") or siblings.name_of(run))}
            context.run.complete("distill", result, made=made, used=[TEACHER])
            return
