"""Hosts that are whole machines: Debian under its own systemd, kernel, sanlock and NFS, in QEMU without KVM."""
