"""Running a training to its end: states, previews, a bar, and what Ctrl-C leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from torch import nn

from finecf.explainers._training import TrainingStopped


class Trainer(Protocol):
    """What is trained, step by step. `whole` is false in the middle of a step."""

    step: int
    whole: bool

    @property
    def steps(self) -> int:
        """How many in all."""

    @property
    def network(self) -> nn.Module:
        """What draws."""

    def advance(self) -> dict[str, float]:
        """One step; the losses by name."""

    def check_weights(self) -> None:
        """Stop where the network holds NaN or infinity."""

    def save(self, path: Path) -> None:
        """Write all that the next step needs."""


def run_training(
    trainer: Trainer,
    state: Path | None,
    save_every: int,
    preview: Callable[[int], object] | None = None,
    preview_every: int = 1,
    progress: bool | None = None,
) -> None:
    """Train to the last step.

    Args:
        trainer: at its first step, or at that of a state it has loaded.
        state: the file of the state; None: none is written.
        save_every: steps between two states; one is also written at an interruption.
        preview: called with the number of steps done, the network set to draw.
        preview_every: steps between two previews.
        progress: whether to show a bar.

    Raises:
        TrainingStopped: as of `Trainer.advance` and `Trainer.check_weights`; it says where the last good state is.
        KeyboardInterrupt: Ctrl-C, between two steps; it says where the state is.
    """
    saved = state if trainer.step else None
    # A state counts once the step after it has shown that its losses are numbers.
    untried = None if state is None else state.with_name(state.name + ".new")
    waiting = False
    with _training_bar(progress, trainer) as advance:
        try:
            while trainer.step < trainer.steps:
                with interrupted_after():
                    losses = trainer.advance()
                advance(losses)
                if state is not None and untried is not None:
                    if waiting:
                        untried.replace(state)
                        saved, waiting = state, False
                    if trainer.step % save_every == 0:
                        trainer.save(untried)
                        waiting = True
                if preview is not None and trainer.step % preview_every == 0:
                    trainer.network.eval()
                    preview(trainer.step)
                    trainer.network.train()
            trainer.check_weights()  # no step comes that would show it
        except KeyboardInterrupt:
            done = f"training was interrupted after {trainer.step} of {trainer.steps} steps"
            if state is not None and trainer.whole:
                trainer.save(state)
                saved, waiting = state, False
            if saved is None and not waiting:
                raise KeyboardInterrupt(f"{done}; no state was written") from None
            raise KeyboardInterrupt(f"{done}; the same call goes on from the state in {state}") from None
        except TrainingStopped as stop:
            waiting = False
            where = f"; the last good state is in {saved}"
            if saved is None:
                where = "; no state was kept " + ("(give checkpoint=)" if state is None else f"yet ({save_every=})")
            raise TrainingStopped(stop.loss, stop.step, stop.value, where) from None
        finally:
            if state is not None and untried is not None:
                if waiting:  # something else ended the training, such as the preview
                    untried.replace(state)
                untried.unlink(missing_ok=True)


@contextmanager
def interrupted_after() -> Iterator[None]:
    """Ctrl-C waits for the end of what is inside, unless it is pressed twice."""
    plain = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not plain:
        yield
        return
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            plain(number, frame)
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, plain)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _training_bar(progress: bool | None, trainer: Trainer) -> Iterator[Callable[[dict[str, float]], object]]:
    """A bar with the losses beside it."""
    if not progress:
        yield lambda _: None
        return
    from tqdm import tqdm

    # With all losses it is still a bar in 80 columns.
    form = "{desc} {percentage:3.0f}%|{bar:6}|{n_fmt}/{total_fmt} {remaining}{postfix}"
    with tqdm(total=trainer.steps, initial=trainer.step, desc="fitting", bar_format=form) as bar:

        def advance(losses: dict[str, float]) -> None:
            named = (f"{name[:3]} {value:.2f}".replace(" 0.", " .") for name, value in losses.items())
            bar.set_postfix_str(" ".join(named), refresh=False)
            bar.update(1)

        yield advance
