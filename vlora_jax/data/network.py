"""Calls of the Hugging Face hub that fail at once, and in one line, where there is no network."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def reachable(endpoint: str) -> bool:
    """Whether an address's host has a name that resolves, or a proxy will do that."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    try:
        socket.getaddrinfo(urlparse(endpoint).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def hub() -> Iterator[None]:
    """Inside, hub libraries print no warnings and count no downloads; without network they read their cache only.

    They would otherwise try five times over half a minute before they look there.
    """
    import datasets.config
    import huggingface_hub.constants

    log = logging.getLogger("huggingface_hub")
    level = log.level
    places: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    log.setLevel(logging.ERROR)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not reachable(huggingface_hub.constants.ENDPOINT):
        for place in places:
            place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        log.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
