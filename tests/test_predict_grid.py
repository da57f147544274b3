"""The grid's own cluster: several sweeps at once on one machine, and nothing that listens beyond it."""

import warnings
from pathlib import Path

from tasks.predict_grid import _client
from tests.conftest import small_config


def test_two_sweeps_at_once_each_have_a_cluster_on_loopback_alone(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with _client(config) as first, _client(config) as second:
            servers = [client.cluster.scheduler.http_server for client in (first, second)]
            assert {server.address for server in servers} == {"127.0.0.1"}
            assert len({server.port for server in servers}) == 2
