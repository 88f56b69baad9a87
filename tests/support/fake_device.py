"""A device that is told what to do and finishes it when a test lets it."""

from __future__ import annotations


class FakeDevice:
    """Finishes what it was told when it is let."""

    def __init__(self):
        self.told = self.done = 0

    def mark(self):
        return _Mark(self)


class _Mark:
    def __init__(self, device):
        self.device, self.place = device, None

    def record(self):
        self.device.told += 1
        self.place = self.device.told

    def query(self):
        assert self.place is not None, "asked before it was recorded"
        return self.place <= self.device.done
