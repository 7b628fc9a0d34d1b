"""A unit that goes from one rank to another while it trains: its state travels point to point, in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict

from safetensors.torch import load, save

from distill.distributed.store import Control
from distill.distributed.transport import Edge, receive_blob, send_blob
from distill.engine.rebalance.moves import Move
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.storage.checkpoint import Checkpoint, unit_name
from distill.training.trainer import BlockTrainer


def taken(control: Control, move: Move) -> bool:
    """Whether the state of a unit has come to its new rank, or the word that it has come to its end."""
    return control.get(f"taken/{move.number}") is not None


def announce_stolen(control: Control, unit: int, source: int, target: int, step: int) -> Move:
    """Say to all ranks that rank `source` gives a unit to rank `target`, which has asked for it; return the move."""
    move = Move(control.count("stolen", 1) - 1, unit, source, target, step)
    control.set(f"stolen/{move.number}", asdict(move))
    return move


def stolen(control: Control, number: int) -> Move | None:
    """Return the `number`-th move of that kind; None as long as there is none."""
    found = control.get(f"stolen/{number}")
    return None if found is None else Move(**found)


class HandOver:
    """One rank's side of all hand-overs: it gives units away and takes others over."""

    def __init__(self, control: Control, *, make: Callable[[int], BlockTrainer], trace: Trace) -> None:
        """`make` returns a unit's trainer as it would be after a restart: at its last checkpoint, or fresh."""
        self._control, self._make, self._trace = control, make, trace
        self._transfers: list[_Transfer] = []
        self._coming: dict[int, _Receipt] = {}

    def give(self, move: Move, state: Checkpoint | None) -> None:
        """Send a unit's state to its next rank; None: the unit has come to its end here. Returns at once."""
        self._transfers.append(_Gift(self._control, move, self._trace, state))

    def expect(self, move: Move) -> None:
        """Begin to receive a unit's state; returns at once."""
        self._coming[move.number] = _Receipt(self._control, move, self._trace)
        self._transfers.append(self._coming[move.number])

    def arrived(self, move: Move) -> bool:
        """Whether take() would return at once; raises what an expected transfer met."""
        return self._coming[move.number].over

    def take(self, move: Move) -> BlockTrainer | None:
        """Return the trainer of a unit that this rank takes over, at the step of the move, as soon as its state is
        here; None where the unit came to its end before that step."""
        if move.number not in self._coming:
            self.expect(move)
        receipt = self._coming.pop(move.number)
        with self._trace.span("wait", f"for block {move.unit} of rank {move.source}", move.step):
            receipt.join()
        state, receipt.state = receipt.state, None  # the transfer is remembered for its errors, not for its tensors
        if state is None:
            return None
        trainer = self._make(move.unit)
        trainer.take_over(state)
        assert trainer.step == move.step
        return trainer

    def close(self) -> None:
        """Wait for all transfers; raises what they met."""
        for transfer in self._transfers:
            transfer.join()


class _Transfer:
    """One state on its way, in a thread of its own."""

    def __init__(self, control: Control, move: Move, trace: Trace) -> None:
        self._control, self._move, self._trace = control, move, trace
        self._edge = Edge(move.source, move.target, control.generation, control.timeout_s, f"state{move.number}")
        self._error: DistillError | None = None
        self._thread = threading.Thread(target=self._run, name=f"state-{move.number}", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the transfer has come to its end; raises what it met."""
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end of the transfer, which has deadlines of its own; raises what it met."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _transfer(self, control: Control) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            self._transfer(self._control.second())
        except DistillError as error:
            self._error = error
        except Exception as error:  # whatever it is, the main thread must hear of it
            doing = f"handing over block {self._move.unit}: exchanging its state with"
            self._error = self._edge.broken(self._control.rank, doing, error)


class _Gift(_Transfer):
    def __init__(self, control: Control, move: Move, trace: Trace, state: Checkpoint | None) -> None:
        self._state = state
        super().__init__(control, move, trace)

    def _transfer(self, control: Control) -> None:
        state, key = self._state, f"state/{self._move.number}"
        self._state = None  # the transfer is remembered for its errors, not for its tensors
        if state is None:
            control.set(key, {"bytes": 0})
            return
        blob = save(state.tensors)
        # before connecting: the other end connects only when it knows the length, which its buffer needs
        control.set(key, {"bytes": len(blob), "step": state.step, "progress": state.progress})
        with self._trace.span("send", f"block {self._move.unit} to rank {self._move.target}"):
            send_blob(self._edge.connect(control.store_for("edges"), self._move.source), blob)


class _Receipt(_Transfer):
    state: Checkpoint | None = None

    def _transfer(self, control: Control) -> None:
        move = self._move
        purpose = f"state of block {move.unit} at step {move.step}"
        facts = control.wait(f"state/{move.number}", peer=move.source, purpose=purpose)
        if facts["bytes"]:
            group = self._edge.connect(control.store_for("edges"), move.target)
            with self._trace.span("receive", f"block {move.unit} from rank {move.source}"):
                tensors = load(receive_blob(group, facts["bytes"]))
            self.state = Checkpoint.of(unit_name(move.unit), facts["step"], tensors, facts["progress"])
        control.set(f"taken/{move.number}", True)
