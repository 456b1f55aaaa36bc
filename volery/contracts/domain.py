"""What a host is told about a domain (libvirt's word for a VM on a host): devices and where they come from.

Made by inventory from its VM, storage's disks and network's NICs; turned into libvirt XML by the agent.
"""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Message
from volery.contracts.cpus import GivenCpus
from volery.contracts.host_devices import GivenDevice


class DomainState(StrEnum):
    """libvirt's virDomainState, and `gone` for a domain that the host doesn't have."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting_down"
    PMSUSPENDED = "pmsuspended"
    CRASHED = "crashed"
    SHUTOFF = "shutoff"
    INCOMING = "incoming"
    """Waits, paused, for a live migration to arrive."""
    GONE = "gone"


class DiskBus(StrEnum):
    VIRTIO = "virtio"
    VIRTIO_SCSI = "virtio_scsi"
    SATA = "sata"


class NicModel(StrEnum):
    VIRTIO = "virtio"
    E1000 = "e1000"
    E1000E = "e1000e"
    RTL8139 = "rtl8139"


class ImageFormat(StrEnum):
    QCOW2 = "qcow2"
    RAW = "raw"


MOST_CELLS = 16
"""NUMA cells of a host that can be pinned to: those numbered below this."""


class NumaMode(StrEnum):
    """Where the host's kernel takes a node's memory from, in libvirt's words."""

    STRICT = "strict"
    """From its cell and nowhere else."""
    INTERLEAVE = "interleave"
    """From its cells in turn."""
    PREFERRED = "preferred"
    """From its cell as long as that has some."""


class NumaNode(Message):
    """A NUMA node of a guest."""

    memory_bytes: int
    vcpus: tuple[int, ...]
    """Numbers of its vCPUs, from 0."""
    host_cells: tuple[int, ...] = ()
    """NUMA cells of its host that its memory comes from: one, or for `interleave` several. None: from anywhere."""
    mode: NumaMode = NumaMode.STRICT
    """Says nothing of a node without `host_cells`."""


class FileSource(Message, tag="file"):
    """A volume in a directory that the host has mounted."""

    path: str
    format: ImageFormat


class BackingFile(Message):
    """A file below a volume: what the one above doesn't have is read from it."""

    path: str
    format: ImageFormat
    merging: bool = False
    """It is being merged into the one below it, or was: the header of the one above may name either."""


class ChainSource(FileSource, tag="chain"):
    """A file volume with others below it, down to the last one: nothing is left to be found out from their headers.

    A kind of its own, since an agent of before chains would leave out what is below a file and read zeros there: it
    refuses this one.
    """

    backing: tuple[BackingFile, ...]
    """From the next one below to the base."""


class IscsiSource(Message, tag="iscsi"):
    """A LUN reached by QEMU itself (libiscsi), never by the host's kernel."""

    portal: str
    """host:port"""
    iqn: str
    lun: int
    chap_user: str = ""
    chap_password: str = ""
    """Secret: goes into an ephemeral private libvirt secret, never into a log, an event or the domain XML."""


VolumeSource = FileSource | ChainSource | IscsiSource


class DomainDisk(Message):
    disk_id: str
    """Also the device's serial number (its first 20 characters) and the alias `ua-{disk_id}`."""
    source: VolumeSource | None = None
    """None: an empty CD drive."""
    cdrom: bool = False
    bus: DiskBus = DiskBus.VIRTIO
    target: str = ""
    """vda, sdb, …: unique in the domain, chosen by inventory, never reused while the domain runs."""
    read_only: bool = False
    shareable: bool = False
    shared_storage: bool = False
    """On a domain that other hosts reach too: direct I/O, so that nothing stays in a page cache."""
    boot_order: int = 0


class DomainNic(Message):
    nic_id: str
    """Also the alias `ua-{nic_id}`."""
    mac: str
    model: NicModel = NicModel.VIRTIO
    bridge: str = ""
    """The Linux bridge on the host; "" plugs the NIC nowhere."""
    link_up: bool = True
    mtu: int = 0
    boot_order: int = 0


class DomainLease(Message):
    """libvirt's `<lease>`: held by QEMU while its vCPUs may run, moved along by a live migration."""

    lockspace: str
    """The storage domain's id."""
    key: str
    """The VM's id."""
    path: str
    offset: int = 0
    """In bytes."""


class DomainSpec(Message):
    """A whole domain. Everything has a value that runs on any host with QEMU."""

    vm_id: str
    """Also the libvirt UUID."""
    name: str
    """The libvirt name, unique on the host: `{vm name}` reduced to safe characters plus part of the id."""
    title: str
    """The VM's name as its owner wrote it."""
    memory_bytes: int
    max_memory_bytes: int = 0
    hugepage_kib: int = 0
    """Its memory is in huge pages of this size; 0: in ordinary ones."""
    numa_nodes: tuple[NumaNode, ...] = ()
    vcpus: int = 1
    sockets: int = 0
    cores: int = 0
    threads: int = 0
    cpu_model: str = ""
    """A libvirt CPU model; "" is host-passthrough under KVM and maximum under TCG."""
    machine: str = "q35"
    uefi: bool = False
    disks: tuple[DomainDisk, ...] = ()
    nics: tuple[DomainNic, ...] = ()
    hostname: str = ""
    """Given to the guest by SMBIOS and fw_cfg."""
    boot_menu: bool = False
    kernel_path: str = ""
    initrd_path: str = ""
    kernel_cmdline: str = ""
    watchdog_action: str = ""
    """reset, poweroff, pause, none; "" for no watchdog device."""
    graphics: bool = True
    installation: str = ""
    """Which Volery made it: kept in the domain's metadata; other installations leave it alone."""
    cpus: GivenCpus | None = None
    """The physical CPUs that it has on this host; None: any that the host has given to nobody alone."""
    lease: DomainLease | None = None
    """The host must have joined its lockspace. Without one, nothing but epochs keeps the VM from running twice."""
    devices: tuple[GivenDevice, ...] = ()
    """Devices of this host that it has for itself."""
