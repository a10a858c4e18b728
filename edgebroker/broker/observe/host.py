"""The process and the machine as psutil sees them. Reads files of /proc: not for the loop."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

# Name, kind, help, labels: what docs/metrics.md lists.
MACHINE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("process_cpu_seconds_total", "counter", "processor time used", ()),
    ("process_start_time_seconds", "gauge", "when the process began, in seconds since 1970", ()),
    ("process_resident_memory_bytes", "gauge", "memory that is resident, mapped files included", ()),
    ("process_virtual_memory_bytes", "gauge", "address space", ()),
    ("process_open_fds", "gauge", "open file descriptors", ()),
    ("process_max_fds", "gauge", "limit of open file descriptors", ()),
    (
        "edgebroker_process_mapped_file_bytes",
        "gauge",
        "resident memory that belongs to files: the kernel takes it back when it needs it",
        (),
    ),
    ("edgebroker_process_threads", "gauge", "threads", ()),
    ("edgebroker_process_read_bytes_total", "counter", "bytes that the process had read from disks", ()),
    ("edgebroker_process_written_bytes_total", "counter", "bytes that the process had written to disks", ()),
    ("edgebroker_process_read_calls_total", "counter", "system calls that read", ()),
    ("edgebroker_process_write_calls_total", "counter", "system calls that wrote", ()),
    (
        "edgebroker_device_read_bytes_total",
        "counter",
        "bytes read from the device of the data directory, by everybody",
        ("device",),
    ),
    (
        "edgebroker_device_written_bytes_total",
        "counter",
        "bytes written to the device of the data directory, by everybody: what wears flash",
        ("device",),
    ),
    ("edgebroker_device_reads_total", "counter", "read requests to that device", ("device",)),
    ("edgebroker_device_writes_total", "counter", "write requests to that device", ("device",)),
    ("edgebroker_machine_memory_bytes", "gauge", "memory of the machine", ()),
    ("edgebroker_machine_memory_available_bytes", "gauge", "memory that could be had without swapping", ()),
)

Found = dict[str, list[tuple[tuple[str, ...], float]]]


def read_machine(data_dir: str) -> Found:
    """The numbers of MACHINE that this machine tells, by name."""
    process = psutil.Process()
    found: Found = {}

    def note(name: str, value: float, *labels: str) -> None:
        found[name] = [(labels, value)]

    with process.oneshot():
        cpu, memory = process.cpu_times(), process.memory_info()
        note("process_cpu_seconds_total", cpu.user + cpu.system)
        note("process_start_time_seconds", process.create_time())
        note("process_resident_memory_bytes", memory.rss)
        note("process_virtual_memory_bytes", memory.vms)
        note("edgebroker_process_mapped_file_bytes", memory.shared)
        note("edgebroker_process_threads", process.num_threads())
    note("process_open_fds", process.num_fds())
    note("process_max_fds", process.rlimit(psutil.RLIMIT_NOFILE)[0])
    try:
        io = process.io_counters()
    except (psutil.Error, OSError):  # a hardened kernel hides it
        io = None
    if io is not None:
        note("edgebroker_process_read_bytes_total", io.read_bytes)
        note("edgebroker_process_written_bytes_total", io.write_bytes)
        note("edgebroker_process_read_calls_total", io.read_count)
        note("edgebroker_process_write_calls_total", io.write_count)
    device = device_of(Path(data_dir))
    disk = (psutil.disk_io_counters(perdisk=True) or {}).get(device)
    if disk is not None:
        note("edgebroker_device_read_bytes_total", disk.read_bytes, device)
        note("edgebroker_device_written_bytes_total", disk.write_bytes, device)
        note("edgebroker_device_reads_total", disk.read_count, device)
        note("edgebroker_device_writes_total", disk.write_count, device)
    machine = psutil.virtual_memory()
    note("edgebroker_machine_memory_bytes", machine.total)
    note("edgebroker_machine_memory_available_bytes", machine.available)
    return found


def device_of(path: Path) -> str:
    """The name of the block device that holds a path, as in /proc/diskstats; "" when the kernel does not tell."""
    number = path.stat().st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return link.resolve().name if link.exists() else ""
