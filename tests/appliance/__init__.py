"""What a technician does, done for real: a booted systemd, a virtual machine, a package, a container image.

`make test-appliance` builds the program and runs these; they need root and some Debian packages, and take minutes.
"""
