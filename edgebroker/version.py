"""The version of this release, and of what it writes, in one place."""

__version__ = "0.1.0"
# Of the data directory (FORMAT). A release reads every lower one and refuses a higher one before it writes anything.
DATA_FORMAT = 1
# When this release was made, in milliseconds since 1970: a clock that shows less is wrong.
RELEASED_MS = 1_796_000_000_000
# Public keys of minisign whose signatures `upgrade` believes: that of today, and the one that will follow it. A build
# without keys takes unsigned releases only, by their digest.
RELEASE_KEYS: tuple[str, ...] = ()
