"""Scalars of a run: JSON lines in `metrics.jsonl`, and TensorBoard event files."""

import json
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


def read_history(workdir: str | Path) -> list[dict[str, Any]]:
    """All lines of `metrics.jsonl`, each with its "step"; a line cut by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    history = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            history.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return history


class Silent:
    """Stands in for a `Writer` on the processes that leave writing to the first."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_):
        pass

    def write(self, step: int, part: str, scalars: dict[str, float]) -> None:
        """Writes nothing."""


class Writer:
    """Writes the scalars of the run in `workdir`, going on after `step`: later lines of a killed run are dropped."""

    def __init__(self, workdir: str | Path, step: int):
        self._path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in read_history(workdir) if line["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        self._lines = self._path.open("a")
        folder = Path(workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk or a clock set back, and then its queue fills up and blocks.
        self._events = EventsWriter(str(folder / "events"))
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_):
        self._lines.close()
        self._events.close()

    def write(self, step: int, part: str, scalars: dict[str, float]) -> None:
        """Writes scalars of `part` ("train" or "validation") at a step."""
        named = {f"{part}/{name}": float(value) for name, value in scalars.items()}
        self._lines.write(json.dumps({"step": step} | named) + "\n")
        self._lines.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()
