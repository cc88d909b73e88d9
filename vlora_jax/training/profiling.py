"""A profiler's trace of some steps of a run: what its devices and its host do in them, and for how long."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

PROFILE = "profile"  # a directory of the run's


def window(text: str) -> range:
    """Steps `FIRST:LAST`, counted from 1, both included.

    >>> window("10:12")
    range(10, 13)

    Raises:
      ValueError: it is something else.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError("must be the FIRST:LAST step to profile, counted from 1, like 10:12")
    return range(int(first), int(last) + 1)


@contextmanager
def profiled(
    step: Callable, chosen: range, done: int, folder: Path, say: Callable[[str], None]
) -> Iterator[Callable[..., tuple]]:
    """A train step of which the profiler records some calls: all that the devices do for them, and nothing before.

    A recording that is cut short, by a signal or an error, is written too.

    Args:
      step: `(state, base, batch) → (state, metrics)`.
      chosen: steps to record, counted from 1; none if empty.
      done: steps before the first call.
      folder: for the traces, one directory each.
      say: told where the trace is and how to look at it.
    """
    if not chosen or done >= chosen[-1]:
        if chosen:
            say(f"profiler: step {chosen[-1]} is done already, nothing is recorded")
        yield step
        return
    numbers, recorded, options = itertools.count(done + 1), list[int](), jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python would slow down what is looked at, and fill the file

    def finish() -> None:
        jax.profiler.stop_trace()
        what = f"step {recorded[0]}" if len(recorded) == 1 else f"steps {recorded[0]} to {recorded[-1]}"
        say(
            f"profiler: {what} recorded in {folder}; look at it with pip install xprof and xprof --logdir {folder}, or "
            "open its perfetto_trace.json.gz at https://ui.perfetto.dev"
        )

    with ExitStack() as recording:

        def call(state: Any, base: Any, batch: Any) -> tuple:
            number = next(numbers)
            if number not in chosen:
                return step(state, base, batch)
            if not recorded:
                jax.block_until_ready(state)
                jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
                recording.callback(finish)
            recorded.append(number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):  # by which tools tell steps apart
                out = step(state, base, batch)
            if number == chosen[-1]:
                jax.block_until_ready(out)
                recording.close()
            return out

        yield call
