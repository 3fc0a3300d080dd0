"""Stand-in boards: machines that behave like a user's board in some way, made of Debian packages and wheels.

openssh    this machine behind OpenSSH's own server on loopback
raspi      arm64 programs under qemu-user behind an arm64 sshd, with a Raspberry Pi's sensors
icount     a whole arm64 machine under qemu-system that counts instructions: 1 instruction = 1 ns,
           so that latencies repeat to a few hundredths of a percent. Not the latency of any real board

Each is a context manager that yields the `Target` which reaches it, and leaves nothing running. What
they are made of is built once, under $EDGEPRUNE_BOARDS or ~/.cache/edgeprune/boards.
`python tools/boards` is the command line.
"""
