class GroupCommit:
    """The commit thread's work without the GIL. Submit and collect on the loop thread, run() on the commit thread.

    One group is in flight at a time. `done_fd` becomes readable when a group (or its writes) is over.
    """

    wake_fd: int
    done_fd: int
    def close(self) -> None: ...
    @property
    def idle(self) -> bool: ...
    @property
    def seconds_in_flight(self) -> float: ...
    def submit(
        self, jobs: list[tuple[int, int, int, int, int, int, object]], sync: bool, announce_written: bool
    ) -> None:
        """Write, then (sync) sync each file: (fd, position, address, length, allocate from, allocate bytes, owner).

        The owners are kept alive until collect() returned the end of the group. RuntimeError while one is in flight.
        """

    def call(self) -> None:
        """Make run() return once, so that the commit thread runs a closure."""

    def run(self) -> None:
        """Work on groups; returns when woken without one."""

    def collect(self) -> tuple[bool, list[tuple[int, int]], int, int] | None:
        """(done, [(write errno, sync errno)], write ns, sync ns), None when there is nothing new.

        With done False only the writes are over (announce_written was asked).
        """
