"""A storage domain on NFSv3, whose server keeps a dead host's locks until that boots again."""

from __future__ import annotations

from lab import plane
from vm_tier.guests import Figures
from vm_tier.site import EXPORT, Site
from volery.client import api
from volery.client.transport import Client, OperationFailed, ProblemError
from volery.contracts.operation import Operation
from volery.contracts.storage import CreateStorageDomain, DomainKind

PLACE = "/srv/nfs3"
CONF = "/etc/nfs.conf.d/vm-tier.conf"
SERVE = f"sed -i 's/vers3=./vers3={{}}/' {CONF} && systemctl restart nfs-server"
MOUNT = f"mkdir -p {PLACE}; mountpoint -q {PLACE} || mount -t nfs -o vers=3 {{}}:{EXPORT} {PLACE}"


def show(site: Site, client: Client) -> Figures:
    """Both hosts mount the export by NFSv3, and Volery is told to make a storage domain there."""
    server = site.machines[0]
    server.ssh(SERVE.format("y"), seconds=600)
    try:
        for machine in site.machines:
            machine.ssh(MOUNT.format(server.ip), seconds=600)
        for machine in site.machines:  # the server's own restart may have cost it the domain that it had
            site.until_up(client, machine)
        mounted = server.ssh(f"findmnt -n -o FSTYPE,OPTIONS {PLACE}").strip()
        return {"mount": mounted, "creating a storage domain there": _refusal(client)}
    finally:
        for machine in site.machines:
            machine.ssh(f"umount {PLACE} 2>/dev/null || :")
        server.ssh(SERVE.format("n"), seconds=600)


def _refusal(client: Client) -> str:
    center = client.find(api.DATA_CENTERS, plane.NAME)
    ask = CreateStorageDomain(name="nfs3", kind=DomainKind.DIRECTORY, data_center_id=center.id, path=PLACE)
    try:
        client.wait(client.send(api.STORAGE_DOMAINS.create(ask, Operation)))
    except (OperationFailed, ProblemError) as refused:
        return str(refused)
    return "not refused"
