"""Storage domains, disks and the transfer of images."""

from __future__ import annotations

from api_gateway import transfers
from api_gateway.route import Route, Special
from volery.contracts import storage as s

DOMAINS, DISKS, TRANSFERS = "Storage domains", "Disks", "Transfers"


def _act(name: str, action: str, summary: str) -> Route:
    return Route(
        "POST",
        f"/storage-domains/{{id}}/{name}",
        s.ACT_ON_STORAGE_DOMAIN,
        DOMAINS,
        summary,
        fixed={"action": action},
    )


BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
OFFSET = {
    "name": "offset", "in": "query", "schema": {"type": "integer", "minimum": 0, "default": 0},
    "description": "Where these bytes begin. Resume an upload at the `upload-offset` of a HEAD.",
}  # fmt: skip

ROUTES = (
    Route("GET", "/storage-domains", s.LIST_STORAGE_DOMAINS, DOMAINS, "List storage domains", items=s.StorageDomain),
    Route("POST", "/storage-domains", s.CREATE_STORAGE_DOMAIN, DOMAINS, "Create a storage domain"),
    Route("GET", "/storage-domains/{id}", s.GET_STORAGE_DOMAIN, DOMAINS, "Get a storage domain"),
    Route("PATCH", "/storage-domains/{id}", s.UPDATE_STORAGE_DOMAIN, DOMAINS, "Change a storage domain"),
    Route("DELETE", "/storage-domains/{id}", s.DELETE_STORAGE_DOMAIN, DOMAINS, "Forget a storage domain",
          query=("destroy",), note="What is on the storage stays there. `destroy` forgets its disks, too."),
    Route("POST", "/storage-domains/{id}/attach", s.ATTACH_STORAGE_DOMAIN, DOMAINS, "Attach to a data center"),
    _act("activate", "activate", "Use a storage domain"),
    _act("maintenance", "maintain", "Put a storage domain in maintenance"),
    _act("detach", "detach", "Detach from its data center"),
    _act("refresh", "refresh", "Look again at what is on the storage"),
    Route("POST", "/iscsi-discoveries", s.DISCOVER_TARGETS, DOMAINS, "Ask an iSCSI portal what it offers"),
    Route("GET", "/disks", s.LIST_DISKS, DISKS, "List disks", items=s.Disk,
          expands={"storage_domain": ("storage_domain_id", s.GET_STORAGE_DOMAIN)},
          note="`filter.vm_id` finds those that a VM has."),
    Route("POST", "/disks", s.CREATE_DISK, DISKS, "Create a disk", hidden=("id", "attach_to"),
          note="Empty, as a copy (`copy_of`), or imported from a URL (`import_url`). A LUN with something on it is used "
               "only when it is named (`lun`) together with `overwrite`."),
    Route("GET", "/disks/{id}", s.GET_DISK, DISKS, "Get a disk"),
    Route("PATCH", "/disks/{id}", s.UPDATE_DISK, DISKS, "Change a disk"),
    Route("DELETE", "/disks/{id}", s.DELETE_DISK, DISKS, "Delete a disk"),
    Route("POST", "/disks/{id}/resize", s.RESIZE_DISK, DISKS, "Grow a disk, also while a VM runs with it"),
    Route("POST", "/disks/{id}/copy", s.COPY_DISK, DISKS, "Copy a disk"),
    Route("GET", "/transfers", s.LIST_TRANSFERS, TRANSFERS, "List transfers", items=s.Transfer),
    Route("POST", "/transfers", s.CREATE_TRANSFER, TRANSFERS, "Open an upload or download",
          note="When its operation has ended the transfer (`object_id`) is ready: send or fetch /transfers/{id}/data."),
    Route("GET", "/transfers/{id}", s.GET_TRANSFER, TRANSFERS, "Get a transfer"),
    Route("DELETE", "/transfers/{id}", s.CANCEL_TRANSFER, TRANSFERS, "Cancel a transfer"),
    Route("POST", "/transfers/{id}/finish", s.FINISH_DISK_TRANSFER, TRANSFERS, "Finish an upload",
          note="Checks size, checksum and image, and puts it into the disk."),
    Special("PUT", "/transfers/{id}/data", transfers.upload, TRANSFERS, "Send bytes of an upload", mutates=True,
            scope=transfers.WRITE, parameters=(OFFSET,), request_body={"required": True, "content": BYTES},
            note="Any size, streamed to the host. After an interruption ask with HEAD how far it came.",
            responses={200: transfers.RECEIVED},
            refuses=(400, 404, 409, 503, 504)),
    Special("GET", "/transfers/{id}/data", transfers.download, TRANSFERS, "Fetch the bytes of a download",
            note="Resume with `Range: bytes=N-`.",
            responses={200: {"description": "The image", "content": BYTES},
                       206: {"description": "The part that was asked for", "content": BYTES},
                       416: {"description": "The range is outside the image"}},
            refuses=(400, 404, 409, 503, 504)),
    Special("HEAD", "/transfers/{id}/data", transfers.progress, TRANSFERS, "How far a transfer came",
            responses={200: {"description": "In `upload-offset` and `content-length`",
                             "headers": transfers.RECEIVED_HEADER}},
            refuses=(400, 404, 409, 503, 504)),
)  # fmt: skip
