"""How Ray is told what its own processes are to do, where a command starts it: by variables that they read then."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# What Ray's own processes do while a run goes on is done on the cores of the run, whose threads wait for each other
# (docs/decisions/0017). On a cluster that is there for one command, nobody asks for metrics or lists of tasks, and no
# driver reads the logs of workers. What notices that a process has died is as it was.
QUIET = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    # The monitor of logs looks for new files ten times a second; where it knows of this many, once an interval (s).
    "RAY_LOG_MONITOR_MAX_OPEN_FILES": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
}


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process while the block runs; one that was set before stays as it is."""
    fresh = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)
