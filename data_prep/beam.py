"""Apache Beam for large databases: each record is read and cut by the worker that takes it."""

import contextlib
import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from data_prep import physionet

# Beam's own default, DirectRunner, may fetch a program from the net and start it.
DEFAULT_RUNNER = "FnApiRunner"

Options: TypeAlias = Any  # Beam's PipelineOptions; Beam is an extra, and takes seconds to import


def parse_options(options: Sequence[str]) -> Options:
    """Parses what says where a pipeline runs: ["--runner=FlinkRunner", "--flink_master=…"], [] for this machine.

    Raises:
        PrepareError: Beam is not installed, or does not take the options.
    """
    beam = _apache_beam()
    parsed = beam.options.pipeline_options.PipelineOptions(list(options))
    standard = parsed.view_as(beam.options.pipeline_options.StandardOptions)
    standard.runner = standard.runner or DEFAULT_RUNNER
    try:
        beam.Pipeline(options=parsed)
    except Exception as error:  # whatever a runner finds wrong with them
        reason = " ".join(str(error).split())
        raise physionet.PrepareError(f"Beam does not take the options {' '.join(options)}: {reason}") from error
    return parsed


def examples(read: Callable[[tuple[int, str]], Iterable], records: Sequence[str]) -> Any:
    """Makes the part of a pipeline that gives the examples of one split.

    Args:
        read: gives the (key, example) pairs of a record (number, name); it travels to the workers.
        records: names in order.

    Returns:
        Beam's PTransform.
    """
    beam = _apache_beam()
    return beam.Create(list(enumerate(records))) | beam.FlatMap(read)


@contextlib.contextmanager
def workers_errors(empty_split: Callable[[str], Exception]) -> Iterator[None]:
    """Raises here what was raised in a worker: Beam hands it on with words of its own, or as the text of a traceback.

    Args:
        empty_split: makes the error for a split without an example, which is found behind the workers.
    """
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if found := re.search(r"PrepareError: (.*?)(?: \[while running .*)?$", text, re.MULTILINE):
            raise physionet.PrepareError(found[1]) from error
        if found := re.search(r"examples is 0 for split (\w+)", text):
            raise empty_split(found[1]) from error
        raise


def _apache_beam():
    logging.disable(logging.WARNING)  # it tells of Google's libraries, which nobody asked for
    try:
        beam = importlib.import_module("apache_beam")
    except ImportError as error:
        raise physionet.PrepareError(f'--beam needs {error.name}; pip install "ralenet_jax[beam]"') from error
    finally:
        logging.disable(logging.NOTSET)
    # It writes the traceback of an error that it raises as well.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    return beam
