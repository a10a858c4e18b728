"""Builds cext/*.pyx as edgebroker submodules; all other metadata is in pyproject.toml."""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

# Import name -> source; the name alone decides where the shared object lands.
MODULES = {
    "edgebroker.common.answers": "cext/answers.pyx",
    "edgebroker.common.crc32c": "cext/crc32c.pyx",
    "edgebroker.common.livekeys": "cext/livekeys.pyx",
    "edgebroker.common.records": "cext/records.pyx",
    "edgebroker.storage.log.segscan": "cext/segscan.pyx",
    "edgebroker.storage.log.staging": "cext/staging.pyx",
    "edgebroker.storage.commit.groupcommit": "cext/groupcommit.pyx",
    "edgebroker.network.wire.framing": "cext/framing.pyx",
    "edgebroker.client.publish.accumulator": "cext/accumulator.pyx",
    "edgebroker.network.io.sendpath": "cext/sendpath.pyx",
    "edgebroker.consumer.handling.interruption": "cext/interruption.pyx",
    "edgebroker.cli.bench.native_client": "cext/native_client.pyx",
}
HEADERS = sorted(glob("cext/*.h") + glob("cext/*.pxd"))
TRACE = bool(os.environ.get("EDGEBROKER_TRACE"))  # `make cover`: line events for coverage.py

extensions = [
    Extension(
        name,
        [source],
        include_dirs=["cext"],
        depends=HEADERS,
        define_macros=[("_GNU_SOURCE", "1")] + ([("CYTHON_TRACE_NOGIL", "1")] if TRACE else []),
        # What gcc says of generated code concerns Cython; the headers get every warning from the fuzzer.
        extra_compile_args=[
            "-O2",
            "-Wall",
            "-Wno-unused-function",
            "-Wno-maybe-uninitialized",
            "-Wno-discarded-qualifiers",
        ],
    )
    for name, source in MODULES.items()
]

setup(
    ext_modules=cythonize(
        extensions,
        include_path=["cext"],
        # Cython.Coverage finds its line map only when the .c lies beside the .pyx.
        build_dir=None if TRACE else "build/cython",
        compiler_directives={"language_level": "3", "linetrace": TRACE},
    )
)
