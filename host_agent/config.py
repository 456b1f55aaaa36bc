"""Every setting of the host agent, from the environment with the prefix VOLERY_AGENT_."""

from __future__ import annotations

import msgspec


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Read by `volery.runtime.config.read("VOLERY_AGENT_", AgentConfig)`; a setting that doesn't exist is refused."""

    state_dir: str = "/var/lib/volery/agent"
    """Journal, identity and certificates of this host. Survives reboots; losing it means enrolling again."""
    libvirt_uri: str = "qemu:///system"
    """The hypervisor. `test:///default` runs everything but guests."""
    hypervisor: str = "auto"
    """kvm, qemu (TCG), or auto: kvm where a probe guest really ran."""
    control_plane_url: str = ""
    """https://host:port of the gateway, for enrolment."""
    enrolment_token: str = ""
    """One-time token for the first start; not needed afterwards."""
    data_address: str = "127.0.0.1:0"
    """host:port on which the image and console server listens; port 0 takes a free one and keeps it."""
    migration_address: str = ""
    """Address on which other hosts reach this host's QEMU for live migration; "" is the data address's host."""
    migration_libvirt_uri: str = ""
    """How other hosts' libvirtd reach this host's libvirtd, e.g. qemu+tls://host/system; "": no live migration to it."""
    tunnel_address: str = ""
    """Address for VXLAN between hosts; "" is the migration address."""
    beat_seconds: float = 0.5
    """Between heartbeats. ha suspects a host after several missed ones, so change both together."""
    sample_seconds: float = 15.0
    """Between statistics samples (oVirt's vm_sample_interval)."""
    report_seconds: float = 300.0
    """Between full reports that nobody asked for: they mend what an event that never came left wrong."""
    storage_check_seconds: float = 10.0
    """Between small reads of each connected storage domain (oVirt's sd_health_check_delay)."""
    storage_check_timeout_seconds: float = 20.0
    """A read that takes longer counts as failed: what hangs for so long also hangs the VMs."""
    network_check_seconds: float = 3.0
    """Between looks at the host's network devices, so that a pulled cable is reported soon."""
    spool_max_bytes: int = 256 * 1024 * 1024
    """Facts kept while the control plane is away; beyond it the oldest coalescible go first."""
    work_threads: int = 4
    """Orders at libvirt at once: libvirtd serves five requests per client, one stays free."""
    domain_call_seconds: float = 10.0
    """A libvirt call about a domain that takes longer marks the domain unresponsive."""
    max_abandoned_calls: int = 32
    """Stuck threads before the agent restarts itself, which touches no VM."""
    max_waiting_orders: int = 2000
    """Orders accepted and not finished; beyond it new ones are refused until some have ended."""
    boot_id_path: str = "/proc/sys/kernel/random/boot_id"
    """Names the run of this machine: a new one proves that what ran before is gone. Set only where a whole
    "host" can die without the kernel, as in the lab; never in a container beside a living libvirtd."""
    dmi_uuid_path: str = "/sys/class/dmi/id/product_uuid"
    """Where the machine's own UUID is read, which its BMC must confirm before it is believed. Set only where a "host" has
    no firmware of its own, as in the lab."""
    shutdown_mark_path: str = ""
    """A file that is there while this host is being shut down, made before the agent is ended. Set where no systemd says
    so, as in the lab; "" is none."""
    shutdown_guests_seconds: float = 30.0
    """When the host is being shut down its VMs are asked to shut down, and ended after so long. The agent's own stop time
    must be longer (systemd's TimeoutStopSec is 90 s)."""
    watchdog_class_path: str = "/sys/class/watchdog"
    """Where the kernel tells of its watchdog devices. Set only where the watchdog isn't the kernel's, as in the lab."""
    device_suffix: str = ""
    """Short suffix of this installation's bridges, so that several installations share a machine."""
    installation: str = ""
    """Which Volery this host belongs to (VOLERY_INSTALLATION): kept in the marker file of storage domains, so that
    two of them never write one."""
    staging_dir: str = ""
    """Where uploads and downloads of iSCSI disks wait, which have no directory beside them; "" is
    {state_dir}/staging. Needs room for a whole image."""
    import_networks: str = ""
    """CIDRs, comma-separated, from which images may be imported although they are loopback or link-local; empty:
    none, so that nobody reads the host's own services or a cloud's metadata through an import."""
