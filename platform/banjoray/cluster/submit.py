"""A banjoray command as a Ray job on a cluster: the same verb, its logs here, its exit code returned."""

import asyncio
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from banjoray.config.job import is_url, load_job
from banjoray.errors import ClusterError, ConfigError

# What a job does not need from the folder it is submitted from; Ray refuses uploads above 500 MiB.
LEFT_BEHIND = [".git", ".venv", "runs", "registry", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]


def submit(verb: str, job_file: str, address: str, overrides: Iterable[str], tell: Callable[[str], None]) -> int:
    """Run ``banjoray VERB JOB_FILE`` as a Ray job and wait; the exit code of the job's command.

    The working directory travels to the cluster, so a relative job or data file means the same there; results must
    not stay in that copy, so ``storage`` and ``registry.root`` have to be absolute paths or URLs.
    Raises ConfigError before anything is sent; ClusterError: nobody at ``address``, or a job that ended without a code.
    """
    overrides = list(overrides)
    job = load_job(job_file, overrides)
    for key, place in (("storage", job.storage), ("registry.root", job.registry.root)):
        if not is_url(place) and not Path(place).is_absolute():
            raise ConfigError(
                f"{key}: '{place}' is relative; on a cluster it would be a temporary folder. "
                f"Add --set {key}=/a/shared/path (or s3://...)."
            )
    if Path(job_file).is_absolute():
        raise ConfigError(f"{job_file}: give the job file as a path inside the working directory, which is uploaded")
    parts = ["banjoray", verb, job_file, "--json", *(part for value in overrides for part in ("--set", value))]
    try:
        client = JobSubmissionClient(address)
        submission = client.submit_job(
            entrypoint=shlex.join(parts), runtime_env={"working_dir": ".", "excludes": LEFT_BEHIND}
        )
    except AuthenticationError as error:
        raise ClusterError(
            f"{address} refuses this command ({str(error).splitlines()[0]}); set RAY_AUTH_MODE=token and the cluster's "
            "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
        ) from None
    except ConnectionError as error:
        raise ClusterError(f"no Ray job server answers at {address}: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        raise ClusterError(f"the job server at {address} did not take the job: {str(error).splitlines()[0]}") from None
    tell(f"job {submission} (ray job stop {submission} --address {address} ends it)\n")
    return follow(client, submission, tell)


def follow(client: JobSubmissionClient, submission: str, tell: Callable[[str], None]) -> int:
    """Pass on a job's log until it ends; the exit code of its command."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(submission):
            tell(lines)

    asyncio.run(tail())
    # The log ends a moment before the status says so.
    while not (info := client.get_job_info(submission)).status.is_terminal():
        time.sleep(0.2)
    if info.driver_exit_code is None:
        raise ClusterError(f"job {submission} ended as {info.status} without an exit code: {info.message}")
    return int(info.driver_exit_code)
