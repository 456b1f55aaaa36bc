"""Virtual machines and what may be done with them."""

from __future__ import annotations

from api_gateway import console
from api_gateway.route import Route
from api_gateway.sockets import SocketRoute
from volery.contracts import cluster as c
from volery.contracts import host as h
from volery.contracts import snapshot as s
from volery.contracts import vm as v
from volery.contracts import vm_starts as vs
from volery.contracts.account import Scope

VMS, DEVICES = "Virtual machines", "Devices of virtual machines"


def _act(name: str, action: v.VmAction, summary: str) -> Route:
    return Route("POST", f"/vms/{{id}}/{name}", v.ACT_ON_VM, VMS, summary, fixed={"action": action})


ROUTES = (
    Route("GET", "/vms", v.LIST_VMS, VMS, "List VMs", items=v.Vm,
          expands={"host": ("host_id", h.GET_HOST), "cluster": ("cluster_id", c.GET_CLUSTER)}),
    Route("POST", "/vms", v.CREATE_VM, VMS, "Create a VM with its disks and NICs",
          example={"name": "web1", "cluster_id": "0199c0de-0000-7000-8000-000000000001", "memory_bytes": 1073741824,
                   "vcpus": 2, "disks": [{"size_bytes": 10737418240}], "nics": [{"name": "nic1"}]}),
    Route("GET", "/vms/{id}", v.GET_VM, VMS, "Get a VM"),
    Route("PATCH", "/vms/{id}", v.UPDATE_VM, VMS, "Change a VM",
          note="What a running VM can't take at once waits for its next start (`next_run`)."),
    Route("DELETE", "/vms/{id}", v.DELETE_VM, VMS, "Delete a VM", query=("delete_disks",),
          note="`delete_disks=false` keeps its disks."),
    Route("POST", "/vms/{id}/start", v.START_VM, VMS, "Start a VM"),
    Route("POST", "/vms/start", vs.START_VMS, VMS, "Start many VMs in one call",
          note="VMs that a hard affinity group keeps on one host get their places there together, or none of them is started. "
               "Fails when some VM doesn't run in the end; `result.vms` says what became of each, and `dry_run` where each would "
               "start.",
          example={"vm_ids": ["0199c0de-0000-7000-8000-000000000002", "0199c0de-0000-7000-8000-000000000003"]}),
    Route("POST", "/vms/{id}/stop", v.STOP_VM, VMS, "Stop a VM",
          note="The guest is asked (its agent, then ACPI) and left running if it won't, unless `force` or "
               "`force_after_seconds` say otherwise."),
    _act("reboot", v.VmAction.REBOOT, "Reboot the guest"),
    _act("reset", v.VmAction.RESET, "Reset, as by the button"),
    _act("pause", v.VmAction.PAUSE, "Pause the vCPUs"),
    _act("unpause", v.VmAction.UNPAUSE, "Let the vCPUs go on"),
    Route("POST", "/vms/{id}/suspend", v.SUSPEND_VM, VMS, "Suspend to disk; starting it resumes",
          note="Its memory is a file on its host, where alone it can start again, until it is stopped: that gives the memory "
               "up, and it starts anywhere."),
    Route("POST", "/vms/{id}/migrate", v.MIGRATE_VM, VMS, "Migrate live, to a host of choice or the scheduler's"),
    Route("POST", "/vms/{id}/explain", v.START_VM, VMS, "Explain where it could run, and why not elsewhere",
          fixed={"dry_run": True}, hidden=("run_once",), body_name="ExplainVm", scope=Scope.READ,
          note="The scheduler's verdict for every host in `result`; nothing is changed or claimed."),
    Route("POST", "/vms/{vm_id}/snapshots", s.CREATE_SNAPSHOT, VMS, "Make a snapshot of a VM, also while it runs",
          note="All of its disks, or those in `disk_ids`, at one point in time; all of them or none."),
    Route("GET", "/vms/{vm_id}/snapshots", s.LIST_SNAPSHOTS, VMS, "List a VM's snapshots", items=s.Snapshot),
    Route("GET", "/snapshots", s.LIST_SNAPSHOTS, VMS, "List snapshots", items=s.Snapshot),
    Route("GET", "/snapshots/{id}", s.GET_SNAPSHOT, VMS, "Get a snapshot, with the VM as it was then"),
    Route("DELETE", "/snapshots/{id}", s.DELETE_SNAPSHOT, VMS, "Delete a snapshot of a VM that is down",
          note="The disks stay as they are: what was written since is merged into what the snapshot has."),
    Route("POST", "/snapshots/{id}/revert", s.REVERT_TO_SNAPSHOT, VMS, "Revert a VM that is down to its newest snapshot",
          note="What was written since is gone. Disks only: the VM's configuration stays."),
    Route("POST", "/vms/{id}/disks", v.ATTACH_VM_DISK, DEVICES, "Attach a disk"),
    Route("DELETE", "/vms/{id}/disks/{disk_id}", v.DETACH_VM_DISK, DEVICES, "Detach a disk"),
    Route("POST", "/vms/{id}/nics", v.ATTACH_VM_NIC, DEVICES, "Add a NIC"),
    Route("PATCH", "/vms/{id}/nics/{nic_id}", v.UPDATE_VM_NIC, DEVICES, "Change a NIC, its network or its link"),
    Route("DELETE", "/vms/{id}/nics/{nic_id}", v.DETACH_VM_NIC, DEVICES, "Remove a NIC"),
    Route("PUT", "/vms/{id}/cdroms/{target}", v.CHANGE_VM_CD, DEVICES, "Insert an ISO, or eject with `disk_id` empty"),
)  # fmt: skip

SOCKETS = (SocketRoute("/vms/{id}/console", console.bridge, Scope.WRITE),)
