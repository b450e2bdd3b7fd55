"""Sequences in files: ``snapshots`` of a cache, the ``snapshot_file`` format, ``mesh_snapshots``."""

from jaxpaged.storage.snapshot_file import Snapshot, SnapshotError, read_snapshot
from jaxpaged.storage.snapshots import restore, snapshot

__all__ = ["Snapshot", "SnapshotError", "read_snapshot", "restore", "snapshot"]
