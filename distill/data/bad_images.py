"""The record of images that could not be decoded, and the limit on their number."""

from __future__ import annotations

import logging

from distill.errors import ConfigError

log = logging.getLogger(__name__)


class SkippedImages:
    """Counts each undecodable image once, logs it, and ends the job when there are more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._reasons: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The images so far, in the order in which they were met."""
        return tuple(self._reasons)

    def add(self, name: str, reason: str) -> None:
        """Record an image; raise ConfigError on data.max_bad_images when it is one too many."""
        if name in self._reasons:
            return
        self._reasons[name] = reason
        log.warning("skipping image %s: it cannot be decoded (%s)", name, reason)
        if len(self._reasons) > self.limit:
            first = ", ".join(f"{name} ({reason})" for name, reason in list(self._reasons.items())[:3])
            allowed = f"at least {len(self._reasons)}, the undecodable images so far, or mended images; first: {first}"
            raise ConfigError("data.max_bad_images", self.limit, allowed)
