"""Where the grid is fitted: threads of this process, or the workers of a Dask scheduler at an address."""

import asyncio
import logging
import ssl
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import Any

import torch
from distributed import Client, LocalCluster
from distributed.comm.core import CommClosedError, connect
from distributed.security import Security
from threadpoolctl import threadpool_limits

from quee_core.config import DaskTLSConfig, RunConfig
from quee_core.errors import ConfigError, ServerError, ServerUnreachableError
from quee_core.grid_units import in_one_line
from tasks.grid_worker import refuse_other_build, this_build

GONE = (OSError, CancelledError, asyncio.CancelledError)  # how Dask's client tells that the scheduler is away
ASKING = 300.0  # seconds; a worker imports torch before it answers, and may do so from a slow disk
_KEPT = "run again: what is finished is kept"


@contextmanager
def grid_client(run: RunConfig) -> Iterator[Client]:
    """The scheduler at `run.dask`, or a cluster of threads in this process, each fit on one thread.

    Raises ServerError for a scheduler that does not answer or let us in, that has no worker, or one of another build;
    ConfigError for certificates that are missing or none.
    """
    logging.getLogger("distributed").setLevel(logging.WARNING)
    if run.dask is None:
        with _threads_here(run.dask_workers) as client:
            yield client
        return
    with cluster_client(run) as client:
        await_worker(client, run)
        check_builds(client, run)
        yield client


def check_cluster(run: RunConfig) -> None:
    """See that the scheduler at `run.dask` answers, and that the workers that it has are of this build.

    The grid comes hours after the start of a large sweep. Raises as `grid_client` does, but may find no worker yet.
    """
    if run.dask is not None:
        with cluster_client(run) as client:
            check_builds(client, run)


@contextmanager
def cluster_client(run: RunConfig) -> Iterator[Client]:
    """A client of the scheduler at `run.dask`. Raises as `grid_client` does, but asks for no worker."""
    assert run.dask is not None
    security = Security() if run.dask_tls is None else _security(run.dask_tls)
    try:
        asyncio.run(_knock(run.dask, security, run.dask_timeout))
        client = Client(run.dask, security=security, timeout=run.dask_timeout, name="quee", set_as_default=False)
    except (OSError, ValueError, ImportError) as error:  # the last where it speaks another version of Dask's protocol
        raise _unreachable(run, error) from None
    say_no_lost_timeout(client)
    try:
        yield client
    finally:
        with suppress(*GONE):
            client.close()


def await_worker(client: Client, run: RunConfig) -> None:
    """Return once the scheduler has a worker. Raises ServerError if there is none in `run.dask_timeout` seconds."""
    try:
        client.wait_for_workers(1, timeout=run.dask_timeout)
    except TimeoutError:
        raise no_worker(run) from None
    except GONE as error:
        raise lost(run, error) from None


def check_builds(client: Client, run: RunConfig) -> None:
    """Raises ServerError that names the first worker whose versions or code are not those of this process."""
    ours = this_build()
    try:
        found = client.sync(client._run, _build_probe(), on_error="return", callback_timeout=ASKING)
    except TimeoutError:
        raise ServerError(
            f"run.dask: a worker of {run.dask} did not say in {ASKING:g} s which version of quee it has; "
            f"start its workers anew, and {_KEPT}"
        ) from None
    except GONE as error:
        raise lost(run, error) from None
    for worker, theirs in found.items():
        if isinstance(theirs, BaseException):
            theirs = {"quee": f"not to be asked ({in_one_line(theirs)})"}
        refuse_other_build(ours, theirs, worker)


def workers_of(client: Client, run: RunConfig) -> int:
    """How many threads the scheduler's workers have. Raises ServerError if it does not tell in time."""
    if client.scheduler is None:
        raise lost(run)
    try:
        threads = client.sync(client.scheduler.ncores, workers=None, callback_timeout=run.dask_timeout)
    except GONE as error:
        raise lost(run, error) from None
    return sum(threads.values())


def lost(run: RunConfig, error: BaseException | None = None) -> ServerUnreachableError:
    """The fault of a scheduler that has gone in the middle."""
    why = "" if error is None else f" ({in_one_line(error)})"
    return ServerUnreachableError(
        f"run.dask: the scheduler at {run.dask} was lost{why}; start it or its host anew, and {_KEPT}"
    )


def no_worker(run: RunConfig) -> ServerUnreachableError:
    """The fault of a scheduler without workers."""
    return ServerUnreachableError(
        f"run.dask: the scheduler at {run.dask} has had no worker for {run.dask_timeout:g} s; start some "
        f"(dask worker {run.dask}), and {_KEPT}"
    )


@contextmanager
def _threads_here(threads: int) -> Iterator[Client]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    log = logging.getLogger("distributed.worker")
    log.addFilter(_is_news)
    try:
        with (
            threadpool_limits(limits=1),  # of BLAS for the process; workers limit their own OpenMP
            LocalCluster(
                n_workers=1,
                threads_per_worker=threads,
                processes=False,
                dashboard_address=None,
                # both serve health and metrics all the same: by default the scheduler at a port that a second sweep
                # would want too, and the worker on every interface
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                worker_dashboard_address="127.0.0.1:0",
            ) as cluster,
            Client(cluster) as client,
        ):
            say_no_lost_timeout(client)
            yield client
    finally:
        log.removeFilter(_is_news)
        torch.set_num_threads(before)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what a worker in this process says of a unit that failed, traceback and all: it is raised here too."""
    return not record.getMessage().startswith("Compute Failed")


def say_no_lost_timeout(client: Client) -> None:
    """Log nothing of a timeout that Dask no longer awaits; without this it reads as an error of a sweep that went well.

    Dask's senders wait for the next message or some milliseconds; a loop that ends just then has nobody to take the
    timeout, which asyncio reports when the future is collected. Any other exception of the loop is reported as before.
    """

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not ("future" in context and isinstance(context.get("exception"), TimeoutError)):
            loop.default_exception_handler(context)

    async def listen() -> None:
        asyncio.get_running_loop().set_exception_handler(report)

    client.sync(listen)


async def _knock(address: str, security: Security, timeout: float) -> None:
    """Be greeted by the scheduler. Raises OSError if that takes longer than `timeout` seconds.

    Dask's client would wait without end for a host that accepts connections and says nothing.
    """
    connecting = connect(address, timeout=timeout, **security.get_connection_args("client"))
    comm = await asyncio.wait_for(connecting, timeout)
    await comm.close()


def _security(tls: DaskTLSConfig) -> Security:
    for name, path in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key)):
        if not path.is_file():
            raise ConfigError(f"run.dask_tls.{name}: {path}: no such file; want one in PEM form")
    security = Security(
        tls_ca_file=str(tls.ca), tls_client_cert=str(tls.cert), tls_client_key=str(tls.key), require_encryption=True
    )
    try:
        security.get_connection_args("client")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"run.dask_tls: {tls.ca}, {tls.cert} and {tls.key} make no connection ({in_one_line(error)}); want PEM "
            "files that can be read, the key being that of the certificate"
        ) from None
    return security


def _unreachable(run: RunConfig, error: Exception) -> ServerError:
    why = in_one_line(error)
    if isinstance(error, CommClosedError) and run.dask_tls is not None:  # refused by an alert, or by an end without one
        return ServerError(
            f"run.dask: the scheduler at {run.dask} does not let us in ({why}); see that it speaks TLS, and that its "
            "certificate and run.dask_tls.cert are signed by the authority run.dask_tls.ca"
        )
    if isinstance(error, CommClosedError):
        return ServerError(
            f"run.dask: what listens at {run.dask} closes the connection ({why}); see that it is a Dask scheduler, and "
            "whether it wants tls:// and run.dask_tls"
        )
    return ServerUnreachableError(
        f"run.dask: no scheduler answers at {run.dask} within {run.dask_timeout:g} s ({why}); start one (dask "
        "scheduler), correct the address, or leave run.dask out to fit in this process"
    )


def _build_probe() -> Any:
    def build() -> Mapping[str, str]:
        try:
            from tasks.grid_worker import this_build
        except Exception as error:  # whatever is wrong with what is installed there, it is not what is here
            return {"quee": f"not to be imported ({type(error).__name__}: {error})"}
        return this_build()

    async def in_a_thread() -> Mapping[str, str]:  # the import takes seconds, in which the worker must be heard of
        import asyncio

        return await asyncio.to_thread(build)

    return in_a_thread  # sent by value, since it is no module's: it runs where quee is missing, too
